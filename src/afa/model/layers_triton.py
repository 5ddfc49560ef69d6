"""Layer norm, and MiT's depthwise convolution with GELU, as fused GPU kernels over tokens.

Importable only where Triton is. `afa.model.layers` decides when to come here; its plain layers are what these kernels
are tested against. All of them are bound by memory: PyTorch gives every row of a layer norm a thread block of its own,
which leaves most threads idle at MiT's 64 channels, and runs the convolution and GELU as two passes over its widest
maps. Sums are taken in float32 whatever the tokens are stored in.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 2048
"""Elements of a layer norm that one program holds."""

_TILE = 8
"""Side of the square of pixels that one program convolves."""

_MAX_CHANNELS = 64
"""Channels of such a square."""

_STRIP = 4
"""Squares, one below the other, over which one program sums a weight's gradient."""


def layer_norm(tokens: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Normalize over the last dimension, with gradient.

    Args:
        tokens: (..., C).
        weight: (C,).
        bias: (C,) or None.
        eps: Added to the variance.
        dtype: Of the result.

    Returns:
        (..., C).
    """
    normalized: Tensor = _LayerNorm.apply(tokens, weight, bias, eps, dtype)  # type: ignore[no-untyped-call]
    return normalized


def depthwise_gelu(tokens: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
    """Convolve each channel of an image of tokens with its own 3x3 weights, zeros around it, then GELU; with gradient.

    Args:
        tokens: (B, H * W, C).
        weight: (C, 1, 3, 3).
        bias: (C,) or None.
        height: H.
        width: W.

    Returns:
        (B, H * W, C).
    """
    assert tokens.shape[1] == height * width, (tokens.shape, height, width)
    assert weight.shape == (tokens.shape[2], 1, 3, 3), weight.shape
    if not torch.is_grad_enabled():
        tokens = tokens.contiguous()
        activated = torch.empty_like(tokens)
        _convolve(tokens, weight, bias, height, width, activated=activated)
        return activated
    result: Tensor = _DepthwiseGelu.apply(tokens, weight, bias, height, width)  # type: ignore[no-untyped-call]
    return result


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        tokens = tokens.contiguous()
        ctx.save_for_backward(tokens, weight)
        ctx.eps = eps
        channels = tokens.shape[-1]
        rows = tokens.numel() // channels
        out = torch.empty_like(tokens, dtype=dtype)
        padded, block = _norm_blocks(channels)
        if rows:
            _norm_kernel[(triton.cdiv(rows, block),)](
                tokens,
                weight,
                weight if bias is None else bias,
                out,
                rows,
                eps,
                CHANNELS=channels,
                BIAS=bias is not None,
                PADDED=padded,
                ROWS=block,
            )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        tokens, weight = ctx.saved_tensors
        grad = grad.contiguous()
        channels = tokens.shape[-1]
        rows = tokens.numel() // channels
        padded, block = _norm_blocks(channels)
        programs = triton.cdiv(rows, block)
        wanted = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        partial = grad.new_empty(2, programs, channels, dtype=torch.float32) if wanted else grad
        out = torch.empty_like(tokens)
        if rows:
            _norm_backward_kernel[(programs,)](
                tokens,
                grad,
                weight,
                out,
                partial,
                rows,
                ctx.eps,
                CHANNELS=channels,
                WEIGHTS=wanted,
                PADDED=padded,
                ROWS=block,
            )
        if not wanted:
            return out, None, None, None, None
        sums = partial.sum(1)
        return (
            out,
            sums[0].to(weight.dtype) if ctx.needs_input_grad[1] else None,
            sums[1].to(weight.dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


class _DepthwiseGelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int
    ) -> Tensor:
        tokens = tokens.contiguous()
        out = torch.empty_like(tokens)
        convolved = torch.empty_like(tokens)
        _convolve(tokens, weight, bias, height, width, convolved=convolved, activated=out)
        ctx.save_for_backward(tokens, weight, convolved)
        ctx.size = (height, width)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        tokens, weight, convolved = ctx.saved_tensors
        height, width = ctx.size
        inner = torch.ops.aten.gelu_backward(grad.contiguous(), convolved)
        grad_tokens = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_tokens = torch.empty_like(tokens)
            _convolve(inner, weight, None, height, width, convolved=grad_tokens, flip=True)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            sums = _weight_sums(tokens, inner, height, width)
            if ctx.needs_input_grad[1]:
                grad_weight = sums[:9].t().reshape(weight.shape).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = sums[9].to(weight.dtype)
        return grad_tokens, grad_weight, grad_bias, None, None


def _convolve(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    *,
    convolved: Tensor | None = None,
    activated: Tensor | None = None,
    flip: bool = False,
) -> None:
    """Write the convolution and its GELU, or one of them; `flip` turns the weights by half a turn."""
    batch, _, channels = tokens.shape
    block = _channel_block(channels)
    tiles = triton.cdiv(height, _TILE) * triton.cdiv(width, _TILE)
    grid = (triton.cdiv(channels, block), tiles, batch)
    if tokens.numel():
        _depthwise_kernel[grid](
            tokens,
            weight,
            weight if bias is None else bias,
            tokens if convolved is None else convolved,
            tokens if activated is None else activated,
            height,
            width,
            channels,
            BIAS=bias is not None,
            CONVOLVED=convolved is not None,
            ACTIVATED=activated is not None,
            FLIP=flip,
            TILE=_TILE,
            BLOCK=block,
        )


def _weight_sums(tokens: Tensor, grad: Tensor, height: int, width: int) -> Tensor:
    """(16, C) float32: gradients of the nine weights of each channel, then of its bias; the rest is padding."""
    batch, _, channels = tokens.shape
    block = _channel_block(channels)
    columns, strips = triton.cdiv(width, _TILE), triton.cdiv(height, _TILE * _STRIP)
    partial = grad.new_zeros(batch, strips * columns, 16, channels, dtype=torch.float32)
    if tokens.numel():
        _depthwise_weight_kernel[(triton.cdiv(channels, block), strips * columns, batch)](
            tokens, grad, partial, height, width, channels, TILE=_TILE, STRIP=_STRIP, BLOCK=block
        )
    return partial.sum((0, 1))


def _norm_blocks(channels: int) -> tuple[int, int]:
    """Channels, padded to a power of two, and rows of one program."""
    padded = triton.next_power_of_2(channels)
    return padded, max(1, _ELEMENTS // padded)


def _channel_block(channels: int) -> int:
    return min(_MAX_CHANNELS, triton.next_power_of_2(channels))


@triton.jit
def _norm_kernel(
    tokens,
    weight,
    bias,
    out,
    rows,
    eps,
    CHANNELS: tl.constexpr,
    BIAS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, PADDED)[None, :]
    known = channel < CHANNELS
    inside = (row < rows) & known
    place = row * CHANNELS + channel
    x = tl.load(tokens + place, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(x, 1)[:, None] / CHANNELS
    centered = tl.where(known, x - mean, 0)
    variance = tl.sum(centered * centered, 1)[:, None] / CHANNELS
    y = centered / tl.sqrt(variance + eps) * tl.load(weight + channel, mask=known, other=0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + channel, mask=known, other=0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward_kernel(
    tokens,
    grad,
    weight,
    out,
    partial,
    rows,
    eps,
    CHANNELS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, PADDED)[None, :]
    known = channel < CHANNELS
    inside = (row < rows) & known
    place = row * CHANNELS + channel
    x = tl.load(tokens + place, mask=inside, other=0).to(tl.float32)
    g = tl.load(grad + place, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(x, 1)[:, None] / CHANNELS
    centered = tl.where(known, x - mean, 0)
    scale = 1.0 / tl.sqrt(tl.sum(centered * centered, 1)[:, None] / CHANNELS + eps)
    unit = centered * scale
    pulled = g * tl.load(weight + channel, mask=known, other=0).to(tl.float32)
    along = tl.sum(pulled * unit, 1)[:, None] / CHANNELS
    level = tl.sum(pulled, 1)[:, None] / CHANNELS
    tl.store(out + place, (scale * (pulled - level - unit * along)).to(out.dtype.element_ty), mask=inside)
    if WEIGHTS:
        line = program * CHANNELS + tl.arange(0, PADDED)
        within = tl.arange(0, PADDED) < CHANNELS
        tl.store(partial + line, tl.sum(g * unit, 0), mask=within)
        tl.store(partial + tl.num_programs(0).to(tl.int64) * CHANNELS + line, tl.sum(g, 0), mask=within)


@triton.jit
def _depthwise_kernel(
    tokens,
    weight,
    bias,
    convolved,
    activated,
    height,
    width,
    channels,
    BIAS: tl.constexpr,
    CONVOLVED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    FLIP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = channel < channels
    columns = tl.cdiv(width, TILE)
    pixel = tl.arange(0, TILE * TILE)[:, None]
    y = tl.program_id(1) // columns * TILE + pixel // TILE
    x = tl.program_id(1) % columns * TILE + pixel % TILE
    start = tl.program_id(2).to(tl.int64) * height * width * channels
    place = (y * width + x) * channels + channel
    total = tl.zeros([TILE * TILE, BLOCK], dtype=tl.float32)
    for tap in tl.static_range(9):
        dy = tap // 3 - 1
        dx = tap % 3 - 1
        inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width) & known
        neighbor = tl.load(tokens + start + place + (dy * width + dx) * channels, mask=inside, other=0)
        factor = tl.load(weight + channel * 9 + (8 - tap if FLIP else tap), mask=known, other=0)
        total += neighbor.to(tl.float32) * factor.to(tl.float32)
    if BIAS:
        total += tl.load(bias + channel, mask=known, other=0).to(tl.float32)
    inside = (y < height) & (x < width) & known
    if CONVOLVED:
        tl.store(convolved + start + place, total.to(convolved.dtype.element_ty), mask=inside)
    if ACTIVATED:
        # GELU of the rounded convolution: what its gradient is taken at.
        total = total.to(activated.dtype.element_ty).to(tl.float32)
        total = 0.5 * total * (1 + tl.erf(total * 0.7071067811865476))
        tl.store(activated + start + place, total.to(activated.dtype.element_ty), mask=inside)


@triton.jit
def _depthwise_weight_kernel(
    tokens,
    grad,
    partial,
    height,
    width,
    channels,
    TILE: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = channel < channels
    columns = tl.cdiv(width, TILE)
    pixel = tl.arange(0, TILE * TILE)[:, None]
    x = tl.program_id(1) % columns * TILE + pixel % TILE
    start = tl.program_id(2).to(tl.int64) * height * width * channels
    line = tl.arange(0, 16)[:, None]
    sums = tl.zeros([16, BLOCK], dtype=tl.float32)
    for square in range(STRIP):
        y = (tl.program_id(1) // columns * STRIP + square) * TILE + pixel // TILE
        place = (y * width + x) * channels + channel
        inside = (y < height) & (x < width) & known
        g = tl.load(grad + start + place, mask=inside, other=0).to(tl.float32)
        sums += tl.where(line == 9, tl.sum(g, 0)[None, :], 0)
        for tap in tl.static_range(9):
            dy = tap // 3 - 1
            dx = tap % 3 - 1
            within = inside & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            neighbor = tl.load(tokens + start + place + (dy * width + dx) * channels, mask=within, other=0)
            sums += tl.where(line == tap, tl.sum(g * neighbor.to(tl.float32), 0)[None, :], 0)
    program = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + (program * 16 + line) * channels + channel, sums, mask=known & (line < 16))
