"""Affinity labels: which token pairs belong together (paper section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from afa.kernels.walk import window_mask
from afa.types import IGNORE_INDEX


def token_label(label: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize class indices and 255 to the token grid by nearest neighbor: (B, H, W) -> (B, h, w)."""
    resized = interpolate(label[:, None].float(), size=grid, mode="nearest")[:, 0]  # (B, h, w)
    return resized.to(label.dtype)


def affinity_label(label: Tensor, *, radius: int) -> Tensor:
    """Pair labels of the tokens of each image.

    Args:
        label: (B, h, w) class indices and 255, at token resolution.
        radius: Pairs farther apart than this Chebyshev distance are ignored, tokens.

    Returns:
        (B, hw, hw) uint8: 1 same class (background included), 0 different classes, 255 where either token is 255
        or the pair is too far apart.

    Source:
        Paper section 3.3, "Pseudo Affinity Label Generation".
    """
    flat = label.flatten(1)  # (B, hw)
    known = flat != IGNORE_INDEX
    counted = known[:, :, None] & known[:, None, :]  # (B, hw, hw)
    counted &= window_mask(label.shape[1], label.shape[2], radius, label.device)
    same = (flat[:, :, None] == flat[:, None, :]).to(torch.uint8)  # (B, hw, hw)
    return same.masked_fill_(~counted, IGNORE_INDEX)
