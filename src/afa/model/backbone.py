"""The contract between an encoder and everything else.

Nothing outside this package knows which encoder it talks to: a backbone publishes its channels, strides and
number of attention maps, and returns a feature pyramid plus the raw attention of its last blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class BackboneOutput:
    """What an encoder says of a batch.

    Attributes:
        features: One (B, channels[i], H / strides[i], W / strides[i]) map a level, sizes rounded up.
        attention_logits: (B, n, hw, hw) Q K^T of the last blocks over the last level's tokens, unscaled, before
            softmax; None when not asked for.
    """

    features: tuple[Tensor, ...]
    attention_logits: Tensor | None = None


class Backbone(nn.Module, ABC):
    """An encoder: feature pyramid and raw attention.

    Attributes:
        channels: Channels of each level, finest first.
        strides: Pixels per feature of each level.
        num_attention_maps: n, heads x blocks whose attention is returned.
        attention_scale: Factor that the encoder itself applies to Q K^T, 1 / sqrt(d).
        min_size: Smallest height and width that it takes, pixels.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    num_attention_maps: int
    attention_scale: float
    min_size: int

    @abstractmethod
    def forward(self, image: Tensor, *, attention: bool = False) -> BackboneOutput:
        """Encode a batch.

        Args:
            image: (B, 3, H, W) normalized image, H and W at least `min_size`.
            attention: Also return the raw attention of the last blocks.
        """

    def norm_parameters(self) -> list[nn.Parameter]:
        """The weights and biases of the norm layers, which the `paper` preset freezes."""
        return [
            parameter
            for module in self.modules()
            if isinstance(module, nn.LayerNorm)
            for parameter in module.parameters(recurse=False)
        ]
