"""Layers of transformers' encoders under other arithmetic: the same weights and results, laid out for speed.

`speed_up` gives the layers of an encoder the classes below. Names, parameters and results stay those of transformers,
up to rounding; what changes is how a layer asks PyTorch for its result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, layer_norm, linear, pad, pixel_unshuffle
from transformers.activations import GELUActivation
from transformers.models.segformer.modeling_segformer import (
    SegformerDepthWiseConv,
    SegformerLayer,
    SegformerMixMLP,
    SegformerOverlapPatchEmbeddings,
    SegformerSequenceReduction,
)

from afa.kernels.dispatch import fused

_PIECE_BYTES = 1 << 24
_FEW_VALUES = 1 << 20  # as of one image, where the host takes longer to start a kernel of ours than it saves
_FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class LowLayerNorm(nn.LayerNorm):
    """Layer norm that, without gradient under autocast to bfloat16, reads and writes bfloat16; on a GPU one kernel.

    Autocast computes it in float32 from one end to the other, and every layer behind it makes a copy in its own
    precision. The sums inside are float32 either way. (float16 lacks the range of what stands before a norm.)
    """

    inner = False
    """Whether everything behind it casts what it reads: then it may write bfloat16 with gradient, too."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize tokens of any shape over their last dimensions."""
        kind, low = input.device.type, torch.bfloat16
        if torch.compiler.is_compiling() or self.weight is None:
            return super().forward(input)
        casts = under_autocast(kind)
        rounds = casts and torch.get_autocast_dtype(kind) == low
        pays = torch.is_grad_enabled() or input.numel() > _FEW_VALUES
        if pays and _takes_kernels(input) and len(self.normalized_shape) == 1:
            from afa.kernels.layers_triton import layer_norm as fused_layer_norm

            short = rounds and (self.inner or not torch.is_grad_enabled())
            dtype = low if short else torch.float32 if casts else input.dtype
            return fused_layer_norm(input, self.weight, self.bias, self.eps, dtype)
        if not rounds or torch.is_grad_enabled():
            return super().forward(input)
        with torch.autocast(kind, enabled=False):
            bias = None if self.bias is None else self.bias.to(low)
            return layer_norm(input.to(low), self.normalized_shape, self.weight.to(low), bias, self.eps)


class InnerLayerNorm(LowLayerNorm):
    """A `LowLayerNorm` inside a block of MiT: linear layers and convolutions are all that read it."""

    inner = True


class PointwiseLinear(nn.Linear):
    """A linear layer over tokens that is a 1x1 convolution on a CPU in float32.

    oneDNN's convolution adds the bias as it goes and keeps its speed where there are few channels; the matrix product
    that PyTorch takes for a linear layer writes the bias into the result first. On a GPU the gradient of the bias has a
    kernel of its own.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map tokens of any shape, (..., in_features) to (..., out_features)."""
        if torch.is_grad_enabled() and self.bias is not None and _takes_kernels(input):
            from afa.kernels.layers_triton import linear as fused_linear

            return fused_linear(input, self.weight, self.bias)
        if not _pays(input):
            return linear(input, self.weight, self.bias)
        # One long column of pixels, channels last: neither reshaping copies anything.
        column = input.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)
        output = conv2d(column, self.weight[:, :, None, None], self.bias)
        return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)


class StemConv(nn.Conv2d):
    """MiT's first convolution, 7x7 at stride 4 over RGB, on a GPU as one of 2x2 over squares of 4x4 pixels.

    The same weights with a row and a column of zeros before them. Three input channels suit no GPU's matrix units, 48
    do, and the result is channels-last, as all that follows wants it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, 3, H, W) to (B, C, ceil(H / 4), ceil(W / 4))."""
        if input.device.type != "cuda" or torch.compiler.is_compiling():
            return super().forward(input)
        return self._over_squares(input)

    def _over_squares(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if under_autocast(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        height, width = input.shape[2:]
        squares = pixel_unshuffle(pad(input, (4, -width % 4, 4, -height % 4)), 4)
        weight = pixel_unshuffle(pad(self.weight, (1, 0, 1, 0)), 4)
        return conv2d(squares.contiguous(memory_format=torch.channels_last), weight, self.bias)


class SparingGelu(GELUActivation):
    """GELU that overwrites its input where no gradient is wanted: fresh memory costs more than the function."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply to any shape."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return gelu(input)
        overwritten: Tensor = torch.ops.aten.gelu_(input)
        return overwritten


class DepthwiseConv(SegformerDepthWiseConv):
    """MiT's convolution inside its Mix-FFN, of a view that is channels-last for a single image, too.

    Seen the other way round, (B, C, N) split into (B, C, H, W), the strides of a single image read as those of a
    contiguous one, and PyTorch copies it.
    """

    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        """Convolve (B, H * W, C) tokens."""
        convolved: Tensor = self.dwconv(_as_image(hidden_states, height, width)).flatten(2).transpose(1, 2)
        return convolved


class MixMlp(SegformerMixMLP):
    """MiT's Mix-FFN, which on a CPU and without gradient takes few images at a time; on a GPU with fused kernels.

    Between its layers stand four times the channels of its input. In pieces of `_PIECE_BYTES` they lie in memory that
    was just given back; as a whole, in fresh memory that the system has to clear first.
    """

    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        """Map (B, H * W, C) tokens."""
        if torch.is_grad_enabled() or not _eager_cpu(hidden_states):
            return self._map(hidden_states, height, width)
        needed = height * width * self.fc1.out_features * hidden_states.element_size()
        pieces = torch.split(hidden_states, max(1, _PIECE_BYTES // needed))
        if len(pieces) == 1:
            return self._map(hidden_states, height, width)
        mapped = torch.empty_like(hidden_states)
        for piece, place in zip(pieces, torch.split(mapped, len(pieces[0])), strict=True):
            place.copy_(self._map(piece, height, width))
        return mapped

    def _map(self, tokens: Tensor, height: int, width: int) -> Tensor:
        if _takes_kernels(tokens) and isinstance(self.activation_fn, GELUActivation):
            from afa.kernels.layers_triton import depthwise_gelu

            convolution = self.dwconv.dwconv
            hidden = depthwise_gelu(self.fc1(tokens), convolution.weight, convolution.bias, height, width)
            fused_map: Tensor = self.dropout(self.fc2(self.dropout(hidden)))
            return fused_map
        mapped: Tensor = super().forward(tokens, height, width)  # type: ignore[no-untyped-call]
        return mapped


class SequenceReduction(SegformerSequenceReduction):
    """MiT's strided convolution before keys and values, of the same view."""

    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        """Reduce (B, H * W, C) tokens to (B, H / r * W / r, C)."""
        image = self.sequence_reduction(_as_image(hidden_states, height, width))
        reduced: Tensor = self.layer_norm(image.flatten(2).transpose(1, 2))
        return reduced


_FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LowLayerNorm,
    nn.Linear: PointwiseLinear,
    GELUActivation: SparingGelu,
    SegformerDepthWiseConv: DepthwiseConv,
    SegformerMixMLP: MixMlp,
    SegformerSequenceReduction: SequenceReduction,
}


def speed_up(encoder: nn.Module) -> None:
    """Give the layers of an encoder the classes of this module, in place.

    Args:
        encoder: Encoder of transformers. Layers of other classes, subclasses included, stay as they are.
    """
    for module in encoder.modules():
        faster = _FASTER.get(type(module))
        if faster is not None:
            # A class of the same state: assigning it keeps parameters, hooks, names and copies as they are.
            module.__class__ = faster
    for module in encoder.modules():
        if isinstance(module, SegformerOverlapPatchEmbeddings) and _is_stem(module.proj):
            module.proj.__class__ = StemConv
        if isinstance(module, SegformerLayer | SegformerSequenceReduction):
            for part in module.children():
                if type(part) is LowLayerNorm:
                    part.__class__ = InnerLayerNorm


def _is_stem(layer: nn.Conv2d) -> bool:
    """Whether `StemConv` computes the same."""
    found = (layer.in_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    return type(layer) is nn.Conv2d and found == (3, (7, 7), (4, 4), (3, 3), (1, 1), 1)


def _as_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """View (B, H * W, C) tokens as a (B, C, H, W) image, channels last."""
    image: Tensor = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # type: ignore[no-untyped-call]
    return image


def under_autocast(kind: str) -> bool:
    """Whether autocast is on for devices of this kind; some kinds have none."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _takes_kernels(input: Tensor) -> bool:
    """Whether fused kernels take a tensor."""
    return fused(input.device) and input.dtype in _FUSED_TYPES and not torch.compiler.is_compiling()


def _eager_cpu(input: Tensor) -> bool:
    """Whether the next operation runs at once, on a CPU."""
    return input.device.type == "cpu" and not torch.compiler.is_compiling()


def _pays(input: Tensor) -> bool:
    """Whether a linear layer is better a convolution."""
    plain = input.dtype == torch.float32 and not under_autocast("cpu")
    return plain and input.numel() > 0 and _eager_cpu(input) and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
