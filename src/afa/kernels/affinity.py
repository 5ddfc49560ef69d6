"""The end of the affinity head: turns mixed attention maps into one symmetric affinity."""

from __future__ import annotations

import torch
from torch import Tensor

from afa.kernels.dispatch import fused_by


@fused_by("affinity_triton", when=lambda mixed, bias: not torch.is_grad_enabled())
def symmetric_sigmoid(mixed: Tensor, bias: Tensor) -> Tensor:
    """Compute sigmoid(M + M^T + bias) of each square matrix.

    Args:
        mixed: (B, n, n) of any floating point dtype.
        bias: One element, on the same device.

    Returns:
        (B, n, n) float32 in [0, 1], exactly symmetric.
    """
    mixed = mixed.float()
    return torch.sigmoid(mixed + mixed.transpose(1, 2) + bias.float())
