"""The whole network: image in, class logits, class scores, segmentation logits and affinity out.

It never sees tags, files or configuration objects; pseudo labels and losses are made elsewhere from what it returns.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from afa.model.backbone import Backbone, BackboneOutput, FrozenTokens
from afa.model.decoder import MlpDecoder
from afa.model.heads import AffinityHead
from afa.model.registry import build_backbone
from afa.types import NetworkOutput


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
    ) -> None:
        super().__init__()
        if isinstance(backbone, str):
            backbone = build_backbone(backbone)
        self.num_classes = num_classes
        self.pooling = pooling
        self.pooling_percent = pooling_percent
        self.attention_factor = backbone.attention_scale if attention_scaling else 1.0
        self.backbone = backbone
        self.classifier = nn.Conv2d(backbone.channels[-1], num_classes, 1, bias=False)
        self.decoder = MlpDecoder(backbone.channels, num_classes + 1, width=decoder_width, dropout=decoder_dropout)
        self.affinity_head = AffinityHead(backbone.num_attention_maps)

    def forward(
        self, image: Tensor | FrozenTokens, *, segmentation: bool = True, affinity: bool = True
    ) -> NetworkOutput:
        """Run the training forward pass.

        Args:
            image: (B, 3, H, W) normalized image, or what the frozen part of the encoder made of it.
            segmentation: Also run the decoder.
            affinity: Also return affinity and attention.

        Returns:
            Everything asked for; `class_scores` carry no gradient.
        """
        encoded = self._encode(image, attention=affinity)
        output = self._classify(encoded)
        if segmentation:
            output = replace(output, seg_logits=self.decoder(encoded.features).float())  # (B, K, H / 4, W / 4)
        return output

    @torch.no_grad()
    def score(self, image: Tensor | FrozenTokens, affinity: bool = False) -> NetworkOutput:
        """Run a CAM pass: the encoder alone, without gradient, stochastic depth or change to any buffer.

        Args:
            image: (B, 3, H, W) normalized image, or what the frozen part of the encoder made of it; its `features` are
                not needed.
            affinity: Also return affinity and attention.

        Returns:
            `image_logits` and `class_scores`, and the affinity if asked for.
        """
        with _in_eval_mode(self.backbone):
            encoded = self._encode(image, attention=affinity)
        return self._classify(encoded)

    def segment(self, image: Tensor) -> Tensor:
        """Segment a batch.

        Args:
            image: (B, 3, H, W) normalized image.

        Returns:
            (B, K, H/4, W/4) logits.
        """
        logits: Tensor = self.decoder(self.backbone(image).features)
        return logits.float()

    def _encode(self, image: Tensor | FrozenTokens, *, attention: bool) -> BackboneOutput:
        if isinstance(image, FrozenTokens):
            from afa.model.vit import TokenBackbone

            assert isinstance(self.backbone, TokenBackbone)
            return self.backbone.trainable(image, attention=attention)
        encoded: BackboneOutput = self.backbone(image, attention=attention)
        return encoded

    def _classify(self, encoded: BackboneOutput) -> NetworkOutput:
        """All but the segmentation."""
        feature, attention = encoded.features[-1], encoded.attention  # (B, D, h, w)
        image_logits = self.classifier(self._pool(feature))[:, :, 0, 0]  # (B, C)
        # After the logits: autocast keeps the first copy of a weight, and one made here would have no gradient.
        with torch.no_grad():
            class_scores = nn.functional.conv2d(feature, self.classifier.weight).float()  # (B, C, h, w)
        return NetworkOutput(
            image_logits=image_logits.float(),
            class_scores=class_scores,
            affinity=None if attention is None else self.affinity_head(attention, scale=self.attention_factor),
            attention=attention,
            attention_scale=self.backbone.attention_scale,
        )

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
