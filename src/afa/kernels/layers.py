"""Layers over tokens as functions, laid out for speed: references in PyTorch, each with a fused counterpart on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import conv2d

from afa.kernels.dispatch import FUSED_TYPES, fused_by

_FEW_VALUES = 1 << 20  # as in one image; for fewer, starting a fused kernel takes the host longer than it saves


def under_autocast(kind: str) -> bool:
    """Whether autocast is on for devices of this kind; some kinds have none."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def eager_cpu(tokens: Tensor) -> bool:
    """Whether the next operation on tokens of any shape runs at once, on a CPU."""
    return tokens.device.type == "cpu" and not torch.compiler.is_compiling()


def as_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """View (B, H * W, C) tokens as a (B, C, H, W) image that is channels-last, for a single image too.

    The other way round, (B, C, N) split into (B, C, H, W), a single image has the strides of a contiguous image, and
    PyTorch copies it.
    """
    image: Tensor = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # type: ignore[no-untyped-call]
    return image


def sparing_gelu(values: Tensor) -> Tensor:
    """GELU of any shape. Without gradient it overwrites its input, because fresh memory costs more than GELU itself."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.gelu(values)
    overwritten: Tensor = torch.ops.aten.gelu_(values)
    return overwritten


def _norm_pays(tokens: Tensor, weight: Tensor, *_: object) -> bool:
    pays = torch.is_grad_enabled() or tokens.numel() > _FEW_VALUES
    return pays and tokens.dtype in FUSED_TYPES and weight.dim() == 1


@fused_by("norm_triton", when=_norm_pays)
def layer_norm(tokens: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Normalize over the last dimensions, with gradient.

    Args:
        tokens: (..., *weight.shape); the fused function normalizes over one dimension.
        weight: (C,) or more dimensions.
        bias: As the weight, or None.
        eps: Added to the variance.
        dtype: Of the result. Without fusion, autocast decides instead, except for bfloat16 without gradient.

    Returns:
        As the tokens.
    """
    kind = tokens.device.type
    if dtype == torch.bfloat16 and not torch.is_grad_enabled() and under_autocast(kind):
        with torch.autocast(kind, enabled=False):
            shift = None if bias is None else bias.to(dtype)
            return F.layer_norm(tokens.to(dtype), weight.shape, weight.to(dtype), shift, eps)
    return F.layer_norm(tokens, weight.shape, weight, bias, eps)


@fused_by("depthwise_triton", when=lambda tokens, *_: tokens.dtype in FUSED_TYPES)
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
    image = as_image(tokens, height, width)  # (B, C, H, W)
    if not torch.is_grad_enabled() and _onednn_pays(tokens):
        # GELU on the way: neither a second pass over the widest maps nor PyTorch's slower error function.
        ones, groups = [1, 1], len(weight)
        convolve = torch.ops.mkldnn._convolution_pointwise
        activated: Tensor = convolve(image, weight, bias, ones, ones, ones, groups, "gelu", [], "none")  # (B, C, H, W)
        return activated.flatten(2).transpose(1, 2)  # (B, H * W, C)
    image = conv2d(image, weight, bias, padding=1, groups=len(weight))  # (B, C, H, W)
    return sparing_gelu(image.flatten(2).transpose(1, 2))  # (B, H * W, C)


class Linear(torch.autograd.Function):
    """A linear layer by any way to map, whose gradients are matrix products.

    oneDNN's gradients of a 1x1 convolution take one and a half times as long as MKL's products, and longer on AVX2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mapped: Callable[..., Tensor],
        column_sums: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Map (..., I) tokens by `mapped(tokens, weight, bias)`; `column_sums` is (N, O) -> (O,)."""
        ctx.save_for_backward(tokens, weight)
        ctx.column_sums = column_sums
        return mapped(tokens, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of tokens, weight and bias from that of the result, (N, O) in rows."""
        tokens, weight = ctx.saved_tensors
        rows = grads[0].reshape(-1, len(weight)).contiguous()  # (N, O)
        grad_tokens = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_tokens = (rows @ weight.to(rows.dtype)).view(tokens.shape)  # (..., I)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ tokens.reshape(-1, tokens.shape[-1])).to(weight.dtype)  # (O, I)
        if ctx.needs_input_grad[2]:
            grad_bias = ctx.column_sums(rows).to(weight.dtype)  # (O,)
        return grad_tokens, grad_weight, grad_bias, None, None


def _takes_linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and bias is not None and tokens.dtype in FUSED_TYPES


@fused_by("depthwise_triton", when=_takes_linear)
def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map tokens as `torch.nn.functional.linear` does; on a CPU in float32 by oneDNN.

    It adds the bias on the way and stays fast with few channels; the matrix product that PyTorch uses for a linear
    layer writes the bias into the result first. On a GPU the gradient of the bias has a kernel of its own.

    Args:
        tokens: (..., I).
        weight: (O, I).
        bias: (O,) or None.

    Returns:
        (..., O).
    """
    if not _onednn_pays(tokens):
        return F.linear(tokens, weight, bias)
    if not torch.is_grad_enabled():
        return _map(tokens, weight, bias)
    mapped: Tensor = Linear.apply(tokens, weight, bias, _map, _column_sums)  # type: ignore[no-untyped-call]
    return mapped


def _map(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = tokens.reshape(-1, tokens.shape[-1])  # (N, I)
    mapped: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")  # (N, O)
    return mapped.view(*tokens.shape[:-1], len(weight))  # (..., O)


def _column_sums(rows: Tensor) -> Tensor:
    return rows.new_ones(len(rows)) @ rows  # for wide rows up to twice as fast as a sum


def _onednn_pays(tokens: Tensor) -> bool:
    """Whether oneDNN's own functions, which have no gradient, are faster than PyTorch's."""
    plain = tokens.dtype == torch.float32 and not under_autocast("cpu")
    return plain and tokens.numel() > 0 and eager_cpu(tokens) and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
