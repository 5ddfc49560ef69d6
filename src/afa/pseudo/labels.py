"""Hard labels: the merge of two labels, the two thresholds, the valid box (paper Eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from afa.types import IGNORE_INDEX, inside_box


def merge_labels(label_low: Tensor, label_high: Tensor) -> Tensor:
    """Merge the label of the low background score with that of the high one.

    Args:
        label_low: (B, H, W) int64 label that claims foreground easily.
        label_high: (B, H, W) int64 label that claims foreground cautiously.

    Returns:
        (B, H, W) int64: the high-score label where it is foreground, 0 where both are background, else 255.

    Source:
        Paper Eq. 4 in the form of the published code; "Initial label" of docs/method.md.

    >>> merge_labels(torch.tensor([0, 2, 2]), torch.tensor([0, 0, 2])).tolist()
    [0, 255, 2]
    """
    uncertain = torch.where(label_low == 0, label_low, IGNORE_INDEX)
    return torch.where(label_high > 0, label_high, uncertain)


def threshold_label(cam: Tensor, tags: Tensor, *, low: float, high: float) -> Tensor:
    """Label by two thresholds on the best tagged class, as Eq. 4 is printed.

    Args:
        cam: (B, C, H, W).
        tags: (B, C), above 0 where present.
        low: beta_l; at or below it a pixel is background.
        high: beta_h; at or above it a pixel takes the best class.

    Returns:
        (B, H, W) int64 in 0..C and 255.
    """
    best, index = cam.masked_fill((tags <= 0)[:, :, None, None], -1.0).max(1)  # (B, C, H, W) -> (B, H, W)
    label = torch.full_like(index, IGNORE_INDEX)
    label[best <= low] = 0
    return torch.where(best >= high, index + 1, label)


def ignore_outside(label: Tensor, valid_box: Tensor) -> Tensor:
    """Put 255 outside the (B, 4) int64 valid boxes, (top, bottom, left, right) half open, of (B, H, W) int64 labels."""
    return torch.where(inside_box(valid_box, label.shape[1], label.shape[2]), label, IGNORE_INDEX)
