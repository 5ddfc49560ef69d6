"""Batch normalization over all processes, on any device and backend."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class DistributedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of the batch over all processes.

    Without a process group it is `nn.BatchNorm2d`. PyTorch's own synchronized layer needs a GPU; this one also runs
    on gloo, so that N processes compute what one process with the whole batch computes.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, H, W) by the statistics of each channel."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        x = input.float()
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        sums = torch.cat([x.sum((0, 2, 3)), count])
        sums = _SumOverProcesses.apply(sums)  # type: ignore[no-untyped-call]
        mean = sums[:-1] / sums[-1]
        centered = x - mean.view(1, -1, 1, 1)
        total = _SumOverProcesses.apply(centered.square().sum((0, 2, 3)))  # type: ignore[no-untyped-call]
        variance = total / sums[-1]
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
