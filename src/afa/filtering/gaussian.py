"""Gaussian filter over points with any number of features: the sum over all pairs, exact or on a lattice.

The exact sum is attention. With the kernel written as exp(s_ij), s_ij = -|f_i - f_j|^2 / 2 is the product of a query
and a key, and fused attention gives sum_j exp(s_ij) v_j / sum_j exp(s_ij) without storing a pair. In half precision on
a GPU a kernel of our own (`gaussian_triton`) leaves the normalization out.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from afa.errors import AfaError
from afa.filtering.lattice import PermutohedralLattice
from afa.kernels.dispatch import fused

FilterMethod = Literal["auto", "exact", "exact_half", "lattice"]
"""How to filter: `exact` in the values' precision; `exact_half`, for GPUs, with half-precision products; `lattice`, the
approximation of `PermutohedralLattice`; `auto`, exact for few points and the lattice for many."""

_EXACT_POINTS = {"cpu": 4096, "cuda": 32768}
_LARGEST_HEAD = 256  # of fused attention
_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]  # the third one would store all pairs
_WIDEST_KEY, _WIDEST_VALUE = 64, 64  # of `gaussian_triton`


def gaussian_filter(
    features: Tensor,
    values: Tensor,
    *,
    method: FilterMethod = "auto",
    normalize: bool = False,
    reach: float | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Sum values over all points, weighted by how near they are.

    Differentiable in the values, not in the features.

    Args:
        features: (B, N, F), divided by their bandwidths.
        values: (B, N, V), floating.
        method: See `FilterMethod`. `auto` is exact up to 4,096 points on a CPU and 32,768 on a GPU.
        normalize: Divide by the sum of the weights.
        reach: No point is farther than this from the mean of the batch's points, if that is known: the exact sum then
            waits for no device, and takes the features to be finite.
        count: (B,) integer: only the first `count` points of each image take part. Others count as value 0 whatever
            theirs is, though their features must be finite too. They cost next to no time where `gaussian_triton`
            serves. None: all N.

    Returns:
        (B, N, V): sum_j exp(-|f_i - f_j|^2 / 2) v_j, point i itself included; 0 for points that take no part.

    Raises:
        AfaError: The features are not finite, or too far apart for the lattice.

    >>> features = torch.tensor([[[0.0], [1.0], [9.0]]])
    >>> gaussian_filter(features, torch.ones(1, 3, 1)).flatten()
    tensor([1.6065, 1.6065, 1.0000])
    """
    assert features.shape[:2] == values.shape[:2], (features.shape, values.shape)
    absent = None
    if count is not None:
        assert count.shape == features.shape[:1], (count.shape, features.shape)
        absent = (torch.arange(features.shape[1], device=count.device) >= count[:, None])[..., None]
    if normalize:
        ones = values.new_ones(*values.shape[:2], 1)
        sums = gaussian_filter(features, torch.cat([values, ones], 2), method=method, reach=reach, count=count)
        weights = sums[..., -1:]
        return sums[..., :-1] / (weights if absent is None else weights.masked_fill(absent, 1))
    if absent is not None:
        values = values.masked_fill(absent, 0)
    if method == "auto":
        method = "exact" if features.shape[1] <= _EXACT_POINTS.get(features.device.type, 4096) else "lattice"
    if method == "lattice":
        filtered = PermutohedralLattice(features).filter(values)
    else:
        half = method == "exact_half"
        filtered = _Exact.apply(values, features.detach(), half, reach, count)  # type: ignore[no-untyped-call]
    return filtered if absent is None else filtered.masked_fill(absent, 0)


class _Exact(torch.autograd.Function):
    """The sum over all pairs, its own derivative since the kernel is symmetric."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, features: Tensor, half: bool, reach: float | None, count: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(features, count)
        ctx.half, ctx.reach = half, reach
        with torch.autocast(values.device.type, enabled=False):
            return _sum_pairs(features, values, half=half, reach=reach, count=count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        features, count = ctx.saved_tensors
        filtered = _Exact.apply(grads[0], features, ctx.half, ctx.reach, count)  # type: ignore[no-untyped-call]
        return filtered, None, None, None, None


def _sum_pairs(features: Tensor, values: Tensor, *, half: bool, reach: float | None, count: Tensor | None) -> Tensor:
    """(B, N, V) sums, by our own kernel or by fused attention, which sums over all points whatever the count is.

    Attention divides by the sum of the weights of all keys. One more key, of weight exp(0) = 1 for every query, with
    a value channel of its own, tells that sum: dividing by that channel undoes the division.
    """
    precision = values.dtype if values.dtype == torch.float64 else torch.float32
    query, key = _query_and_key(features.to(precision), torch.float16 if half else precision, reach)
    # Half precision has few exponents: values are scaled to 1.
    largest = values.abs().amax().clamp(min=torch.finfo(precision).tiny).to(precision)
    scaled = values.to(precision) / largest
    filtered = []
    if half and _has_kernel(values.device) and query.shape[2] <= _WIDEST_KEY:
        from afa.kernels.gaussian_triton import sum_pairs

        for part in torch.split(scaled, _WIDEST_VALUE, 2):
            filtered.append(sum_pairs(query, key, part, count) * largest)
        return torch.cat(filtered, 2).to(values.dtype)
    key = pad(key, (0, 0, 0, 1))
    level = 2.0 ** round(math.log2(values.shape[1] + 1) / 2)  # for the extra channel the middle of the range
    for part in torch.split(scaled, _LARGEST_HEAD - 1, 2):
        value = pad(part, (0, 1, 0, 1))
        value[:, -1, -1] = level
        width = value.shape[2]
        size = math.ceil(max(width, query.shape[2]) / 8) * 8  # fused kernels want one size, a multiple of 8
        q, k, v = (pad(rows.to(query.dtype), (0, size - rows.shape[2]))[:, None] for rows in (query, key, value))
        with sdpa_kernel(_FUSED):
            attended = scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0, :, :width].to(precision)
        filtered.append(attended[..., :-1] * (level * largest) / attended[..., -1:])
    return torch.cat(filtered, 2).to(values.dtype)


def _has_kernel(device: torch.device) -> bool:
    """Whether `gaussian_triton` runs there; Triton has no tensor cores for GPUs before Ampere, which makes it slow."""
    return fused(device) and (device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0))


def _query_and_key(features: Tensor, dtype: torch.dtype, reach: float | None) -> tuple[Tensor, Tensor]:
    """Write -|f_i - f_j|^2 / 2 as a product of rows, in a way that keeps it precise.

    Large terms cancel for near points. So features are split into whole multiples of a step, of which all products and
    sums are exact in 11 bits for factors and 24 for sums, and a small rest. The large terms come first, and cancel
    before the small ones are added.

    Args:
        features: (B, N, F) float32 or float64.
        dtype: Of the result.
        reach: Bound of the distances from the mean; None looks.

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
    norm = multiple.square().sum(2, keepdim=True)  # of the multiples, a whole number
    upper = (norm / 2**11).round()
    lower = norm - upper * 2**11
    small = (main * rest).sum(2, keepdim=True) + rest.square().sum(2, keepdim=True) / 2
    small_upper = small.to(dtype).to(features.dtype)
    ones = torch.ones_like(norm)
    coarse, fine = -(2**11) * step**2 / 2 * ones, -(step**2) / 2 * ones
    minus = (-small_upper, small_upper - small)
    query = [main, coarse, fine, upper, lower, main, rest, rest, ones, ones, *minus]
    key = [main, upper, lower, coarse, fine, rest, main, rest, *minus, ones, ones]
    assert sum(part.shape[2] for part in query) == 4 * dim + 8
    return torch.cat(query, 2).to(dtype), torch.cat(key, 2).to(dtype)
