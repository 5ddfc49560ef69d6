"""The whole network: image in, class logits, class scores, segmentation logits and affinity out.

It never sees tags, files or configuration objects; pseudo labels and losses are made elsewhere from what it returns.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from afa.model.backbone import Backbone, BackboneOutput, Encoded
from afa.model.decoder import MlpDecoder
from afa.model.heads import AffinityHead
from afa.model.registry import build_backbone
from afa.types import NetworkOutput, RawAttention

if TYPE_CHECKING:
    from afa.model.language import TextClassifier

_TEXT_GAIN: Final = 0.4


class AfaNetwork(nn.Module):
    """Encoder, classifier, decoder and affinity head; users know it as `afa.Network`.

    Args:
        backbone: Encoder, or its name as in docs/backbones.md for random weights.
        num_classes: C, foreground classes; the decoder has C + 1.
        pooling: Global pooling of the classifier: `gmp`, `gap` or `topk` (Table 1).
        pooling_percent: Share of positions that `topk` averages, percent.
        decoder_width: Channels of the decoder.
        decoder_dropout: Dropout before the decoder's class layer.
        attention_scaling: Divide Q K^T by sqrt(d) before the affinity head, as the paper writes.
        affinity_init: How the affinity head starts: `published` or `calibrated`, see `AffinityHead`.
        text: What class scores come from instead of a classifier that learns; for a `LanguageBackbone`.

    >>> AfaNetwork("dinov2_tiny_reg", 5).segment(torch.zeros(1, 3, 64, 96)).shape
    torch.Size([1, 6, 8, 12])
    """

    def __init__(
        self,
        backbone: Backbone | str,
        num_classes: int,
        *,
        pooling: str = "gmp",
        pooling_percent: float = 25.0,
        decoder_width: int = 256,
        decoder_dropout: float = 0.1,
        attention_scaling: bool = False,
        affinity_init: str = "published",
        text: TextClassifier | None = None,
    ) -> None:
        super().__init__()
        if isinstance(backbone, str):
            backbone = build_backbone(backbone)
        self.num_classes = num_classes
        self.pooling = pooling
        self.pooling_percent = pooling_percent
        self.attention_factor = backbone.attention_scale if attention_scaling else 1.0
        self.backbone = backbone
        self.text = text
        if text is None:
            self.classifier = nn.Conv2d(backbone.channels[-1], num_classes, 1, bias=False)
        else:
            # The segmentation starts as what the words say, and learns what to add.
            self.text_gain = nn.Parameter(torch.tensor(_TEXT_GAIN))
        self.decoder = MlpDecoder(backbone.channels, num_classes + 1, width=decoder_width, dropout=decoder_dropout)
        self.affinity_head = AffinityHead(backbone.num_attention_maps, init=affinity_init)

    def forward(self, image: Tensor | Encoded, *, segmentation: bool = True, affinity: bool = True) -> NetworkOutput:
        """Run the training forward pass.

        Args:
            image: (B, 3, H, W) normalized image, or what `encode` made of it.
            segmentation: Also run the decoder.
            affinity: Also return affinity and attention.

        Returns:
            Everything asked for; `class_scores` carry no gradient.
        """
        if isinstance(image, Encoded):
            return self._from_encoded(image, segmentation=segmentation, affinity=affinity)
        encoded: BackboneOutput = self.backbone(image, attention=affinity)
        output = self.classify(encoded)
        if segmentation:
            output = replace(output, seg_logits=self._segment(encoded.features))  # (B, K, H / 4, W / 4)
        return output

    @torch.no_grad()
    def score(self, image: Tensor | Encoded, affinity: bool = False) -> NetworkOutput:
        """Run a CAM pass: the encoder alone, without gradient, stochastic depth or change to any buffer.

        Args:
            image: (B, 3, H, W) normalized image, or what `encode` made of it.
            affinity: Also return affinity and attention.

        Returns:
            `image_logits` and `class_scores`, and the affinity if asked for.
        """
        if isinstance(image, Encoded):
            return self._from_encoded(image, segmentation=False, affinity=affinity)
        with _in_eval_mode(self.backbone):
            encoded: BackboneOutput = self.backbone(image, attention=affinity)
        return self.classify(encoded)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Encoded:
        """Run a frozen encoder as `score` does: what the other methods need of an image, to be kept for them.

        Args:
            image: (B, 3, H, W) normalized image.
        """
        assert self.text is not None
        with _in_eval_mode(self.backbone):
            encoded: BackboneOutput = self.backbone(image)
        return Encoded(encoded.features, self.classify(encoded).class_scores)

    def segment(self, image: Tensor) -> Tensor:
        """Segment a batch.

        Args:
            image: (B, 3, H, W) normalized image.

        Returns:
            (B, K, H/4, W/4) logits.
        """
        return self._segment(self.backbone(image).features)

    def _segment(self, features: Sequence[Tensor]) -> Tensor:
        logits: Tensor = self.decoder(features).float()  # (B, K, h, w)
        if self.text is None:
            return logits
        words = self.text_gain * self.text(features[-1])  # (B, C, h, w)
        return logits + nn.functional.pad(words, (0, 0, 0, 0, 1, 0))

    def _from_encoded(self, kept: Encoded, *, segmentation: bool, affinity: bool) -> NetworkOutput:
        """The same output from what `encode` made."""
        assert self.text is not None
        features = [feature.float() for feature in kept.features]
        attention = self.backbone.attention_of_levels(features) if affinity else None
        return NetworkOutput(
            image_logits=self.text(features[-1]).amax((2, 3)),
            class_scores=kept.class_scores.float(),
            seg_logits=self._segment(features) if segmentation else None,
            **self._affinity(attention),
        )

    def classify(self, encoded: BackboneOutput, *, text: TextClassifier | None = None) -> NetworkOutput:
        """Compute all but the segmentation.

        Args:
            encoded: What the backbone made of images; its last level is enough.
            text: What class scores come from instead of the network's own words; for a `LanguageBackbone`.
        """
        feature, text = encoded.features[-1], text or self.text  # (B, D, h, w)
        if text is not None:
            assert encoded.agreement is not None
            logits = text(feature)  # (B, C, h, w)
            image_logits, class_scores = logits.amax((2, 3)), text.scores(logits, encoded.agreement).detach()
        else:
            image_logits = self.classifier(self._pool(feature))[:, :, 0, 0].float()  # (B, C)
            # After the logits: autocast keeps the first copy of a weight, and one made here would have no gradient.
            with torch.no_grad():
                class_scores = nn.functional.conv2d(feature, self.classifier.weight).float()  # (B, C, h, w)
        return NetworkOutput(image_logits, class_scores, **self._affinity(encoded.attention))

    def _affinity(self, attention: RawAttention | None) -> dict[str, Any]:
        """The fields of an output that come from the attention."""
        return {
            "affinity": None if attention is None else self.affinity_head(attention, scale=self.attention_factor),
            "attention": attention,
            "attention_scale": self.backbone.attention_scale,
        }

    def _pool(self, feature: Tensor) -> Tensor:
        """Pool (B, D, h, w) over space to (B, D, 1, 1)."""
        if self.pooling == "gmp":
            return feature.amax((2, 3), keepdim=True)  # (B, D, 1, 1)
        if self.pooling == "gap":
            return feature.mean((2, 3), keepdim=True)  # (B, D, 1, 1)
        assert self.pooling == "topk", self.pooling
        flat = feature.flatten(2)  # (B, D, h w)
        count = max(1, math.ceil(flat.shape[2] * self.pooling_percent / 100))
        return flat.topk(count, dim=2).values.mean(2)[:, :, None, None]  # (B, D, 1, 1)


Network = AfaNetwork


@contextlib.contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch the training flag of a module and its parts off, and back to what each had."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training
