"""SegFormer's all-MLP decoder: every level to one width, to stride 4, summed, one class layer.

Its batch normalization goes over all processes, on any device and backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import conv2d

from afa.kernels.layers import under_autocast
from afa.kernels.resize import sum_levels


class MlpDecoder(nn.Module):
    """All-MLP segmentation decoder.

    SegFormer projects each level, upsamples, concatenates and fuses by a 1x1 convolution. A 1x1 convolution of a
    concatenation is the sum of one convolution per part; it commutes with bilinear upsampling; and nothing stands
    between projection and fusion. So this decoder has one layer a level, whose weight is the product of the two. It
    applies the layer at the level's own resolution, adds levels of one resolution there, and makes only the final
    sum at stride 4: the same function for a fraction of the work.

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
            channels_last = feature.contiguous(memory_format=torch.channels_last)
            fused = conv2d(channels_last, weight, None if sums else bias)  # (B, width, h_i, w_i)
            # An exported program must work for every size.
            if sums and not exporting and fused.shape == sums[-1].shape:
                sums[-1] = sums[-1] + fused
            else:
                sums.append(fused)
        total = self.norm(sum_levels(*sums)).relu_()  # (B, width, h_0, w_0)
        logits: Tensor = self.classify(self.dropout(total))  # (B, K, h_0, w_0)
        return logits

    def _fused_layers(self, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """(width, channels[i], 1, 1) weight of each level and (width,) bias of their sum, in the weights' precision."""
        # Under autocast the products would be rounded before anything is convolved.
        rounded = under_autocast(device.type)
        with torch.autocast(device.type, enabled=False) if rounded else contextlib.nullcontext():
            fuses = self.fuse.weight[:, :, 0, 0].chunk(len(self.projections), dim=1)  # (width, width) a level
            weights, biases = [], []
            for fuse, projection in zip(fuses, self.projections, strict=True):
                assert isinstance(projection, nn.Conv2d)
                assert projection.bias is not None
                weights.append((fuse @ projection.weight[:, :, 0, 0])[:, :, None, None])
                biases.append(fuse @ projection.bias)
            bias = torch.stack(biases).sum(0)  # (width,)
        # Batch normalization subtracts the bias again, so its gradient is 0. A computed gradient would be rounding
        # error, which AdamW turns into whole steps.
        return weights, bias.detach() + 0 * bias if self.norm.training else bias


class DistributedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of the batch over all processes.

    Without a process group it is `nn.BatchNorm2d`. PyTorch's own synchronized layer needs a GPU; this one also runs
    on gloo, so that N processes compute what one process with the whole batch computes.
    """

    alone = False  # True: of this process's batch, as where one process tries something out

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, H, W) by the statistics of each channel."""
        if not (
            self.training
            and not self.alone
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size() > 1
        ):
            return super().forward(input)
        x = input.float()  # (B, C, H, W)
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        sums = torch.cat([x.sum((0, 2, 3)), count])  # (C + 1,)
        sums = _SumOverProcesses.apply(sums)  # type: ignore[no-untyped-call]
        mean = sums[:-1] / sums[-1]  # (C,)
        centered = x - mean.view(1, -1, 1, 1)
        total = _SumOverProcesses.apply(centered.square().sum((0, 2, 3)))  # type: ignore[no-untyped-call]
        variance = total / sums[-1]  # (C,)
        if self.running_mean is not None and self.running_var is not None and self.momentum is not None:
            with torch.no_grad():
                unbiased = total / (sums[-1] - 1).clamp(min=1)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        normalized: Tensor = centered * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return normalized.to(input.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """Add a tensor up over all processes; each process's loss depends on the sum, so gradients add up too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
