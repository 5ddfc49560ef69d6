"""SegFormer's all-MLP decoder: every level to one width, to stride 4, summed, one class layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from afa.model.norm import DistributedBatchNorm2d


class MlpDecoder(nn.Module):
    """All-MLP segmentation decoder.

    SegFormer projects each level, upsamples, concatenates and fuses by a 1x1 convolution. A 1x1 convolution of a
    concatenation is the sum of one convolution per part, and it commutes with bilinear upsampling, so
    each level is fused at its own resolution and only the sum happens at stride 4: the same function for a fraction
    of the work.

    Args:
        channels: Channels of each feature level, finest first.
        num_classes: K, background included.
        width: Channels between the layers.
        dropout: Probability of dropping a channel before the class layer.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, *, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.width = width
        self.projections = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.fuse = nn.Conv2d(width * len(channels), width, 1, bias=False)
        self.norm = DistributedBatchNorm2d(width)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Decode a feature pyramid.

        Args:
            features: One (B, channels[i], h_i, w_i) map a level, finest first.

        Returns:
            (B, K, h_0, w_0) logits.
        """
        size = features[0].shape[2:]
        fuse_weights = self.fuse.weight.chunk(len(features), dim=1)
        total: Tensor | None = None
        for level, feature in enumerate(features):
            fused = nn.functional.conv2d(self.projections[level](feature), fuse_weights[level])
            # An exported program must hold for every size.
            if torch.compiler.is_exporting() or fused.shape[2:] != size:
                fused = nn.functional.interpolate(fused, size=size, mode="bilinear", align_corners=False)
            total = fused if total is None else total + fused
        assert total is not None
        logits: Tensor = self.classify(self.dropout(nn.functional.relu(self.norm(total))))
        return logits
