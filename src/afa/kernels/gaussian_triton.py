"""The exact Gaussian filter as one fused GPU kernel: sums over all pairs of points, none of which is stored.

Importing it needs Triton. The reference, `afa.kernels.gaussian`, is fused attention. Attention normalizes, so it
keeps a running maximum. The exponents of the Gaussian filter exceed 0 by rounding alone, so this kernel takes the sum
as it stands, and a pair costs little more than its exponential.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_POINTS = 128
"""Points for which one program takes the sums."""

_KEYS = 64
"""Points that it reads at once."""

_WARPS = 4
_STAGES = 3
_LEAST = 16  # the smallest side of a matrix product
_WIDEST_VALUE = 64


def sum_pairs(query: Tensor, key: Tensor, values: Tensor, *, scale: Tensor, count: Tensor | None = None) -> Tensor:
    """Sum values over all points; see `afa.kernels.gaussian.sum_pairs`. The GPU is not synchronized.

    Args:
        query: (B, N, D) float16, D at most 64 so that it fits the shared memory of common GPUs.
        key: (B, N, D) float16. No product of a query and a key may exceed log 65504, the largest of half precision.
        values: (B, N, V) floating; rounded to float16.
        scale: Factor of the sums, a scalar.
        count: (B,) integer; below 0 it counts as 0, above N as N. None: all N.

    Returns:
        (B, N, V) float32: scale * sum_{j < count} exp(q_i . k_j) v_j for i < count, 0 for others. Weights are rounded
        to float16, sums are taken in float32.
    """
    parts = torch.split(values, _WIDEST_VALUE, 2)
    return torch.cat([_sum_part(query, key, part, count) * scale for part in parts], 2)


def _sum_part(query: Tensor, key: Tensor, values: Tensor, count: Tensor | None) -> Tensor:
    """(B, N, V) float32 sums, not scaled, of at most 64 channels of values."""
    batch, points = query.shape[:2]
    assert query.dtype == key.dtype == torch.float16, (query.dtype, key.dtype)
    assert key.shape == query.shape, (key.shape, query.shape)
    assert values.shape[:2] == query.shape[:2], (values.shape, query.shape)
    assert max(query.shape[2], values.shape[2]) <= 64, (query.shape, values.shape)
    assert count is None or count.shape == (batch,), count.shape
    query, key, padded = _padded(query), _padded(key), _padded(values)
    out = torch.empty_like(padded, dtype=torch.float32)
    if batch and points:
        _sum_kernel[(triton.cdiv(points, _POINTS), batch)](
            query,
            key,
            padded,
            query if count is None else count.contiguous(),
            out,
            points,
            COUNTED=count is not None,
            DIM=query.shape[2],
            CHANNELS=padded.shape[2],
            POINTS=_POINTS,
            KEYS=_KEYS,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
    return out[..., : values.shape[2]]


def _padded(rows: Tensor) -> Tensor:
    """Rows in float16, contiguous, with zeros up to a power of 2: (B, N, D) -> (B, N, width)."""
    width = max(_LEAST, triton.next_power_of_2(rows.shape[2]))
    padded = rows.new_zeros(*rows.shape[:2], width, dtype=torch.float16)
    padded[..., : rows.shape[2]] = rows
    return padded


@triton.jit
def _add(sums, q, k, v):
    """Add the values of some keys to the sums."""
    weight = tl.exp2(1.4426950408889634 * tl.dot(q, tl.trans(k)))
    return tl.dot(weight.to(tl.float16), v, sums)


@triton.jit
def _sum_kernel(
    query,
    key,
    values,
    count,
    out,
    points,
    COUNTED: tl.constexpr,
    DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    POINTS: tl.constexpr,
    KEYS: tl.constexpr,
):
    first = tl.program_id(0) * POINTS
    image = tl.program_id(1).to(tl.int64)
    query += image * points * DIM
    key += image * points * DIM
    values += image * points * CHANNELS
    out += image * points * CHANNELS
    limit = points
    if COUNTED:
        limit = tl.minimum(tl.maximum(tl.load(count + image), 0), points).to(tl.int32)
    point = first + tl.arange(0, POINTS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    sums = tl.zeros([POINTS, CHANNELS], dtype=tl.float32)
    if first < limit:
        place = tl.arange(0, DIM)[None, :]
        q = tl.load(query + point * DIM + place, mask=point < limit, other=0)
        other = tl.arange(0, KEYS)[:, None]
        whole = limit // KEYS * KEYS
        for start in range(0, whole, KEYS):
            k = tl.load(key + (start + other) * DIM + place)
            v = tl.load(values + (start + other) * CHANNELS + channel)
            sums = _add(sums, q, k, v)
        if whole < limit:
            # A row of zeros has weight 1, and adds nothing.
            other += whole
            k = tl.load(key + other * DIM + place, mask=other < limit, other=0)
            v = tl.load(values + other * CHANNELS + channel, mask=other < limit, other=0)
            sums = _add(sums, q, k, v)
    tl.store(out + point * CHANNELS + channel, tl.where(point < limit, sums, 0), mask=point < points)
