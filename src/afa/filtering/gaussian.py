"""Gaussian filter over points with any number of features: the sum over all pairs, exact or on a lattice.

With the Gaussian written as exp(s_ij), s_ij = -|f_i - f_j|^2 / 2 is the product of a query and a key. So the exact sum
is attention without its normalization: `afa.kernels.gaussian`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from afa.errors import AfaError
from afa.filtering.lattice import PermutohedralLattice
from afa.kernels.dispatch import fused
from afa.kernels.gaussian import sum_pairs

FilterMethod = Literal["exact", "exact_half", "lattice"]
"""How to filter: `exact` in the values' precision; `exact_half`, for GPUs, with half-precision products; `lattice`, the
approximation of `PermutohedralLattice`."""


def gaussian_filter(
    features: Tensor,
    values: Tensor,
    *,
    method: FilterMethod,
    inside: Tensor | None = None,
    reach: float | None = None,
) -> Tensor:
    """Sum values over all points, weighted by how near they are.

    Differentiable in the values, not in the features.

    Args:
        features: (B, N, F), divided by their bandwidths.
        values: (B, N, V), floating.
        method: See `FilterMethod`.
        inside: (B, N) bool, the points that take part. The values of the others count as 0, but their features must be
            finite too; where the fused kernel serves they cost next to no time. None: all N.
        reach: Largest distance of a point from the mean of the batch's points, if that is known. The exact sum then
            assumes that the features are finite, and does not synchronize the GPU to check them.

    Returns:
        (B, N, V): sum_j exp(-|f_i - f_j|^2 / 2) v_j, point i itself included; 0 for points that take no part.

    Raises:
        AfaError: The features are not finite, or too far apart for the lattice.

    >>> features = torch.tensor([[[0.0], [1.0], [9.0]]])
    >>> gaussian_filter(features, torch.ones(1, 3, 1), method="exact").flatten()
    tensor([1.6065, 1.6065, 1.0000])
    """
    assert features.shape[:2] == values.shape[:2], (features.shape, values.shape)
    outside = None if inside is None else ~inside[..., None]  # (B, N, 1)
    if outside is not None:
        values = values.masked_fill(outside, 0)
    if method == "lattice":
        filtered = PermutohedralLattice(features).filter(values)
    else:
        half = method == "exact_half"
        filtered = _Exact.apply(values, features.detach(), inside, half, reach)  # type: ignore[no-untyped-call]
    return filtered if outside is None else filtered.masked_fill(outside, 0)


class _Exact(torch.autograd.Function):
    """The sum over all pairs, which is its own derivative because the Gaussian is symmetric."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, features: Tensor, inside: Tensor | None, half: bool, reach: float | None
    ) -> Tensor:
        ctx.save_for_backward(features, inside)
        ctx.half, ctx.reach = half, reach
        with torch.autocast(values.device.type, enabled=False):
            if inside is None or not half or not fused(values.device):
                return _sum_pairs(features, values, half=half, reach=reach)
            # The fused kernel reads the first `count` points alone, so the points inside move to the front, in their
            # order. Shapes depend on no value: the GPU is not synchronized.
            count = inside.sum(1)  # (B,)
            place = torch.where(inside, inside.cumsum(1) - 1, count[:, None] + (~inside).cumsum(1) - 1)[..., None]
            to_features, to_rows = place.expand_as(features), place.expand_as(values)  # (B, N, F), (B, N, V)
            moved = torch.empty_like(features).scatter_(1, to_features, features)
            rows = torch.empty_like(values).scatter_(1, to_rows, values)
            return _sum_pairs(moved, rows, half=half, reach=reach, count=count).gather(1, to_rows)  # (B, N, V)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        features, inside = ctx.saved_tensors
        filtered = _Exact.apply(grads[0], features, inside, ctx.half, ctx.reach)  # type: ignore[no-untyped-call]
        return filtered, None, None, None, None


def _sum_pairs(
    features: Tensor, values: Tensor, *, half: bool, reach: float | None, count: Tensor | None = None
) -> Tensor:
    """(B, N, V) sums over all pairs; `count` as in `afa.kernels.gaussian.sum_pairs`."""
    precision = values.dtype if values.dtype == torch.float64 else torch.float32
    query, key = _query_and_key(features.to(precision), torch.float16 if half else precision, reach)
    largest = values.abs().amax().clamp(min=torch.finfo(precision).tiny).to(precision)
    return sum_pairs(query, key, values.to(precision) / largest, scale=largest, count=count).to(values.dtype)


def _query_and_key(features: Tensor, dtype: torch.dtype, reach: float | None) -> tuple[Tensor, Tensor]:
    """Write -|f_i - f_j|^2 / 2 as a product of rows, in a way that keeps it precise.

    Large terms cancel for near points. So each feature is split into a whole multiple of a step and a small rest. All
    products and sums of the multiples are exact with 11 bits for factors and 24 for sums. The large terms come first,
    and cancel before the small ones are added.

    Args:
        features: (B, N, F) float32 or float64.
        dtype: Of the result.
        reach: Bound of the distances from the mean; None measures them, which synchronizes the GPU.

    Returns:
        Query and key, (B, N, 4 F + 8).
    """
    centered = features - features.mean((0, 1))
    dim = features.shape[2]
    # |multiple|^2 stays below 2^22 for all features together, each multiple below 2^11.
    if reach is None:
        reach = float(centered.square().sum(2).amax().sqrt())
    if not math.isfinite(reach):
        raise AfaError("features of the Gaussian filter are not finite; check the image and the bandwidths")
    step = 2.0 ** max(math.ceil(math.log2(max(reach, 1e-30) / (2**11 - dim))), -8)
    multiple = (centered / step).round()
    main = multiple * step
    rest = (centered - main).to(dtype).to(features.dtype)
    norm = multiple.square().sum(2, keepdim=True)  # (B, N, 1), a whole number
    upper = (norm / 2**11).round()
    lower = norm - upper * 2**11
    small = (main * rest).sum(2, keepdim=True) + rest.square().sum(2, keepdim=True) / 2  # (B, N, 1)
    small_upper = small.to(dtype).to(features.dtype)
    ones = torch.ones_like(norm)
    coarse, fine = -(2**11) * step**2 / 2 * ones, -(step**2) / 2 * ones
    minus = (-small_upper, small_upper - small)
    query = [main, coarse, fine, upper, lower, main, rest, rest, ones, ones, *minus]
    key = [main, upper, lower, coarse, fine, rest, main, rest, *minus, ones, ones]
    assert sum(part.shape[2] for part in query) == 4 * dim + 8
    return torch.cat(query, 2).to(dtype), torch.cat(key, 2).to(dtype)  # (B, N, 4 F + 8) each
