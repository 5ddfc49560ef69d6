"""SegFormer's all-MLP decoder: every level to one width, to stride 4, summed, one class layer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from afa.kernels.layers import under_autocast
from afa.kernels.resize import sum_levels
from afa.model.norm import DistributedBatchNorm2d


class MlpDecoder(nn.Module):
    """All-MLP segmentation decoder.

    SegFormer projects each level, upsamples, concatenates and fuses by a 1x1 convolution. A 1x1 convolution of a
    concatenation is the sum of one convolution per part; it commutes with bilinear upsampling; and nothing stands
    between projection and fusion. So the two layers of a level are one whose weight is the product of theirs, every
    level goes through it at its own resolution, levels of one resolution are added there, and only the sum happens at
    stride 4: the same function for a fraction of the work.

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
        exporting = torch.compiler.is_exporting()
        weights, bias = self._fused_layers(features[0].device)
        sums: list[Tensor] = []
        for feature, weight in zip(features, weights, strict=True):
            fused = conv2d(feature.contiguous(memory_format=torch.channels_last), weight, None if sums else bias)
            # An exported program must hold for every size.
            if sums and not exporting and fused.shape == sums[-1].shape:
                sums[-1] = sums[-1] + fused
            else:
                sums.append(fused)
        logits: Tensor = self.classify(self.dropout(self.norm(sum_levels(*sums)).relu_()))
        return logits

    def _fused_layers(self, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """(width, channels[i], 1, 1) weight of each level and (width,) bias of their sum, in the weights' precision."""
        # Under autocast the products would be rounded before anything is convolved.
        rounded = under_autocast(device.type)
        with torch.autocast(device.type, enabled=False) if rounded else contextlib.nullcontext():
            fuses = self.fuse.weight[:, :, 0, 0].chunk(len(self.projections), dim=1)
            weights, biases = [], []
            for fuse, projection in zip(fuses, self.projections, strict=True):
                assert isinstance(projection, nn.Conv2d)
                assert projection.bias is not None
                weights.append((fuse @ projection.weight[:, :, 0, 0])[:, :, None, None])
                biases.append(fuse @ projection.bias)
            bias = torch.stack(biases).sum(0)
        # Batch normalization takes the bias away again. Its gradient is 0; computed, it is rounding, of which AdamW
        # makes whole steps.
        return weights, bias.detach() + 0 * bias if self.norm.training else bias
