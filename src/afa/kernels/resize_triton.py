"""Bilinear resizing as fused GPU kernels: maps one by one, and pyramids of channels-last levels into their sum.

Importing it needs Triton. The references are in `afa.kernels.resize`. Gradients are gathered, each result from
the few positions that it went to, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LINE = 128
"""Pixels of a row that one program resizes."""

_BLOCK_ROWS = 8
"""Rows of them."""

_GRADIENT_ROWS = 4
"""Rows whose gradient one program gathers."""

_COLUMNS = 16
"""Columns of a channels-last level that one program adds up."""

_CHANNELS = 64
"""Channels of it."""


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Fused, to contiguous maps; see `afa.kernels.resize.resize`."""
    resized: Tensor = _Resize.apply(maps, (int(size[0]), int(size[1])))
    return resized


def sum_levels(fine: Tensor, *coarse: Tensor) -> Tensor:
    """Fused for one or two coarse levels, rounded once, channels-last; see `afa.kernels.resize.sum_levels`."""
    total: Tensor = _SumLevels.apply(fine, coarse[0], coarse[1] if len(coarse) > 1 else None)
    return total


class _Resize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.shape = maps.shape
        maps = maps.contiguous()
        out = maps.new_empty(*maps.shape[:2], *size)
        if out.numel():
            _resize_kernel[_plane_grid(out, _BLOCK_ROWS)](
                maps, out, *maps.shape[2:], *size, *_scales(maps, out), ROWS=_BLOCK_ROWS, LINE=_LINE
            )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        out = grad.new_empty(ctx.shape)
        if out.numel():
            _resize_gradient_kernel[_plane_grid(out, _GRADIENT_ROWS)](
                grad,
                out,
                *out.shape[2:],
                *grad.shape[2:],
                *_scales(out, grad),
                REACH_Y=_reach(out.shape[2], grad.shape[2]),
                REACH_X=_reach(out.shape[3], grad.shape[3]),
                ROWS=_GRADIENT_ROWS,
                LINE=_LINE,
            )
        return out, None


class _SumLevels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fine: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
        ctx.sizes = (first.shape, None if second is None else second.shape)
        fine, first = (_channels_last(level) for level in (fine, first))
        third = first if second is None else _channels_last(second)
        out = torch.empty_like(fine)
        if out.numel():
            _sum_levels_kernel[_level_grid(out)](
                fine,
                first,
                third,
                out,
                *fine.shape[1:],
                *first.shape[2:],
                *third.shape[2:],
                *_scales(first, fine),
                *_scales(third, fine),
                TWO=second is not None,
                COLUMNS=_COLUMNS,
                CHANNELS=_CHANNELS,
            )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        first, second = ctx.sizes
        grad = _channels_last(grad)
        return grad, _gather_level(grad, first), None if second is None else _gather_level(grad, second)


def _gather_level(grad: Tensor, shape: torch.Size) -> Tensor:
    """Gradient of a level before it was enlarged."""
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    if out.numel():
        _level_gradient_kernel[_level_grid(out)](
            grad,
            out,
            *out.shape[1:],
            *grad.shape[2:],
            *_scales(out, grad),
            REACH_Y=_reach(out.shape[2], grad.shape[2]),
            REACH_X=_reach(out.shape[3], grad.shape[3]),
            COLUMNS=_COLUMNS,
            CHANNELS=_CHANNELS,
        )
    return out


def _channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def _scales(small: Tensor, large: Tensor) -> tuple[float, float]:
    """Positions of the input per position of the result, down and across."""
    return small.shape[2] / large.shape[2], small.shape[3] / large.shape[3]


def _reach(size: int, large: int) -> int:
    """At most how many positions in a row of the result one position of the input goes to, edges included."""
    return min(large, 2 * math.ceil(large / size) + 2)


def _plane_grid(out: Tensor, rows: int) -> tuple[int, int, int]:
    batch, planes, height, width = out.shape
    return triton.cdiv(width, _LINE), triton.cdiv(height, rows), batch * planes


def _level_grid(out: Tensor) -> tuple[int, int, int]:
    batch, channels, height, width = out.shape
    return triton.cdiv(channels, _CHANNELS), triton.cdiv(width, _COLUMNS) * height, batch


@triton.jit
def _source(position, scale, size):
    """The positions of the input before and after a position of the result, and the second one's share."""
    place = tl.minimum(tl.maximum((position.to(tl.float32) + 0.5) * scale - 0.5, 0.0), size - 1.0)
    low = place.to(tl.int32)
    return low, tl.minimum(low + 1, size - 1), place - low.to(tl.float32)


@triton.jit
def _share(position, target, scale, size):
    """Share that `target` has in a position of the result."""
    place = tl.minimum(tl.maximum((position.to(tl.float32) + 0.5) * scale - 0.5, 0.0), size - 1.0)
    return tl.maximum(1.0 - tl.abs(place - target.to(tl.float32)), 0.0)


@triton.jit
def _first(target, scale):
    """First position of the result that `target` can have a share in."""
    place = tl.floor((target.to(tl.float32) - 0.5) / scale - 0.5).to(tl.int32)
    return tl.where(target == 0, 0, tl.maximum(place, 0))


@triton.jit
def _enlarged(maps, y, x, rows, columns, scale_y, scale_x, channels, channel, inside):
    """Float32 values at these positions of the result; `channels` lie side by side, of which `channel` are read."""
    top, bottom, down = _source(y, scale_y, rows)
    left, right, across = _source(x, scale_x, columns)
    upper = tl.load(maps + (top * columns + left) * channels + channel, mask=inside, other=0).to(tl.float32)
    upper *= 1 - across
    upper += tl.load(maps + (top * columns + right) * channels + channel, mask=inside, other=0).to(tl.float32) * across
    lower = tl.load(maps + (bottom * columns + left) * channels + channel, mask=inside, other=0).to(tl.float32)
    lower *= 1 - across
    lower += (
        tl.load(maps + (bottom * columns + right) * channels + channel, mask=inside, other=0).to(tl.float32) * across
    )
    return upper * (1 - down) + lower * down


@triton.jit
def _gathered(
    grad,
    i,
    j,
    rows,
    columns,
    height,
    width,
    scale_y,
    scale_x,
    channels,
    channel,
    inside,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """(DOWN, ACROSS) float32 gradients of these positions of the input; channels as in `_enlarged`."""
    top = _first(i, scale_y)
    left = _first(j, scale_x)
    total = tl.zeros([DOWN, ACROSS], dtype=tl.float32)
    for dy in range(REACH_Y):
        y = top + dy
        line = tl.zeros([DOWN, ACROSS], dtype=tl.float32)
        for dx in tl.static_range(REACH_X):
            x = left + dx
            here = inside & (y < height) & (x < width)
            value = tl.load(grad + (y * width + x) * channels + channel, mask=here, other=0).to(tl.float32)
            line += value * _share(x, j, scale_x, columns)
        total += line * _share(y, i, scale_y, rows)
    return total


@triton.jit
def _resize_kernel(
    maps,
    out,
    rows,
    columns,
    height,
    width,
    scale_y,
    scale_x,
    ROWS: tl.constexpr,
    LINE: tl.constexpr,
):
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    x = tl.program_id(0) * LINE + tl.arange(0, LINE)[None, :]
    inside = (y < height) & (x < width)
    plane = tl.program_id(2).to(tl.int64)
    maps += plane * rows * columns
    value = _enlarged(maps, y, x, rows, columns, scale_y, scale_x, 1, 0, inside)
    tl.store(out + plane * height * width + y * width + x, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _resize_gradient_kernel(
    grad,
    out,
    rows,
    columns,
    height,
    width,
    scale_y,
    scale_x,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    ROWS: tl.constexpr,
    LINE: tl.constexpr,
):
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.program_id(0) * LINE + tl.arange(0, LINE)[None, :]
    inside = (i < rows) & (j < columns)
    plane = tl.program_id(2).to(tl.int64)
    grad += plane * height * width
    total = _gathered(
        grad, i, j, rows, columns, height, width, scale_y, scale_x, 1, 0, inside, REACH_Y, REACH_X, ROWS, LINE
    )
    tl.store(out + plane * rows * columns + i * columns + j, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_levels_kernel(
    fine,
    first,
    second,
    out,
    channels,
    height,
    width,
    first_rows,
    first_columns,
    second_rows,
    second_columns,
    first_y,
    first_x,
    second_y,
    second_x,
    TWO: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    blocks = tl.cdiv(width, COLUMNS)
    x = tl.program_id(1) % blocks * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    y = tl.program_id(1) // blocks + x * 0
    image = tl.program_id(2).to(tl.int64)
    inside = (x < width) & (channel < channels)
    place = image * height * width * channels + (y * width + x) * channels + channel
    total = tl.load(fine + place, mask=inside, other=0).to(tl.float32)
    first += image * first_rows * first_columns * channels
    total += _enlarged(first, y, x, first_rows, first_columns, first_y, first_x, channels, channel, inside)
    if TWO:
        second += image * second_rows * second_columns * channels
        total += _enlarged(second, y, x, second_rows, second_columns, second_y, second_x, channels, channel, inside)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _level_gradient_kernel(
    grad,
    out,
    channels,
    rows,
    columns,
    height,
    width,
    scale_y,
    scale_x,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    blocks = tl.cdiv(columns, COLUMNS)
    j = tl.program_id(1) % blocks * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    i = tl.program_id(1) // blocks + j * 0
    image = tl.program_id(2).to(tl.int64)
    inside = (j < columns) & (channel < channels)
    grad += image * height * width * channels
    total = _gathered(
        grad,
        i,
        j,
        rows,
        columns,
        height,
        width,
        scale_y,
        scale_x,
        channels,
        channel,
        inside,
        REACH_Y,
        REACH_X,
        COLUMNS,
        CHANNELS,
    )
    place = image * rows * columns * channels + (i * columns + j) * channels + channel
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
