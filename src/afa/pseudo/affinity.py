"""Affinity labels: which token pairs belong together (paper section 3.3; method.md section 4)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from afa.types import IGNORE_INDEX


@functools.lru_cache(maxsize=32)
def window_mask(height: int, width: int, radius: int, device: torch.device | None = None) -> Tensor:
    """Mark the pairs of tokens within a Chebyshev distance of each other.

    Args:
        height: Rows of tokens.
        width: Columns of tokens.
        radius: Largest row and column distance, tokens; radius 8 is a 17 x 17 window.
        device: Where the mask lies; results are cached, so treat them as read-only.

    Returns:
        (hw, hw) bool.

    >>> window_mask(1, 4, 1).int().tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    """
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    near_rows = (rows[:, None] - rows[None, :]).abs() <= radius
    near_columns = (columns[:, None] - columns[None, :]).abs() <= radius
    return near_rows & near_columns


def token_label(label: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a label map to the token grid by nearest neighbor.

    Args:
        label: (B, H, W) class indices and 255.
        grid: (h, w).

    Returns:
        (B, h, w), same dtype.
    """
    resized = interpolate(label[:, None].float(), size=grid, mode="nearest")[:, 0]
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
        Paper section 3.3, "Pseudo Affinity Label Generation"; method.md section 4.
    """
    flat = label.flatten(1)
    known = flat != IGNORE_INDEX
    counted = known[:, :, None] & known[:, None, :]
    counted &= window_mask(label.shape[1], label.shape[2], radius, label.device)
    same = (flat[:, :, None] == flat[:, None, :]).to(torch.uint8)
    return same.masked_fill_(~counted, IGNORE_INDEX)
