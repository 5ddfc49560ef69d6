"""The random walk over the affinity as one fused GPU kernel that reads only the pairs within the radius.

Importing it needs Triton. The reference is in `afa.kernels.walk`: it passes over all pairs of tokens several
times, although at radius 8 a token takes scores from at most 289 tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 16
"""Neighboring tokens of a row for which one program takes the step."""

_COLUMNS = 32
"""Tokens of a row that a program reads at once: at radius 8 all from which its tokens take scores."""

_MAX_CHANNELS = 16
"""Score maps that one program reads."""

_SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _step_kernel(
    affinity,
    scores,
    out,
    height,
    width,
    channels,
    radius,
    power,
    epsilon,
    SQUARE: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    blocks = tl.cdiv(width, TOKENS)
    y = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * TOKENS
    batch = tl.program_id(2).to(tl.int64)
    area = height * width
    x = first + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    affinity += batch * area * area + y * width
    scores += batch * channels * area
    out += batch * channels * area
    # Sums stay separate by column and are added up at the end, so that threads need not synchronize before.
    summed = tl.zeros([CHANNELS, COLUMNS, TOKENS], dtype=tl.float32)
    degree = tl.zeros([COLUMNS, TOKENS], dtype=tl.float32)
    left = tl.maximum(first - radius, 0)
    right = tl.minimum(first + TOKENS + radius, width)
    for row in range(tl.maximum(y - radius, 0), tl.minimum(y + radius + 1, height)):
        for start in range(left, right, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < width
            near = inside[:, None] & (x < width)[None, :] & (tl.abs(column[:, None] - x[None, :]) <= radius)
            source = row * width + column
            pair = source[:, None].to(tl.int64) * area + x[None, :]
            weight = tl.load(affinity + pair, mask=near, other=0).to(tl.float32)
            # log2(0) is -inf, and exp2(-inf) is 0 again.
            weight = weight * weight if SQUARE else tl.exp2(power * tl.log2(weight))
            degree += weight
            known = (channel < channels)[:, None] & inside[None, :]
            score = tl.load(scores + channel[:, None] * area + source[None, :], mask=known, other=0).to(tl.float32)
            summed += score[:, :, None] * weight[None, :, :]
    # A token without affinity to any other takes nothing.
    total = tl.maximum(tl.sum(degree, 0) + epsilon, _SMALLEST)
    taken = tl.sum(summed, 1) / total[None, :]
    written = (channel < channels)[:, None] & (x < width)[None, :]
    tl.store(out + channel[:, None] * area + y * width + x[None, :], taken.to(out.dtype.element_ty), mask=written)


def spread(affinity: Tensor, scores: Tensor, *, radius: int, power: float, epsilon: float) -> Tensor:
    """Let each token take its scores from the tokens near it, by their affinity; without gradient.

    Args:
        affinity: (B, hw, hw) non-negative, float32 or half precision.
        scores: (B, P, h, w) float32 or half precision.
        radius: Largest Chebyshev distance of a pair, tokens; not negative.
        power: Exponent of the affinity, above 0.
        epsilon: Added to each degree.

    Returns:
        (B, P, h, w) of the scores' dtype; sums are taken in float32.
    """
    batch, channels, height, width = scores.shape
    assert affinity.shape == (batch, height * width, height * width), (affinity.shape, scores.shape)
    assert power > 0, power
    scores = scores.contiguous()
    out = torch.empty_like(scores)  # (B, P, h, w)
    if out.numel():
        block = min(_MAX_CHANNELS, triton.next_power_of_2(channels))
        _step_kernel[(height * triton.cdiv(width, _TOKENS), triton.cdiv(channels, block), batch)](
            affinity.contiguous(),
            scores,
            out,
            height,
            width,
            channels,
            radius,
            float(power),
            float(epsilon),
            SQUARE=power == 2,
            CHANNELS=block,
            COLUMNS=_COLUMNS,
            TOKENS=_TOKENS,
        )
    return out
