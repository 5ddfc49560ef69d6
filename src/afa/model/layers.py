"""Faster versions of layers of transformers' encoders, with the same weights and results.

`speed_up` gives the layers of an encoder the classes below. Names, parameters and results stay those of transformers,
up to rounding; what changes is how a layer asks for its result, mostly by a function of `afa.kernels.layers`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, pixel_unshuffle
from transformers.activations import GELUActivation
from transformers.models.segformer.modeling_segformer import (
    SegformerLayer,
    SegformerMixMLP,
    SegformerOverlapPatchEmbeddings,
    SegformerSequenceReduction,
)

from afa.kernels.layers import as_image, depthwise_gelu, eager_cpu, layer_norm, linear, sparing_gelu, under_autocast

_PIECE_BYTES = 1 << 24


class LowLayerNorm(nn.LayerNorm):
    """Layer norm that, without gradient under autocast to bfloat16, reads and writes bfloat16; on a GPU one kernel.

    Autocast computes it in float32 from one end to the other, and every layer behind it makes a copy in its own
    precision. The sums inside are float32 either way. (float16 lacks the range of what stands before a norm.)
    """

    inner = False
    """Whether all later layers cast their input; then this one may write bfloat16 with gradient, too."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize tokens of any shape over their last dimensions."""
        kind, low = input.device.type, torch.bfloat16
        if torch.compiler.is_compiling() or self.weight is None:
            return super().forward(input)
        dtype = torch.float32 if under_autocast(kind) else input.dtype
        if under_autocast(kind) and torch.get_autocast_dtype(kind) == low:
            dtype = low if self.inner or not torch.is_grad_enabled() else torch.float32
        return layer_norm(input, self.weight, self.bias, self.eps, dtype)


class InnerLayerNorm(LowLayerNorm):
    """A `LowLayerNorm` inside a block of MiT, where only linear layers and convolutions read its output."""

    inner = True


class PointwiseLinear(nn.Linear):
    """A linear layer over tokens; see `afa.kernels.layers.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map tokens of any shape, (..., in_features) to (..., out_features)."""
        return linear(input, self.weight, self.bias)


class StemConv(nn.Conv2d):
    """MiT's first convolution, 7x7 at stride 4 over RGB, on a GPU as one of 2x2 over squares of 4x4 pixels.

    The weights are the same, with a row and a column of zeros before them. The matrix units of a GPU cannot use three
    input channels well, but 48. The result is channels-last, as the following layers need it.
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
        squares = pixel_unshuffle(pad(input, (4, -width % 4, 4, -height % 4)), 4)  # (B, 48, H / 4 + 1, W / 4 + 1)
        weight = pixel_unshuffle(pad(self.weight, (1, 0, 1, 0)), 4)  # (C, 48, 2, 2)
        return conv2d(squares.contiguous(memory_format=torch.channels_last), weight, self.bias)


class SparingGelu(GELUActivation):
    """GELU that overwrites its input when no gradient is needed."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply to any shape."""
        return sparing_gelu(input)


class MixMlp(SegformerMixMLP):
    """MiT's Mix-FFN, which on a CPU and without gradient takes few images at a time; on a GPU with fused kernels.

    Between its layers there are four times as many channels as in its input. In pieces of `_PIECE_BYTES` they use
    memory that was just freed; as a whole they would need fresh memory, which the system has to clear first.
    """

    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        """Map (B, H * W, C) tokens."""
        if torch.is_grad_enabled() or not eager_cpu(hidden_states):
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
        assert isinstance(self.activation_fn, GELUActivation)
        convolution = self.dwconv.dwconv
        hidden = depthwise_gelu(self.fc1(tokens), convolution.weight, convolution.bias, height, width)  # (B, H W, 4 C)
        mapped: Tensor = self.dropout(self.fc2(self.dropout(hidden)))  # (B, H W, C)
        return mapped


class SequenceReduction(SegformerSequenceReduction):
    """MiT's strided convolution before keys and values, of a view that is channels-last for a single image, too."""

    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        """Reduce (B, H * W, C) tokens to (B, H / r * W / r, C)."""
        image = self.sequence_reduction(as_image(hidden_states, height, width))  # (B, C, H / r, W / r)
        reduced: Tensor = self.layer_norm(image.flatten(2).transpose(1, 2))  # (B, H / r * W / r, C)
        return reduced


_FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LowLayerNorm,
    nn.Linear: PointwiseLinear,
    GELUActivation: SparingGelu,
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
