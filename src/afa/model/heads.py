"""Semantic affinity from raw attention (Eq. 3)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from afa.kernels.affinity import symmetric_sigmoid
from afa.types import RawAttention


class AffinityHead(nn.Module):
    """A = sigmoid(1x1 conv(S + S^T)).

    Args:
        num_maps: n, attention maps per image.

    Source:
        Paper Eq. 3; docs/method.md, "Network", says which maps S has.
    """

    def __init__(self, num_maps: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(num_maps, 1, 1)
        nn.init.kaiming_normal_(self.mix.weight, a=math.sqrt(5), mode="fan_out")

    def forward(self, attention: RawAttention, *, scale: float = 1.0) -> Tensor:
        """Mix the maps of each image into one affinity.

        Args:
            attention: Queries and keys of the n maps.
            scale: Factor of their products.

        Returns:
            (B, hw, hw) affinity in (0, 1), symmetric.
        """
        # The convolution is linear: the weighted sum of n products is one product of n times the depth, and adding
        # the transpose of the sum is the same as adding n transposes first.
        query, key = attention.query, attention.key
        weight = (self.mix.weight.view(1, -1, 1, 1) * scale).to(query.dtype)  # (1, n, 1, 1)
        joined = [part.transpose(1, 2).flatten(2) for part in (query * weight, key)]  # 2 x (B, hw, n d)
        mixed = joined[0] @ joined[1].transpose(1, 2)  # (B, hw, hw)
        assert self.mix.bias is not None
        return symmetric_sigmoid(mixed, self.mix.bias)  # (B, hw, hw)
