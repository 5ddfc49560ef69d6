"""Random walk of CAMs over the affinity (paper Eq. 6 and 7; method.md section 5)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from afa.kernels.dispatch import fused
from afa.pseudo.affinity import window_mask
from afa.pseudo.scores import present_scores, with_background


def transition(affinity: Tensor, mask: Tensor, *, power: float, epsilon: float) -> Tensor:
    """Turn an affinity into a transition matrix.

    Args:
        affinity: (B, hw, hw) non-negative.
        mask: (hw, hw) bool; pairs outside carry nothing.
        power: alpha of Eq. 6.
        epsilon: Added to each degree; 0.1 in the reference, 0 in the paper.

    Returns:
        (B, hw, hw): row i holds what position i takes from every position; rows sum to degree / (degree + epsilon).

    Source:
        Paper Eq. 6. The reference divides by column sums and multiplies from the other side; for a symmetric
        affinity that is the same walk.
    """
    weights = (affinity * mask).pow(power)
    # Without epsilon the degree of a position that is like none may be 0; such a position takes nothing.
    degree = (weights.sum(1, keepdim=True) + epsilon).clamp(min=torch.finfo(weights.dtype).tiny)
    return (weights / degree).transpose(1, 2)


def mean_attention_affinity(attention_logits: Tensor, *, scale: float) -> Tensor:
    """Mean attention of the last blocks, for Table 3's "propagation with MHSA".

    Args:
        attention_logits: (B, n, hw, hw) raw Q K^T.
        scale: Factor before the softmax, 1 / sqrt(d).

    Returns:
        (B, hw, hw) in (0, 1): softmax attention averaged over maps and made symmetric.
    """
    attention = (attention_logits.float() * scale).softmax(-1).mean(1)
    return (attention + attention.transpose(1, 2)) / 2


def propagate(
    cam: Tensor,
    tags: Tensor,
    affinity: Tensor,
    *,
    grid: tuple[int, int],
    background: float,
    radius: int,
    power: float = 2.0,
    epsilon: float = 0.1,
    softmax: bool = True,
) -> Tensor:
    """Spread CAMs and a background score over the affinity, one step.

    Args:
        cam: (B, C, H, W) in [0, 1], any size.
        tags: (B, C), above 0 where present.
        affinity: (B, hw, hw).
        grid: (h, w) tokens of the affinity.
        background: Constant background score.
        radius: Chebyshev radius of the walk, tokens.
        power: alpha of Eq. 6.
        epsilon: Added to each degree.
        softmax: Softmax over background and present classes first (reference).

    Returns:
        (B, K, h, w) propagated scores; absent classes are 0.

    Source:
        Paper Eq. 7; softmax and background: method.md section 5.
    """
    small = interpolate(cam, size=grid, mode="bilinear", align_corners=False)
    scores = present_scores(with_background(small, background), tags, softmax=softmax)
    return spread(affinity, scores, radius=radius, power=power, epsilon=epsilon)


def spread(affinity: Tensor, scores: Tensor, *, radius: int, power: float, epsilon: float) -> Tensor:
    """Spread scores over the affinity: one step of the walk.

    On a GPU with Triton this is one kernel over the pairs within the radius; its sums, in float32, differ from those
    of the plain code by rounding.

    Args:
        affinity: (B, hw, hw) non-negative, of the dtype of the scores.
        scores: (B, P, h, w).
        radius: Chebyshev radius of the walk, tokens; not negative.
        power: alpha of Eq. 6.
        epsilon: Added to each degree.

    Returns:
        (B, P, h, w) `take_step` along the `transition` of the affinity within the radius.
    """
    wants_gradient = torch.is_grad_enabled() and (affinity.requires_grad or scores.requires_grad)
    # To the power of 0 the pairs beyond the radius count as well, and double precision is for checks.
    if fused(affinity.device) and power > 0 and affinity.dtype != torch.float64 and not wants_gradient:
        from afa.kernels.walk_triton import step

        return step(affinity, scores, radius=radius, power=power, epsilon=epsilon)
    mask = window_mask(scores.shape[2], scores.shape[3], radius, affinity.device)
    return take_step(transition(affinity, mask, power=power, epsilon=epsilon), scores)


def take_step(walk: Tensor, scores: Tensor) -> Tensor:
    """Let each token take its scores from the tokens it walks to.

    Args:
        walk: (B, hw, hw) transition matrix.
        scores: (B, P, h, w).

    Returns:
        (B, P, h, w).
    """
    return torch.bmm(walk, scores.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(scores.shape)
