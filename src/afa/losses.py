"""Losses of a training step (paper Eq. 5, 11, 12; method.md sections 4 and 6).

Means over pixels or pairs are over the batch of all processes: `total` adds a count up over them, and what a process
returns is then its share, so that the shares add up to the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from afa.types import IGNORE_INDEX

TotalFunction = Callable[[Tensor], Tensor]
"""Count of this process -> count over all processes."""


def classification_loss(image_logits: Tensor, tags: Tensor) -> Tensor:
    """Multi-label soft margin loss of the image's tags.

    Args:
        image_logits: (B, C).
        tags: (B, C) in {0, 1}.

    Returns:
        Scalar, mean over images and classes.

    Source:
        Paper Eq. 11 with the minus sign that it lacks.
    """
    return F.multilabel_soft_margin_loss(image_logits, tags)


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
            `plain`, one mean over all labelled pixels.
        total: Adds a count up over all processes; None with a single one.

    Returns:
        Scalar; an empty set contributes exactly 0.

    Source:
        Method.md section 6; `plain` is what the paper's text says.
    """
    pixel_loss = F.cross_entropy(seg_logits, label, ignore_index=IGNORE_INDEX, reduction="none")
    background = label == 0
    foreground = (label != 0) & (label != IGNORE_INDEX)
    if form == "plain":
        return pixel_loss.sum() / _count(background | foreground, total)
    background_loss = (pixel_loss * background).sum() / _count(background, total)
    foreground_loss = (pixel_loss * foreground).sum() / _count(foreground, total)
    return 0.5 * background_loss + 0.5 * foreground_loss


def affinity_loss(
    affinity: Tensor,
    affinity_label: Tensor,
    *,
    form: Literal["balanced", "paper"] = "balanced",
    total: TotalFunction | None = None,
) -> Tensor:
    """Pull the affinity of like pairs to 1 and of unlike pairs to 0.

    Args:
        affinity: (B, hw, hw) in (0, 1).
        affinity_label: (B, hw, hw) in {0, 1, 255}.
        form: `balanced`, halves over count + 1 (reference); or `paper`, bare counts and no halves.
        total: Adds a count up over all processes; None with a single one.

    Returns:
        Scalar; a set without pairs contributes 0.

    Source:
        Paper Eq. 5 with its two sets put right, as printed it would reward wrong pairs; method.md section 4.
    """
    positive, negative = affinity_label == 1, affinity_label == 0
    positive_sum = ((1 - affinity) * positive).sum()
    negative_sum = (affinity * negative).sum()
    if form == "paper":
        return positive_sum / _count(positive, total) + negative_sum / _count(negative, total)
    positive_mean = positive_sum / (_count(positive, total, at_least=0) + 1)
    negative_mean = negative_sum / (_count(negative, total, at_least=0) + 1)
    return 0.5 * positive_mean + 0.5 * negative_mean


def _count(mask: Tensor, total: TotalFunction | None, *, at_least: int = 1) -> Tensor:
    """Number of true elements, over all processes. An empty set sums to 0, so it may be divided by 1."""
    count = mask.sum()
    return (count if total is None else total(count)).clamp(min=at_least)
