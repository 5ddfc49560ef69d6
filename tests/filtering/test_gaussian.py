"""The exact filter against sums over all pairs in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from afa.errors import AfaError
from afa.filtering.gaussian import FilterMethod, gaussian_filter
from tensors import gaussian_pairs, uniform, worst


def image_features(*, xy: float, rgb: float, batch: int = 2, side: int = 24) -> Tensor:
    """Positions and colors of smooth and noisy images, 0..255, divided by bandwidths."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(batch, 3, 3, 3, generator=generator)
    color = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    color = 250 * color + 5 * torch.rand(color.shape, generator=generator)
    position = torch.cartesian_prod(torch.arange(float(side)), torch.arange(float(side))).expand(batch, -1, -1)
    return torch.cat([position / xy, color.flatten(2).transpose(1, 2) / rgb], 2)


def values(features: Tensor, channels: int) -> Tensor:
    return uniform(*features.shape[:2], channels, seed=4)


BANDWIDTHS = [(3.0, 1e9), (64.0, 5.0), (50.0, 15.0), (4.0, 2.0), (1e6, 1e6)]


@pytest.mark.parametrize(("xy", "rgb"), BANDWIDTHS)
def test_exact_sum_agrees_with_all_pairs(xy: float, rgb: float) -> None:
    """Relative error below 1e-5 in single precision, at the bandwidths of the CRF and of the energy loss too."""
    features = image_features(xy=xy, rgb=rgb)
    inputs = values(features, 5)
    expected = gaussian_pairs(features) @ inputs.double()
    assert worst(gaussian_filter(features, inputs, method="exact"), expected) < 1e-5
    assert worst(gaussian_filter(features + 1000, inputs, method="exact"), expected) < 1e-2  # as rounded by the sum
    precise = gaussian_filter(features.double(), inputs.double(), method="exact")
    # An exponent is a difference of terms as large as this; how much of their rounding is left depends on the machine.
    largest = float(features.double().square().sum(2).max()) / 2
    assert worst(precise, expected) < max(1e-12, torch.finfo(torch.float64).eps * largest)


@pytest.mark.parametrize(("xy", "rgb"), BANDWIDTHS)
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e7])
def test_half_precision_is_good_to_a_few_thousandths(xy: float, rgb: float, size: float) -> None:
    features = image_features(xy=xy, rgb=rgb)
    inputs = size * values(features, 5)
    expected = gaussian_pairs(features) @ inputs.double()
    assert worst(gaussian_filter(features, inputs, method="exact_half"), expected) < 3e-3


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_any_number_of_features_and_channels(dim: int) -> None:
    features = torch.randn(1, 50, dim, generator=torch.Generator().manual_seed(0))
    inputs = values(features, 300)
    found = gaussian_filter(features, inputs, method="exact")
    assert worst(found, gaussian_pairs(features) @ inputs.double()) < 1e-5


def test_far_points_keep_to_themselves() -> None:
    features = 40 * torch.arange(6.0).view(1, 6, 1)
    inputs = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gaussian_filter(features, inputs, method="exact"), inputs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_derivative_agrees_with_finite_differences(method: FilterMethod) -> None:
    features = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = values(features, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: gaussian_filter(features, rows, method=method), (inputs,))


def test_pairs_are_never_stored() -> None:
    count = 3000
    features = torch.rand(1, count, 5, generator=torch.Generator().manual_seed(0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        gaussian_filter(features, features, method="exact")
    largest = max(event.self_cpu_memory_usage for event in record.key_averages())
    assert 0 < largest < count**2


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_features_that_are_not_finite_are_told(method: FilterMethod) -> None:
    features = torch.full((1, 4, 2), math.nan)
    with pytest.raises(AfaError, match=r"features .*not finite"):
        gaussian_filter(features, torch.ones(1, 4, 1), method=method)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["exact", "exact_half"])
def test_gpu_agrees_with_all_pairs(method: FilterMethod) -> None:
    features = image_features(xy=50.0, rgb=15.0)
    inputs = values(features, 21)
    filtered = gaussian_filter(features.cuda(), inputs.cuda(), method=method).cpu()
    assert worst(filtered, gaussian_pairs(features) @ inputs.double()) < (1e-4 if method == "exact" else 5e-3)
