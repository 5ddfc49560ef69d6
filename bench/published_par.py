"""Pixel-adaptive refinement, organized as in the published code: the plain side of `bench/par.py`.

Dilated 3x3 convolutions with one-hot filters pick the neighbors, one convolution per dilation, for the image and
again for the scores at every iteration. Every call computes its kernel again. The result equals that of
`afa.kernels.par.refine`. This version is slow; only the benchmark should use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DILATIONS = (1, 2, 4, 8, 12, 24)


class PublishedRefinement(nn.Module):
    """Refinement of score maps by the image they belong to.

    Args:
        dilations: Dilations of the 8 neighbors, pixels.
        iterations: How often the scores are averaged over their neighbors.
    """

    def __init__(self, dilations: Sequence[int] = DILATIONS, *, iterations: int = 10) -> None:
        super().__init__()
        self.dilations = tuple(dilations)
        self.iterations = iterations
        around = [cell for cell in range(9) if cell != 4]
        self.register_buffer("filters", torch.eye(9)[around].view(8, 1, 3, 3))
        steps = torch.tensor([(cell // 3 - 1, cell % 3 - 1) for cell in around]).float().norm(dim=1)
        distance = torch.cat([steps * dilation for dilation in self.dilations])
        self.register_buffer("distance", distance.view(1, 1, -1, 1, 1))
        self.filters: Tensor
        self.distance: Tensor

    def forward(self, image: Tensor, scores: Tensor) -> Tensor:
        """Refine.

        Args:
            image: (B, 3, H, W) RGB in [0, 1].
            scores: (B, P, h, w).

        Returns:
            (B, P, H, W).
        """
        scores = F.interpolate(scores, size=image.shape[2:], mode="bilinear", align_corners=True)
        kernel = self.kernel(image)
        for _ in range(self.iterations):
            scores = (self.neighbors(scores) * kernel).sum(2)
        return scores

    def kernel(self, image: Tensor) -> Tensor:
        """(B, 1, n, H, W) weights of the n neighbors."""
        colors = self.neighbors(image)
        spread = colors.std(2, keepdim=True)
        color = -(((colors - image.unsqueeze(2)).abs() / (spread + 1e-8) / 0.3) ** 2)
        place = -((self.distance / (self.distance.std(2, keepdim=True) + 1e-8) / 0.3) ** 2)
        return color.mean(1, keepdim=True).softmax(2) + 0.01 * place.softmax(2)

    def neighbors(self, maps: Tensor) -> Tensor:
        """(B, P, H, W) -> (B, P, n, H, W); beyond the border, the nearest border pixel stands for the neighbor."""
        batch, channels, height, width = maps.shape
        single = maps.reshape(batch * channels, 1, height, width)
        found = []
        for dilation in self.dilations:
            padded = F.pad(single, (dilation,) * 4, mode="replicate")
            around = F.conv2d(padded, self.filters, dilation=dilation)
            found.append(around.view(batch, channels, 8, height, width))
        return torch.cat(found, 2)
