"""Counts over the batch of all processes; losses divide their sums by them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

TotalFunction = Callable[[Tensor], Tensor]
"""Count of this process -> count over all processes."""


def count(mask: Tensor, total: TotalFunction | None, *, at_least: int = 1) -> Tensor:
    """Count true elements, over all processes.

    Args:
        mask: Boolean tensor of this process.
        total: Adds the count up over all processes; None with a single one.
        at_least: Smallest result; the sum over an empty set is 0, so 1 may divide it.

    Returns:
        Scalar, int64.
    """
    number = mask.sum()
    return (number if total is None else total(number)).clamp(min=at_least)
