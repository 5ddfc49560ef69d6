"""Layer norm as a fused GPU kernel; importing it needs Triton. Its reference is `afa.kernels.layers.layer_norm`.

It is bound by memory: PyTorch gives every row a thread block of its own, which leaves most threads idle at MiT's 64
channels. Sums are taken in float32 whatever the tokens are stored in.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 2048
"""Elements of a layer norm that one program holds."""


def layer_norm(tokens: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Fused over one dimension, the result in any dtype; see `afa.kernels.layers.layer_norm`."""
    if not torch.is_grad_enabled():
        return _normalize(tokens.contiguous(), weight, bias, eps, dtype)
    normalized: Tensor = _LayerNorm.apply(tokens, weight, bias, eps, dtype)
    return normalized


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        tokens = tokens.contiguous()
        ctx.save_for_backward(tokens, weight)
        ctx.eps = eps
        return _normalize(tokens, weight, bias, eps, dtype)

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
        sums = partial.sum(1)  # (2, C)
        return (
            out,
            sums[0].to(weight.dtype) if ctx.needs_input_grad[1] else None,
            sums[1].to(weight.dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _normalize(tokens: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
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


def _norm_blocks(channels: int) -> tuple[int, int]:
    """Channels, padded to a power of two, and rows of one program."""
    padded = triton.next_power_of_2(channels)
    return padded, max(1, _ELEMENTS // padded)


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
