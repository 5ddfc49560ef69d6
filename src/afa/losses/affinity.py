"""Loss of the affinity between tokens (paper Eq. 5)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from afa.losses.count import TotalFunction, count


def affinity_loss(
    affinity: Tensor,
    affinity_label: Tensor,
    *,
    form: Literal["balanced", "paper"] = "balanced",
    total: TotalFunction | None = None,
) -> Tensor:
    """Pull the affinity of pairs of the same class to 1 and of other pairs to 0.

    Args:
        affinity: (B, hw, hw) in (0, 1).
        affinity_label: (B, hw, hw) in {0, 1, 255}.
        form: `balanced`, half of each sum over its count + 1 (published code); or `paper`, each sum over its count.
        total: Adds a count up over all processes; None with a single one.

    Returns:
        Scalar; a set without pairs contributes 0.

    Source:
        Paper Eq. 5 with its two sets exchanged: as printed it would reward wrong pairs.
    """
    positive, negative = affinity_label == 1, affinity_label == 0  # (B, hw, hw) each
    positive_sum = ((1 - affinity) * positive).sum()
    negative_sum = (affinity * negative).sum()
    if form == "paper":
        return positive_sum / count(positive, total) + negative_sum / count(negative, total)
    positive_mean = positive_sum / (count(positive, total, at_least=0) + 1)
    negative_mean = negative_sum / (count(negative, total, at_least=0) + 1)
    return 0.5 * positive_mean + 0.5 * negative_mean
