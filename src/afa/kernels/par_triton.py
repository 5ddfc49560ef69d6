"""The refinement as two fused GPU kernels: the neighbors' weights, and one iteration over all score maps.

Importable only where Triton is. `afa.pseudo.par` decides when to come here; its plain code is what these kernels
are tested against. They read every pixel's neighbors through the cache instead of shifted copies: per iteration the
weights, the scores and the result cross the memory bus once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


@triton.jit
def _neighbor(offsets, n, y, x, rows, columns, width):
    """Flat position of neighbor n of each pixel; beyond the border the border pixel stands in."""
    dy = tl.load(offsets + 2 * n)
    dx = tl.load(offsets + 2 * n + 1)
    return tl.minimum(tl.maximum(y + dy, 0), rows - 1) * width + tl.minimum(tl.maximum(x + dx, 0), columns - 1)


@triton.jit
def _weights_kernel(
    image,
    offsets,
    position,
    extent,
    out,
    height,
    width,
    bandwidth,
    NEIGHBORS: tl.constexpr,
    PAMR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    area = height * width
    inside = pixel < area
    rows = tl.load(extent + 2 * batch)
    columns = tl.load(extent + 2 * batch + 1)
    y = pixel // width
    x = pixel % width
    image += batch * 3 * area
    out += batch * NEIGHBORS * area
    for channel in tl.static_range(3):
        plane = image + channel * area
        mean = tl.zeros([BLOCK], dtype=tl.float32)
        for n in range(NEIGHBORS):
            mean += tl.load(plane + _neighbor(offsets, n, y, x, rows, columns, width))
        mean /= NEIGHBORS
        variance = tl.zeros([BLOCK], dtype=tl.float32)
        for n in range(NEIGHBORS):
            difference = tl.load(plane + _neighbor(offsets, n, y, x, rows, columns, width)) - mean
            variance += difference * difference
        deviation = tl.sqrt(variance / (NEIGHBORS - 1))
        if PAMR:
            factor = -1.0 / ((1e-8 + 0.1 * deviation) * 3)
        else:
            scaled = (deviation + 1e-8) * bandwidth
            factor = -1.0 / (scaled * scaled * 3)
        center = tl.load(plane + pixel, mask=inside, other=0.0)
        for n in range(NEIGHBORS):
            difference = tl.load(plane + _neighbor(offsets, n, y, x, rows, columns, width)) - center
            distance = tl.abs(difference) if PAMR else difference * difference
            target = out + n * area + pixel
            if channel == 0:
                tl.store(target, distance * factor, mask=inside)
            else:
                tl.store(target, tl.load(target, mask=inside, other=0.0) + distance * factor, mask=inside)
    largest = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    for n in range(NEIGHBORS):
        largest = tl.maximum(largest, tl.load(out + n * area + pixel, mask=inside, other=0.0))
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for n in range(NEIGHBORS):
        total += tl.exp(tl.load(out + n * area + pixel, mask=inside, other=0.0) - largest)
    for n in range(NEIGHBORS):
        target = out + n * area + pixel
        weight = tl.exp(tl.load(target, mask=inside, other=0.0) - largest) / total + tl.load(position + n)
        tl.store(target, weight, mask=inside)


@triton.jit
def _iteration_kernel(
    scores,
    weights,
    offsets,
    extent,
    out,
    height,
    width,
    CHANNELS: tl.constexpr,
    NEIGHBORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    area = height * width
    inside = pixel < area
    rows = tl.load(extent + 2 * batch)
    columns = tl.load(extent + 2 * batch + 1)
    y = pixel // width
    x = pixel % width
    weights += batch * NEIGHBORS * area + pixel
    # Channels side by side in memory: all scores of a neighbor are one read.
    channel = tl.arange(0, CHANNELS)[None, :]
    scores += batch * area * CHANNELS
    refined = tl.zeros([BLOCK, CHANNELS], dtype=tl.float32)
    for n in range(NEIGHBORS):
        place = _neighbor(offsets, n, y, x, rows, columns, width)
        weight = tl.load(weights + n * area, mask=inside, other=0.0)
        refined += weight[:, None] * tl.load(scores + place[:, None] * CHANNELS + channel)
    tl.store(out + (batch * area + pixel[:, None]) * CHANNELS + channel, refined, mask=inside[:, None])


def kernel_weights(
    image: Tensor, offsets: Tensor, position: Tensor, extent: Tensor, *, bandwidth: float, pamr: bool
) -> Tensor:
    """Weights of each pixel's neighbors.

    Args:
        image: (B, 3, H, W) float32 RGB in [0, 1], contiguous.
        offsets: (n, 2) int32 (dy, dx), pixels.
        position: (n,) float32 added to every pixel's weights: the position term, or zeros.
        extent: (B, 2) int32 rows and columns, from the top left, that hold the image; neighbors stay within.
        bandwidth: w1.
        pamr: The color term of PAMR instead of PAR's.

    Returns:
        (B, n, H, W) float32; without meaning outside the extent.
    """
    batch, _, height, width = image.shape
    out = image.new_empty(batch, offsets.shape[0], height, width)
    _weights_kernel[(triton.cdiv(height * width, _BLOCK), batch)](
        image.contiguous(),
        offsets,
        position,
        extent,
        out,
        height,
        width,
        bandwidth,
        NEIGHBORS=offsets.shape[0],
        PAMR=pamr,
        BLOCK=_BLOCK,
    )
    return out


def iterate(scores: Tensor, weights: Tensor, offsets: Tensor, extent: Tensor, *, iterations: int) -> Tensor:
    """Replace scores by their neighbors' weighted sum, `iterations` times.

    Args:
        scores: (B, P, H, W) float32.
        weights: (B, n, H, W) of `kernel_weights`.
        offsets: (n, 2) int32.
        extent: (B, 2) int32.
        iterations: How often.

    Returns:
        (B, P, H, W).
    """
    batch, channels, height, width = scores.shape
    padded = triton.next_power_of_2(channels)
    current = scores.new_zeros(batch, height, width, padded)
    current[..., :channels] = scores.permute(0, 2, 3, 1)
    spare = torch.empty_like(current)
    for _ in range(iterations):
        _iteration_kernel[(triton.cdiv(height * width, _BLOCK), batch)](
            current,
            weights,
            offsets,
            extent,
            spare,
            height,
            width,
            CHANNELS=padded,
            NEIGHBORS=offsets.shape[0],
            BLOCK=_BLOCK,
        )
        current, spare = spare, current
    return current[..., :channels].permute(0, 3, 1, 2).contiguous()
