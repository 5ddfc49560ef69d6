"""Layers over tokens as functions, laid out for speed: references in PyTorch, each with a fused counterpart on GPUs."""

from __future__ import annotations

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
    image = conv2d(as_image(tokens, height, width), weight, bias, padding=1, groups=len(weight))  # (B, C, H, W)
    return sparing_gelu(image.flatten(2).transpose(1, 2))  # (B, H * W, C)


def _takes_linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and bias is not None and tokens.dtype in FUSED_TYPES


@fused_by("depthwise_triton", when=_takes_linear)
def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map tokens as `torch.nn.functional.linear` does; on a CPU in float32 by a 1x1 convolution.

    oneDNN's convolution adds the bias on the way and stays fast with few channels; the matrix product that PyTorch
    uses for a linear layer writes the bias into the result first. On a GPU the gradient of the bias has a
    kernel of its own.

    Args:
        tokens: (..., I).
        weight: (O, I).
        bias: (O,) or None.

    Returns:
        (..., O).
    """
    if not _convolution_pays(tokens):
        return F.linear(tokens, weight, bias)
    # One long column of pixels, channels last: neither reshaping copies anything.
    column = tokens.reshape(1, -1, 1, tokens.shape[-1]).permute(0, 3, 1, 2)  # (1, I, N, 1)
    output = conv2d(column, weight[:, :, None, None], bias)  # (1, O, N, 1)
    return output.permute(0, 2, 3, 1).reshape(*tokens.shape[:-1], len(weight))  # (..., O)


def _convolution_pays(tokens: Tensor) -> bool:
    """Whether a 1x1 convolution is faster than a linear layer."""
    plain = tokens.dtype == torch.float32 and not under_autocast("cpu")
    return plain and tokens.numel() > 0 and eager_cpu(tokens) and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
