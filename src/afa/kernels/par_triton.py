"""The refinement as two fused GPU kernels: the neighbors' weights, and one iteration over all score maps.

Importing it needs Triton. The references are in `afa.kernels.par`. These kernels read the neighbors of a pixel
through the cache instead of shifted copies: in an iteration the weights, the scores and the result cross the memory bus
once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from afa.kernels.par import RefinementKind, neighbor_offsets, position_weights

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


def refinement_kernel(
    image: Tensor,
    *,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    rgb_bandwidth: float = 0.3,
    pos_bandwidth: float = 0.3,
    pos_weight: float = 0.01,
    kind: RefinementKind = "par",
    extent: Tensor | None = None,
) -> Tensor:
    """Weights of each pixel's neighbors; see `afa.kernels.par.refinement_kernel`, here for float32 images alone."""
    batch, _, height, width = image.shape
    offsets = _offset_table(tuple(dilations), image.device)
    if kind == "par":
        position = position_weights(tuple(dilations), pos_bandwidth, image.device) * pos_weight  # (n,)
    else:
        position = torch.zeros(offsets.shape[0], device=image.device)  # (n,)
    out = image.new_empty(batch, offsets.shape[0], height, width)  # (B, n, H, W)
    _weights_kernel[(triton.cdiv(height * width, _BLOCK), batch)](
        image.contiguous(),
        offsets,
        position,
        _bounds(extent, image),
        out,
        height,
        width,
        rgb_bandwidth,
        NEIGHBORS=offsets.shape[0],
        PAMR=kind == "pamr",
        BLOCK=_BLOCK,
    )
    return out


def refine(
    scores: Tensor, kernel: Tensor, *, dilations: Sequence[int], iterations: int, extent: Tensor | None = None
) -> Tensor:
    """Replace scores by their neighbors' weighted sum, `iterations` times; see `afa.kernels.par.refine`."""
    assert scores.shape[2:] == kernel.shape[2:], (scores.shape, kernel.shape)
    batch, channels, height, width = scores.shape
    offsets, bounds = _offset_table(tuple(dilations), scores.device), _bounds(extent, scores)
    padded = triton.next_power_of_2(channels)
    current = scores.new_zeros(batch, height, width, padded)  # (B, H, W, P up to a power of 2)
    current[..., :channels] = scores.permute(0, 2, 3, 1)  # (B, H, W, P)
    spare = torch.empty_like(current)
    for _ in range(iterations):
        _iteration_kernel[(triton.cdiv(height * width, _BLOCK), batch)](
            current,
            kernel,
            offsets,
            bounds,
            spare,
            height,
            width,
            CHANNELS=padded,
            NEIGHBORS=offsets.shape[0],
            BLOCK=_BLOCK,
        )
        current, spare = spare, current
    return current[..., :channels].permute(0, 3, 1, 2).contiguous()  # (B, P, H, W)


@functools.lru_cache(maxsize=32)
def _offset_table(dilations: tuple[int, ...], device: torch.device) -> Tensor:
    """(n, 2) int32 (dy, dx), pixels."""
    return torch.tensor(neighbor_offsets(dilations), dtype=torch.int32, device=device)


def _bounds(extent: Tensor | None, maps: Tensor) -> Tensor:
    """(B, 2) int32 rows and columns that hold each image, made without a copy from the host."""
    if extent is not None:
        return extent.to(torch.int32)
    bounds = torch.full((len(maps), 2), maps.shape[2], dtype=torch.int32, device=maps.device)
    bounds[:, 1] = maps.shape[3]
    return bounds
