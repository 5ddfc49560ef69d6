"""The kernel of the exact filter against sums over all pairs: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from afa.filtering.gaussian import FilterMethod, gaussian_filter
from afa.kernels import dispatch as kernels
from afa.kernels.dispatch import fused
from afa.losses.energy import energy_loss
from interpreted import interpret
from tensors import gaussian_pairs, value_and_gradient, worst

POINTS = 150
"""Neither of the kernel's blocks divides it."""

COUNTS = ([POINTS, 0], [131, 1], [128, 64], [POINTS + 9, -3])
"""Whole and partial blocks, none, and what lies beyond."""

TOLERANCES = {"cpu": 2e-3, "cuda": 5e-3}
"""Largest relative error, in the interpreter and on GPUs."""


def points(device: str, *, channels: int, dim: int = 5, count: int = POINTS) -> tuple[Tensor, Tensor]:
    """Features some of which are near each other, and positive values."""
    generator = torch.Generator().manual_seed(dim)
    features = 1.5 * torch.randn(2, count, dim, generator=generator)
    return features.to(device), torch.rand(2, count, channels, generator=generator).to(device)


def first(count: list[int], device: str = "cpu") -> Tensor:
    """(B, N) bool: the first points of each image."""
    return torch.arange(POINTS, device=device) < torch.tensor(count, device=device)[:, None]


def check_sums(device: str) -> None:
    """The filter and its gradient for counts, numbers of channels and of features."""
    assert fused(torch.device(device))
    for count in (None, *COUNTS):
        check_filter(device, count, channels=21)
    for channels, dim in ((1, 1), (70, 5), (3, 8)):
        check_filter(device, COUNTS[1], channels=channels, dim=dim)
    check_filter(device, COUNTS[1], channels=2, size=1e7)
    check_filter(device, COUNTS[1], channels=2, size=1e-9)
    # Too many features for the kernel: attention serves.
    features, values = points(device, channels=2, dim=15)
    filtered = gaussian_filter(features, values, method="exact_half")
    assert worst(filtered, gaussian_pairs(features) @ values.double()) < TOLERANCES[device]


def check_filter(device: str, count: list[int] | None, *, channels: int, dim: int = 5, size: float = 1.0) -> None:
    """The points that take part come first in one image and last in the other."""
    features, values = points(device, channels=channels, dim=dim)
    values *= size
    kernel = gaussian_pairs(features, count)
    expected = kernel @ values.double()
    inside = None if count is None else first(count, device)
    if inside is not None:
        values[~inside] = torch.inf  # which nothing may read
        features[1], values[1], inside[1] = features[1].flip(0), values[1].flip(0), inside[1].flip(0)
        kernel[1], expected[1] = kernel[1].flip(0, 1), expected[1].flip(0)
    values.requires_grad_()
    filtered = gaussian_filter(features, values, method="exact_half", inside=inside)
    pull = torch.rand(filtered.shape, generator=torch.Generator().manual_seed(1)).to(device)
    filtered.backward(pull)
    assert values.grad is not None
    what = (count, channels, dim, size)
    assert worst(filtered.detach(), expected) < TOLERANCES[device], what
    assert worst(values.grad, kernel @ pull.double()) < TOLERANCES[device], what


def check_pairs_kernel(device: str) -> None:
    """Rows beyond the count are not read, and empty batches are no trouble."""
    from afa.kernels.gaussian_triton import sum_pairs

    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(2, 70, 20, generator=generator) / 8).half().to(device)
    values = torch.rand(2, 70, 5, generator=generator).to(device)
    scale = torch.tensor(3.0, device=device)
    expected = 3 * (rows[:, :66].double() @ rows[:, :66].double().mT).exp() @ values[:, :66].double()
    rows[:, 66:], values[:, 66:] = torch.nan, torch.nan
    count = torch.tensor([66, 66], device=device, dtype=torch.int32)
    sums = sum_pairs(rows, rows, values, scale=scale, count=count)
    assert sums.dtype == torch.float32
    assert worst(sums[:, :66], expected) < TOLERANCES[device]
    assert not sums[:, 66:].any()
    assert sum_pairs(rows[:0], rows[:0], values[:0], scale=scale).shape == (0, 70, 5)
    assert sum_pairs(rows[:, :0], rows[:, :0], values[:, :0], scale=scale).shape == (2, 0, 5)
    one, few = rows[:, :1], values[:, :1]
    expected = 3 * one.double().square().sum(2, keepdim=True).exp() * few
    assert worst(sum_pairs(one, one, few, scale=scale), expected) < TOLERANCES[device]


def check_energy(device: str) -> None:
    """Value and gradient of the energy, of which the kernel takes only the pixels inside the valid box."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 4, 24, 28, generator=generator)
    image = 0.5 + 0.1 * torch.rand(3, 3, 24, 28, generator=generator)
    label = torch.randint(5, (3, 24, 28), generator=generator)
    label[label == 4] = 255
    box = torch.tensor([[0, 24, 0, 28], [2, 19, 4, 25], [6, 6, 0, 28]])
    given = (logits.to(device), image.to(device), label.to(device), box.to(device))
    settings = {"xy_bandwidth": 10.0, "factor": 0.01}
    loss, gradient = value_and_gradient(energy_loss, *given, method="exact", **settings)
    half_loss, half = value_and_gradient(energy_loss, *given, method="exact_half", **settings)
    assert abs(half_loss - loss) < TOLERANCES[device] * abs(loss)
    assert (half - gradient).norm() < TOLERANCES[device] * gradient.norm()
    assert gradient.any()
    assert not half[gradient == 0].any()


def test_interpreted_kernel_equals_all_pairs() -> None:
    command = (
        "import test_gaussian_triton as t; t.check_sums('cpu'); t.check_pairs_kernel('cpu'); t.check_energy('cpu')"
    )
    interpret(command, __file__)


@pytest.mark.parametrize("method", ["exact", "exact_half", "lattice"])
def test_points_that_take_no_part_may_as_well_be_cut_off(method: FilterMethod) -> None:
    features, values = points("cpu", channels=3, dim=2)
    # The lattice passes values on through vertices of any point; far ones have none in common.
    features[0, 90:] += 100
    counts = [90, POINTS]
    values.requires_grad_()
    filtered = gaussian_filter(features, values, method=method, inside=first(counts))
    (grad,) = torch.autograd.grad(filtered.square().sum(), values)
    for i, count in enumerate(counts):
        kept = values[i : i + 1, :count].detach().requires_grad_()
        cut = gaussian_filter(features[i : i + 1, :count], kept, method=method)
        (expected,) = torch.autograd.grad(cut.square().sum(), kept)
        tolerance = 1e-2 if method == "exact_half" else 1e-3
        torch.testing.assert_close(filtered[i : i + 1, :count], cut, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(grad[i : i + 1, :count], expected, rtol=tolerance, atol=tolerance)
        assert not filtered[i, count:].any()
        assert not grad[i, count:].any()


@pytest.mark.gpu
def test_compiled_kernel_equals_all_pairs() -> None:
    check_sums("cuda")
    check_pairs_kernel("cuda")
    check_energy("cuda")


@pytest.mark.gpu
def test_a_gpu_without_triton_takes_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    features, values = points("cuda", channels=21)
    inside = first(COUNTS[1], "cuda")
    by_kernel = gaussian_filter(features, values, method="exact_half", inside=inside)
    monkeypatch.setattr(kernels, "_HAS_TRITON", False)
    by_attention = gaussian_filter(features, values, method="exact_half", inside=inside)
    torch.testing.assert_close(by_attention, by_kernel, rtol=1e-2, atol=1e-6)


@pytest.mark.gpu
def test_the_kernel_does_not_synchronize_and_can_be_recorded() -> None:
    features, values = points("cuda", channels=21)
    inside = first(COUNTS[1], "cuda")

    def filtered() -> Tensor:
        return gaussian_filter(features, values, method="exact_half", inside=inside, reach=100.0)

    filtered()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = filtered()
    inside.copy_(first(COUNTS[2]))
    graph.replay()
    torch.testing.assert_close(recorded, filtered())
