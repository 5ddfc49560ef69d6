"""Two encoders side by side: the first knows what the image shows, the tokens of the second, such as DINO's, where.

Nothing outside this package sees that there are two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from afa.errors import AfaError
from afa.model.backbone import AttentionLayer, Backbone, BackboneOutput
from afa.model.registry import BACKBONES, build_backbone
from afa.types import RawAttention

_KEYS: Final = re.compile(r"\bmodel\.(backbone|weights|feature_levels)\b")
_CENTERING, _SHARPNESS = 1.2, 3.0


class PairedBackbone(Backbone):
    """An encoder, and a second one that stays frozen and adds feature levels.

    The second encoder sees the image at the size at which its tokens form the grid of the first one's last level: so
    patches of other sizes need no resampling of features. Classes, attention and all else are the first encoder's.

    Args:
        first: Encoder.
        second: Plain vision transformer, all of whose blocks are frozen.
        similarity: Let the agreement of tokens, along which class scores walk, be the similarity of the second
            encoder's tokens; off, it is the first encoder's.

    Source: Zhang et al. 2025 (WeCLIP+), frozen CLIP and DINO before one decoder; Lan et al. 2024 (ProxyCLIP),
        similarity of DINO's tokens for CLIP.
    """

    def __init__(self, first: Backbone, second: Backbone, *, similarity: bool = False) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.similarity = similarity
        # The last level stays the first encoder's, which the classifier reads.
        self.channels = (*first.channels[:-1], *second.channels, first.channels[-1])
        self.strides = (*first.strides[:-1], *(first.strides[-1],) * len(second.channels), first.strides[-1])
        self.num_attention_maps = first.num_attention_maps
        self.attention_scale = first.attention_scale
        self.min_size = first.min_size
        self.freeze_blocks = first.freeze_blocks
        self.num_prefix_tokens = first.num_prefix_tokens

    def forward(self, image: Tensor, *, attention: bool = False) -> BackboneOutput:
        """Encode a batch; see `Backbone.forward`."""
        output: BackboneOutput = self.first(image, attention=attention)
        *levels, last = output.features
        patch = self.second.strides[-1]
        size = [patch * side for side in last.shape[2:]]
        with torch.no_grad():
            # An exported program must work for every size, so it always resizes, even to the same size.
            if torch.compiler.is_compiling() or list(image.shape[2:]) != size:
                image = interpolate(image, size=size, mode="bilinear", align_corners=False)  # (B, 3, h patch, w patch)
            more = self.second(image).features  # (B, channels, h, w) each
            agreement = token_similarity(more[-1]) if self.similarity else output.agreement
        return BackboneOutput((*levels, *more, last), output.attention, agreement)

    def attention_of_levels(self, features: Sequence[Tensor]) -> RawAttention:
        """That of the first encoder; see `Backbone.attention_of_levels`."""
        return self.first.attention_of_levels(features)

    def attention_layers(self) -> Sequence[AttentionLayer]:
        """Those of the first encoder; see `Backbone.attention_layers`."""
        return self.first.attention_layers()

    def frozen_modules(self) -> Sequence[torch.nn.Module]:
        """Those of the first encoder, and the whole second one."""
        return [*self.first.frozen_modules(), self.second]


def token_similarity(feature: Tensor) -> Tensor:
    """How alike tokens are, as an attention.

    Args:
        feature: (B, D, h, w).

    Returns:
        (B, hw, hw), rows sum to 1: softmax of the cosines less 1.2 times their mean, times 3; 0 between two tokens
        where that is negative.
    """
    with torch.autocast(feature.device.type, enabled=False):
        tokens = normalize(feature.float().flatten(2), dim=1)  # (B, D, hw)
        cosines = tokens.transpose(1, 2) @ tokens  # (B, hw, hw)
        logits = _SHARPNESS * (cosines - _CENTERING * cosines.mean((1, 2), keepdim=True))
        apart = (logits < 0) & ~torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
        return logits.masked_fill(apart, -torch.inf).softmax(2)


def add_second(
    first: Backbone, name: str, weights: str | None, *, levels: int, similarity: bool = False
) -> PairedBackbone:
    """Put a second encoder beside an encoder.

    Args:
        first: Encoder.
        name: Plain vision transformer, key in `BACKBONES`.
        weights: As of `build_backbone`, but empty means the published ones where there are any; None means random ones.
        levels: Number of its feature maps.
        similarity: As of `PairedBackbone`.

    Raises:
        AfaError: As `build_backbone`; an encoder whose levels have grids of several sizes.
    """
    spec = BACKBONES.get(name)
    if spec is not None and spec.kind == "mit":
        raise AfaError(
            f"model.second_backbone is {name}, whose levels have grids of several sizes; use a plain vision "
            "transformer, such as dinov2_small_reg"
        )
    if spec is not None and weights == "":
        weights = spec.weights
    settings: dict[str, Any] = {"drop_path": 0.0, "attention_blocks": 1, "feature_levels": levels}
    try:
        second = build_backbone(name, weights or "", freeze_blocks=spec.size.depth if spec else 0, **settings)
    except AfaError as error:  # which names the keys of the first encoder
        raise AfaError(_KEYS.sub(r"model.second_\1", str(error))) from None
    return PairedBackbone(first, second, similarity=similarity)
