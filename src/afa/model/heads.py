"""Semantic affinity from raw attention (Eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from afa.kernels.affinity import symmetric_sigmoid
from afa.types import RawAttention


class AffinityHead(nn.Module):
    """A = sigmoid(1x1 conv(S + S^T)).

    Args:
        num_maps: n, attention maps per image.
        init: `published`, random weights; or `calibrated`, zeros until `calibrate` sees the first images.

    Source:
        Paper Eq. 3; docs/method.md, "Network", says which maps S has.
    """

    def __init__(self, num_maps: int, *, init: str = "published") -> None:
        super().__init__()
        self.mix = nn.Conv2d(num_maps, 1, 1)
        # Both draw the same random numbers, so that nothing else of a network depends on this start.
        nn.init.kaiming_normal_(self.mix.weight, a=math.sqrt(5), mode="fan_out")
        if init == "calibrated":
            for parameter in self.mix.parameters():
                nn.init.zeros_(parameter)

    def forward(self, attention: RawAttention, *, scale: float = 1.0) -> Tensor:
        """Mix the maps of each image into one affinity.

        Args:
            attention: Queries and keys of the n maps.
            scale: Factor of their products.

        Returns:
            (B, hw, hw) affinity in (0, 1), symmetric.
        """
        assert self.mix.bias is not None
        return symmetric_sigmoid(self._mixed(attention, scale), self.mix.bias)  # (B, hw, hw)

    @torch.no_grad()
    def calibrate(
        self, attention: RawAttention, pairs: Tensor, *, scale: float = 1.0, total: Callable[[Tensor], Tensor]
    ) -> None:
        """Start as the mean of all maps, with logits of mean 0 and standard deviation 1; weights that learned stay.

        Random weights make the sigmoid of raw Q K^T saturate for most pairs, and then the affinity has no gradient.

        Args:
            attention: Queries and keys of the n maps of some images.
            pairs: (B, hw, hw) bool, pairs of tokens that count.
            scale: As in `forward`.
            total: Adds a tensor up over all processes.
        """
        weight, bias = self.mix.weight, self.mix.bias
        assert bias is not None
        if weight.any():
            return
        weight.fill_(1.0)
        mixed = self._mixed(attention, scale).float()
        logits = (mixed + mixed.transpose(1, 2)).where(pairs, 0.0)  # (B, hw, hw)
        count, summed = total(torch.stack([pairs.sum().float(), logits.sum()]))
        mean = summed / count
        spread = (total((logits - mean).where(pairs, 0.0).square().sum()) / count).sqrt()
        # Where nothing differs, or nothing is finite, the affinity starts at 0.5 everywhere.
        factor = torch.where((spread > 0) & spread.isfinite(), 1 / spread, 0.0)
        weight.fill_(factor)
        bias.copy_(-(mean * factor).nan_to_num(0.0, 0.0, 0.0))

    def _mixed(self, attention: RawAttention, scale: float) -> Tensor:
        """(B, hw, hw) sum of the maps, each times its weight, not yet symmetric."""
        # The convolution is linear: the weighted sum of n products is one product of n times the depth, and adding
        # the transpose of the sum is the same as adding n transposes first.
        query, key = attention.query, attention.key
        weight = (self.mix.weight.view(1, -1, 1, 1) * scale).to(query.dtype)  # (1, n, 1, 1)
        joined = [part.transpose(1, 2).flatten(2) for part in (query * weight, key)]  # 2 x (B, hw, n d)
        return joined[0] @ joined[1].transpose(1, 2)  # (B, hw, hw)
