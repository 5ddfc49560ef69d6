"""MiT's depthwise convolution with GELU, and the gradient of a bias, as fused GPU kernels over tokens.

Importing it needs Triton. The references are in `afa.kernels.layers`. The kernels are bound by memory: PyTorch
runs the convolution and GELU as two passes over MiT's widest maps. Sums are taken in float32 whatever the tokens are
stored in.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from afa.kernels.layers import Linear

_COLUMNS = 8
"""Columns of pixels that one program convolves."""

_ROWS = 16
"""Rows of pixels that one program convolves, one after the other."""

_CHANNELS = 64
"""Channels that one program convolves."""

_SUM_COLUMNS = 16
"""Columns of pixels over which one program sums the gradients of the weights."""

_SUM_CHANNELS = 32
"""Channels of them."""

_SUM_ROWS = 64
"""Rows that one program sums at a time."""

_SUM_PROGRAMS = 128
"""At most how many programs share the rows of a sum."""


def depthwise_gelu(tokens: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
    """Fused; see `afa.kernels.layers.depthwise_gelu`."""
    assert tokens.shape[1] == height * width, (tokens.shape, height, width)
    assert weight.shape == (tokens.shape[2], 1, 3, 3), weight.shape
    if not torch.is_grad_enabled():
        tokens = tokens.contiguous()
        activated = torch.empty_like(tokens)
        _convolve(tokens, weight, bias, height, width, activated=activated)
        return activated
    result: Tensor = _DepthwiseGelu.apply(tokens, weight, bias, height, width)
    return result


def linear(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The gradient of the bias, a sum over all tokens, is a kernel; see `afa.kernels.layers.linear`."""
    kind = tokens.device.type
    if torch.is_autocast_enabled(kind):
        tokens = tokens.to(torch.get_autocast_dtype(kind))
    mapped: Tensor = Linear.apply(tokens, weight, bias, torch.nn.functional.linear, _column_sums)
    return mapped


def _column_sums(rows: Tensor) -> Tensor:
    """(N, C) -> (C,) float32."""
    count, channels = rows.shape
    programs = max(1, min(_SUM_PROGRAMS, triton.cdiv(count, _SUM_ROWS)))
    partial = rows.new_empty(programs, channels, dtype=torch.float32)
    if channels:
        _column_sums_kernel[(triton.cdiv(channels, _CHANNELS), programs)](
            rows, partial, count, channels, ROWS=_SUM_ROWS, BLOCK=_CHANNELS
        )
    return partial.sum(0)  # (C,)


class _DepthwiseGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
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
            sums = _weight_sums(tokens, inner, height, width)  # (10, C)
            if ctx.needs_input_grad[1]:
                grad_weight = sums[:9].t().reshape(weight.shape).to(weight.dtype)  # (C, 1, 3, 3)
            if ctx.needs_input_grad[2]:
                grad_bias = sums[9].to(weight.dtype)  # (C,)
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
    """Write the convolution and its GELU, or one of them; `flip` rotates the weights by 180 degrees."""
    channels = tokens.shape[2]
    taps = weight.reshape(channels, 9)  # (C, 9)
    taps = (taps.flip(1) if flip else taps).t().contiguous()  # (9, C)
    if tokens.numel():
        _depthwise_kernel[_depthwise_grid(tokens, height, width, _COLUMNS, _CHANNELS)](
            tokens,
            taps,
            weight if bias is None else bias,
            tokens if convolved is None else convolved,
            tokens if activated is None else activated,
            height,
            width,
            channels,
            BIAS=bias is not None,
            CONVOLVED=convolved is not None,
            ACTIVATED=activated is not None,
            EXACT=tokens.dtype == torch.float32,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            BLOCK=_CHANNELS,
        )


def _weight_sums(tokens: Tensor, grad: Tensor, height: int, width: int) -> Tensor:
    """(10, C) float32: gradients of the nine weights of each channel, then of its bias."""
    batch, _, channels = tokens.shape
    grid = _depthwise_grid(tokens, height, width, _SUM_COLUMNS, _SUM_CHANNELS)
    partial = grad.new_empty(batch * grid[1], 10, channels, dtype=torch.float32)
    if tokens.numel():
        _depthwise_weight_kernel[grid](
            tokens, grad, partial, height, width, channels, ROWS=_ROWS, COLUMNS=_SUM_COLUMNS, BLOCK=_SUM_CHANNELS
        )
    return partial.sum(0)  # (10, C)


def _depthwise_grid(tokens: Tensor, height: int, width: int, columns: int, channels: int) -> tuple[int, int, int]:
    """Blocks of channels, blocks of pixels, images."""
    blocks = triton.cdiv(height, _ROWS) * triton.cdiv(width, columns)
    return triton.cdiv(tokens.shape[2], channels), blocks, tokens.shape[0]


@triton.jit
def _column_sums_kernel(rows, partial, count, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = channel < channels
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in range(tl.program_id(1) * ROWS, count, tl.num_programs(1) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        place = row.to(tl.int64) * channels + channel
        total += tl.load(rows + place, mask=(row < count) & known, other=0).to(tl.float32)
    kept = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(partial + tl.program_id(1) * channels + kept, tl.sum(total, 0), mask=kept < channels)


@triton.jit
def _block(height, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """What a program of `_depthwise_grid` works on: channels, which exist, first row, columns, start of its image."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = channel < channels
    across = tl.cdiv(width, COLUMNS)
    first = tl.program_id(1) // across * ROWS
    column = tl.program_id(1) % across * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    start = tl.program_id(2).to(tl.int64) * height * width * channels
    return channel, known, first, column, start


@triton.jit
def _pixels(image, row, column, height, width, channels, channel, known):
    """(COLUMNS, BLOCK) float32 pixels of one row, 0 outside the image."""
    row = row + column * 0  # the interpreter takes no scalar for a mask
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & known
    return tl.load(image + (row * width + column) * channels + channel, mask=inside, other=0).to(tl.float32)


@triton.jit
def _gelu(x, EXACT: tl.constexpr):
    """x times the normal distribution's share below x; for half precision with an erf that errs by up to 1.5e-7."""
    if EXACT:
        result = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        # Abramowitz & Stegun 7.1.26, of |x| / sqrt(2).
        t = 1.0 / (1.0 + 0.231641888 * tl.abs(x))
        series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        result = tl.maximum(x, 0.0) - 0.5 * tl.abs(x) * series * tl.exp2(-0.7213475204444817 * x * x)
    return result


@triton.jit
def _depthwise_kernel(
    tokens,
    taps,
    bias,
    convolved,
    activated,
    height,
    width,
    channels,
    BIAS: tl.constexpr,
    CONVOLVED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Down the rows: each row of the input is read once, and adds to the three rows of the result that it is next to.
    channel, known, first, column, start = _block(height, width, channels, ROWS, COLUMNS, BLOCK)
    tokens += start
    convolved += start
    activated += start
    w0 = tl.load(taps + channel, mask=known, other=0).to(tl.float32)
    w1 = tl.load(taps + channels + channel, mask=known, other=0).to(tl.float32)
    w2 = tl.load(taps + 2 * channels + channel, mask=known, other=0).to(tl.float32)
    w3 = tl.load(taps + 3 * channels + channel, mask=known, other=0).to(tl.float32)
    w4 = tl.load(taps + 4 * channels + channel, mask=known, other=0).to(tl.float32)
    w5 = tl.load(taps + 5 * channels + channel, mask=known, other=0).to(tl.float32)
    w6 = tl.load(taps + 6 * channels + channel, mask=known, other=0).to(tl.float32)
    w7 = tl.load(taps + 7 * channels + channel, mask=known, other=0).to(tl.float32)
    w8 = tl.load(taps + 8 * channels + channel, mask=known, other=0).to(tl.float32)
    level = tl.zeros([COLUMNS, BLOCK], dtype=tl.float32)
    if BIAS:
        level += tl.load(bias + channel, mask=known, other=0).to(tl.float32)
    inside = (column < width) & known
    above = level
    here = level
    for step in range(ROWS + 2):
        row = first - 1 + step
        left = _pixels(tokens, row, column - 1, height, width, channels, channel, known)
        middle = _pixels(tokens, row, column, height, width, channels, channel, known)
        right = _pixels(tokens, row, column + 1, height, width, channels, channel, known)
        done = above + w6 * left + w7 * middle + w8 * right
        above = here + w3 * left + w4 * middle + w5 * right
        here = level + w0 * left + w1 * middle + w2 * right
        row = row - 1 + column * 0
        written = inside & (row >= first) & (row < height)
        place = (row * width + column) * channels + channel
        if CONVOLVED:
            tl.store(convolved + place, done.to(convolved.dtype.element_ty), mask=written)
        if ACTIVATED:
            # GELU of the rounded convolution: what its gradient is taken at.
            done = done.to(activated.dtype.element_ty).to(tl.float32)
            tl.store(activated + place, _gelu(done, EXACT).to(activated.dtype.element_ty), mask=written)


@triton.jit
def _depthwise_weight_kernel(
    tokens,
    grad,
    partial,
    height,
    width,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel, known, first, column, start = _block(height, width, channels, ROWS, COLUMNS, BLOCK)
    tokens += start
    grad += start
    zero = tl.zeros([COLUMNS, BLOCK], dtype=tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    # Gradients of the rows above, at and below the row of the input; rows of other programs count as 0.
    last = tl.minimum(first + ROWS, height)
    above = zero
    # Zeros, too, but a separate value: if two loop variables start as one value, Triton 3.6 takes one for a constant.
    here = _pixels(grad, last, column, last, width, channels, channel, known)
    for step in range(ROWS + 2):
        row = first - 1 + step
        below = _pixels(grad, row + 1, column, last, width, channels, channel, known)
        left = _pixels(tokens, row, column - 1, height, width, channels, channel, known)
        middle = _pixels(tokens, row, column, height, width, channels, channel, known)
        right = _pixels(tokens, row, column + 1, height, width, channels, channel, known)
        s0 += below * left
        s1 += below * middle
        s2 += below * right
        s3 += here * left
        s4 += here * middle
        s5 += here * right
        s6 += above * left
        s7 += above * middle
        s8 += above * right
        s9 += below
        above = here
        here = below
    program = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    line = partial + program * 10 * channels + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) < channels
    tl.store(line, tl.sum(s0, 0), mask=kept)
    tl.store(line + channels, tl.sum(s1, 0), mask=kept)
    tl.store(line + 2 * channels, tl.sum(s2, 0), mask=kept)
    tl.store(line + 3 * channels, tl.sum(s3, 0), mask=kept)
    tl.store(line + 4 * channels, tl.sum(s4, 0), mask=kept)
    tl.store(line + 5 * channels, tl.sum(s5, 0), mask=kept)
    tl.store(line + 6 * channels, tl.sum(s6, 0), mask=kept)
    tl.store(line + 7 * channels, tl.sum(s7, 0), mask=kept)
    tl.store(line + 8 * channels, tl.sum(s8, 0), mask=kept)
    tl.store(line + 9 * channels, tl.sum(s9, 0), mask=kept)
