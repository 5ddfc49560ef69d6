"""The random walk of scores over an affinity (paper Eq. 6 and 7); on a GPU one fused kernel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from afa.kernels.dispatch import fused_by


@functools.lru_cache(maxsize=32)
def window_mask(height: int, width: int, radius: int, device: torch.device | None = None) -> Tensor:
    """Mark the pairs of tokens within a Chebyshev distance of each other.

    Args:
        height: Rows of tokens.
        width: Columns of tokens.
        radius: Largest row and column distance, tokens; radius 8 is a 17 x 17 window.
        device: Where the mask lies. Masks are cached, so treat them as read-only.

    Returns:
        (hw, hw) bool.

    >>> window_mask(1, 4, 1).int().tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    """
    rows = torch.arange(height, device=device).repeat_interleave(width)  # (hw,)
    columns = torch.arange(width, device=device).repeat(height)  # (hw,)
    near_rows = (rows[:, None] - rows[None, :]).abs() <= radius
    near_columns = (columns[:, None] - columns[None, :]).abs() <= radius
    return near_rows & near_columns  # (hw, hw)


def transition(affinity: Tensor, mask: Tensor, *, power: float, epsilon: float) -> Tensor:
    """Turn an affinity into a transition matrix.

    Args:
        affinity: (B, hw, hw) non-negative.
        mask: (hw, hw) bool; other pairs carry nothing.
        power: alpha of Eq. 6.
        epsilon: Added to each degree; 0.1 in the reference, 0 in the paper.

    Returns:
        (B, hw, hw): row i holds the shares that token i takes from all tokens; they sum to degree / (degree + epsilon).

    Source:
        Paper Eq. 6. The published code divides by column sums and multiplies from the other side; for a symmetric
        affinity that is the same walk.
    """
    weights = (affinity * mask).pow(power)
    # Without epsilon, the degree of a token without affinity to any other may be 0; such a token takes nothing.
    degree = (weights.sum(1, keepdim=True) + epsilon).clamp(min=torch.finfo(weights.dtype).tiny)  # (B, 1, hw)
    return (weights / degree).transpose(1, 2)


def _takes_pairs(affinity: Tensor, scores: Tensor, *, radius: int, power: float, epsilon: float) -> bool:
    """Whether the fused kernel is used: with the power 0, pairs beyond the radius count, too."""
    wants_gradient = torch.is_grad_enabled() and (affinity.requires_grad or scores.requires_grad)
    return power > 0 and affinity.dtype != torch.float64 and not wants_gradient


@fused_by("walk_triton", when=_takes_pairs)
def spread(affinity: Tensor, scores: Tensor, *, radius: int, power: float, epsilon: float) -> Tensor:
    """Spread scores over the affinity: one step of the walk.

    The fused kernel reads only the pairs within the radius, and rounds its sums differently from the reference.

    Args:
        affinity: (B, hw, hw) non-negative, of the dtype of the scores.
        scores: (B, P, h, w).
        radius: Chebyshev radius of the walk, tokens; not negative.
        power: alpha of Eq. 6.
        epsilon: Added to each degree.

    Returns:
        (B, P, h, w) what each token takes by the `transition` of the affinity within the radius.
    """
    mask = window_mask(scores.shape[2], scores.shape[3], radius, affinity.device)  # (hw, hw)
    rows = scores.flatten(2).transpose(1, 2)  # (B, P, h, w) -> (B, hw, P)
    walked = torch.bmm(transition(affinity, mask, power=power, epsilon=epsilon), rows)  # (B, hw, P)
    return walked.transpose(1, 2).reshape(scores.shape)  # (B, P, h, w)
