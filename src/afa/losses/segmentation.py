"""Loss of the segmentation against a pseudo label (paper Eq. 12)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from afa.losses.count import TotalFunction, count
from afa.types import IGNORE_INDEX


def segmentation_loss(
    seg_logits: Tensor,
    label: Tensor,
    *,
    form: Literal["balanced", "plain"] = "balanced",
    total: TotalFunction | None = None,
) -> Tensor:
    """Cross-entropy of the segmentation against a pseudo label.

    Args:
        seg_logits: (B, K, H, W).
        label: (B, H, W) int64 in 0..C and 255.
        form: `balanced`, half the mean over background pixels plus half the mean over foreground pixels; or
            `plain`, one mean over all labeled pixels.
        total: Adds a count up over all processes; None with a single one.

    Returns:
        Scalar; an empty set contributes exactly 0.

    Source:
        The paper says `plain`; `balanced` is the form of the published code (docs/differences.md).
    """
    target = label
    if seg_logits.device.type == "cpu":
        # A CPU is fastest where the scores of a pixel lie side by side.
        seg_logits, target = seg_logits.permute(0, 2, 3, 1).flatten(0, 2), label.flatten()  # (B H W, K), (B H W,)
    pixel_loss = F.cross_entropy(seg_logits, target, ignore_index=IGNORE_INDEX, reduction="none")
    pixel_loss = pixel_loss.view_as(label)  # (B, H, W)
    background = label == 0  # (B, H, W)
    foreground = (label != 0) & (label != IGNORE_INDEX)
    if form == "plain":
        return pixel_loss.sum() / count(background | foreground, total)
    background_loss = (pixel_loss * background).sum() / count(background, total)
    foreground_loss = (pixel_loss * foreground).sum() / count(foreground, total)
    return 0.5 * background_loss + 0.5 * foreground_loss
