"""The fused walk against the plain code: in Triton's interpreter on a CPU, and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from afa.kernels import dispatch as kernels
from afa.kernels import walk as walk_module
from afa.kernels.dispatch import fused
from afa.kernels.walk import spread, take_step, transition, window_mask
from interpreted import interpret

CASES = (
    # Rows and columns of tokens, score maps, radius, power, epsilon.
    ((5, 19), 6, 2, 2.0, 0.1),
    ((3, 37), 4, 8, 2.0, 0.1),
    ((2, 50), 5, 20, 0.5, 0.1),
    ((6, 5), 3, 9, 3.0, 0.0),
    ((1, 16), 1, 3, 1.0, 0.0),
    ((17, 1), 21, 4, 2.0, 0.0),
    ((4, 6), 8, 0, 2.0, 0.1),
)


def draw(grid: tuple[int, int], channels: int) -> tuple[Tensor, Tensor]:
    """An affinity that is not symmetric, a third of it 0, with one token that is like none; and scores."""
    generator = torch.Generator().manual_seed(0)
    tokens = grid[0] * grid[1]
    affinity = torch.rand(2, tokens, tokens, generator=generator)
    affinity[torch.rand(affinity.shape, generator=generator) < 0.3] = 0
    affinity[1, :, tokens // 2] = 0
    return affinity, torch.rand(2, channels, *grid, generator=generator)


def plain(affinity: Tensor, scores: Tensor, *, radius: int, power: float, epsilon: float) -> Tensor:
    mask = window_mask(scores.shape[2], scores.shape[3], radius, affinity.device)
    return take_step(transition(affinity, mask, power=power, epsilon=epsilon), scores)


def check(device: str) -> None:
    """Compare with the plain code in float64, then what is not the usual case."""
    assert fused(torch.device(device))
    for grid, channels, radius, power, epsilon in CASES:
        affinity, scores = draw(grid, channels)
        knobs = {"radius": radius, "power": power, "epsilon": epsilon}
        expected = plain(affinity.double(), scores.double(), **knobs)  # type: ignore[arg-type]
        found = spread(affinity.to(device), scores.to(device), **knobs)  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.cpu().double(), expected, rtol=1e-5, atol=1e-7, msg=lambda text, case=(grid, knobs): f"{case}: {text}"
        )
        assert not found.flatten(2)[1, :, grid[0] * grid[1] // 2].any()
    affinity, scores = (values.to(device) for values in draw((3, 4), 3))
    # Any strides are read as they are meant, and nothing is written to.
    strided = affinity.transpose(1, 2), scores.transpose(2, 3).contiguous().transpose(2, 3)
    before = [values.clone() for values in strided]
    expected = plain(*strided, radius=1, power=2.0, epsilon=0.1)
    torch.testing.assert_close(spread(*strided, radius=1, power=2.0, epsilon=0.1), expected)
    assert all(torch.equal(values, copy) for values, copy in zip(strided, before, strict=True))
    # Half precision: stored values are rounded, sums are not.
    low = affinity.bfloat16(), scores.bfloat16()
    rounded = spread(*low, radius=1, power=2.0, epsilon=0.1)
    assert rounded.dtype == torch.bfloat16
    exact = plain(low[0].float(), low[1].float(), radius=1, power=2.0, epsilon=0.1)
    torch.testing.assert_close(rounded.float(), exact, rtol=1e-2, atol=1e-4)
    # The power of 0, and whatever a gradient is asked of, take the plain code.
    expected = plain(affinity, scores, radius=1, power=0.0, epsilon=0.1)
    assert torch.equal(spread(affinity, scores, radius=1, power=0.0, epsilon=0.1), expected)
    spread(affinity.requires_grad_(), scores, radius=1, power=2.0, epsilon=0.1).sum().backward()
    assert affinity.grad is not None
    assert affinity.grad.isfinite().all()
    assert spread(affinity.detach()[:0], scores[:0], radius=1, power=2.0, epsilon=0.1).shape == (0, 3, 3, 4)


def test_interpreted_kernel_equals_the_plain_code() -> None:
    interpret("import test_walk_triton as t; t.check('cpu')", __file__)


@pytest.mark.gpu
def test_compiled_kernel_equals_the_plain_code() -> None:
    check("cuda")


@pytest.mark.gpu
def test_a_gpu_without_triton_takes_the_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr(kernels, "_HAS_TRITON", False)
    monkeypatch.setattr(walk_module, "take_step", lambda *given: calls.append(take_step(*given)) or calls[-1])
    affinity, scores = (values.to("cuda") for values in draw((3, 4), 3))
    assert spread(affinity, scores, radius=1, power=2.0, epsilon=0.1) is calls[0]
