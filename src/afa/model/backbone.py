"""The contract between an encoder and everything else.

Nothing outside this package knows which encoder it talks to: a backbone publishes its channels, strides and
number of attention maps, and returns a feature pyramid plus the raw attention of its last blocks.
Its first blocks may be frozen: they do not learn, and behave in training as in evaluation.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from afa.types import RawAttention


@dataclass(frozen=True)
class BackboneOutput:
    """Output of an encoder for a batch.

    Attributes:
        features: One (B, channels[i], H / strides[i], W / strides[i]) map a level, sizes rounded up.
        attention: Queries and keys of the last blocks over the last level's tokens; None when not asked for.
        agreement: (B, hw, hw) non-negative, how much tokens attend to each other, mean over blocks and heads; None
            unless the encoder is a `LanguageBackbone`.
    """

    features: tuple[Tensor, ...]
    attention: RawAttention | None = None
    agreement: Tensor | None = None

    @property
    def attention_logits(self) -> Tensor | None:
        """(B, n, hw, hw) Q K^T of the last blocks, unscaled, before softmax; None when not asked for."""
        return None if self.attention is None else self.attention.logits


@dataclass(frozen=True)
class Encoded:
    """What a frozen encoder makes of images: all that the rest of the network needs, so that it can be kept.

    Attributes:
        features: The feature pyramid, one (B, channels[i], h, w) map a level.
        class_scores: (B, C, h, w), as in `NetworkOutput`.
    """

    features: tuple[Tensor, ...]
    class_scores: Tensor

    def first(self, count: int) -> Encoded:
        """That of the first `count` images."""
        return Encoded(tuple(feature[:count] for feature in self.features), self.class_scores[:count])


@dataclass(frozen=True)
class AttentionLayer:
    """The attention of one block.

    Attributes:
        module: What calls `afa.model.attention.attention_forward`.
        heads: Number of its heads.
        stride: Pixels per query along a side, counts rounded up.
        reduction: Queries per key along a side, counts rounded down.
    """

    module: nn.Module
    heads: int
    stride: int
    reduction: int = 1

    def query_grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) queries of an image of this size, pixels."""
        return -(-height // self.stride), -(-width // self.stride)

    def key_grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) keys of it."""
        rows, columns = self.query_grid(height, width)
        return rows // self.reduction, columns // self.reduction


def join_attention(blocks: Sequence[RawAttention]) -> RawAttention:
    """Put the heads of several blocks side by side."""
    return RawAttention(
        torch.cat([block.query for block in blocks], dim=1), torch.cat([block.key for block in blocks], dim=1)
    )


class Backbone(nn.Module, ABC):
    """An encoder: feature pyramid and raw attention.

    Attributes:
        channels: Channels of each level, finest first.
        strides: Pixels per feature of each level.
        num_attention_maps: n, heads x blocks whose attention is returned.
        attention_scale: Factor that the encoder itself applies to Q K^T, 1 / sqrt(d).
        min_size: Smallest height and width that it takes, pixels.
        freeze_blocks: Number of blocks, counted from the image, that are frozen together with what precedes them.
        num_prefix_tokens: Tokens before those of the image: of the class, registers.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    num_attention_maps: int
    attention_scale: float
    min_size: int
    freeze_blocks: int = 0
    num_prefix_tokens: int = 0

    @abstractmethod
    def forward(self, image: Tensor, *, attention: bool = False) -> BackboneOutput:
        """Encode a batch.

        Args:
            image: (B, 3, H, W) normalized image, H and W at least `min_size`.
            attention: Also return the raw attention of the last blocks.
        """

    @abstractmethod
    def attention_layers(self) -> Sequence[AttentionLayer]:
        """The attention of all blocks, in the order in which they run."""

    def attention_of_levels(self, features: Sequence[Tensor]) -> RawAttention:
        """The attention that `forward` returns, from feature maps that were kept.

        Args:
            features: Feature maps as `forward` returns them, in any floating-point type.

        Raises:
            NotImplementedError: The encoder's levels do not determine it; those of a `LanguageBackbone` do.
        """
        raise NotImplementedError

    def frozen_modules(self) -> Sequence[nn.Module]:
        """The frozen parts, whole modules; none unless an encoder says otherwise."""
        return ()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of everything but the frozen parts, which stay in evaluation mode."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self

    def freeze(self) -> None:
        """Stop the frozen parts from learning."""
        for module in self.frozen_modules():
            module.requires_grad_(False).eval()

    def norm_parameters(self) -> list[nn.Parameter]:
        """The weights and biases of the norm layers that are not frozen; the `paper` preset freezes them."""
        frozen = self._frozen_ids()
        return [
            parameter
            for module in self.modules()
            if isinstance(module, nn.LayerNorm)
            for parameter in module.parameters(recurse=False)
            if id(parameter) not in frozen
        ]

    def weights_hash(self) -> str:
        """SHA-256 of the frozen part: names, shapes and values of its weights, 64 hexadecimal digits."""
        frozen = self._frozen_ids()
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict(keep_vars=True).items()):
            if id(tensor) in frozen:
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _frozen_ids(self) -> set[int]:
        return {id(parameter) for module in self.frozen_modules() for parameter in module.parameters()}
