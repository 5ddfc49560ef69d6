"""Semantic affinity from raw attention (Eq. 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class AffinityHead(nn.Module):
    """A = sigmoid(1x1 conv(S + S^T)).

    Args:
        num_maps: n, attention maps per image.

    Source:
        Paper Eq. 3; which maps and which initialization: method.md section 1.
    """

    def __init__(self, num_maps: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(num_maps, 1, 1)
        nn.init.kaiming_normal_(self.mix.weight, a=math.sqrt(5), mode="fan_out")

    def forward(self, attention_logits: Tensor) -> Tensor:
        """Mix the maps of each image into one affinity.

        Args:
            attention_logits: (B, n, hw, hw) raw attention S.

        Returns:
            (B, hw, hw) affinity in (0, 1), symmetric.
        """
        # The convolution is linear, so mixing first and adding the transpose of one map instead of n is the same.
        weight = self.mix.weight.view(1, -1).to(attention_logits.dtype)
        batch, maps, tokens, _ = attention_logits.shape
        mixed = (weight @ attention_logits.reshape(batch, maps, -1)).view(batch, tokens, tokens).float()
        assert self.mix.bias is not None
        return torch.sigmoid(mixed + mixed.transpose(1, 2) + self.mix.bias.float())
