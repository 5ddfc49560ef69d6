"""The affinity that CAMs walk along, and the walk itself with its background score (paper Eq. 7)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import interpolate

from afa.config import PseudoConfig
from afa.kernels.walk import spread
from afa.pseudo.scores import present_scores, with_background


def mean_attention_affinity(attention_logits: Tensor, *, scale: float) -> Tensor:
    """Mean attention of the last blocks, for Table 3's "propagation with MHSA".

    Args:
        attention_logits: (B, n, hw, hw) raw Q K^T.
        scale: Factor before the softmax, 1 / sqrt(d).

    Returns:
        (B, hw, hw) in (0, 1): softmax attention averaged over maps and made symmetric.
    """
    attention = (attention_logits.float() * scale).softmax(-1).mean(1)  # (B, n, hw, hw) -> (B, hw, hw)
    return (attention + attention.transpose(1, 2)) / 2


def propagate(
    cam: Tensor,
    tags: Tensor,
    affinity: Tensor,
    *,
    grid: tuple[int, int],
    background: float,
    config: PseudoConfig,
) -> Tensor:
    """Spread CAMs and a background score over the affinity, one step.

    Args:
        cam: (B, C, H, W) in [0, 1], any size.
        tags: (B, C), above 0 where present.
        affinity: (B, hw, hw).
        grid: (h, w) tokens of the affinity.
        background: Constant background score.
        config: Radius, power and epsilon of the walk, and whether the scores go through a softmax first.

    Returns:
        (B, K, h, w) propagated scores; absent classes are 0.

    Source:
        Paper Eq. 7; the published code puts the background score and the softmax before the walk.
    """
    small = interpolate(cam, size=grid, mode="bilinear", align_corners=False)  # (B, C, h, w)
    scores = present_scores(with_background(small, background), tags, softmax=config.softmax_scores)  # (B, K, h, w)
    return walk(affinity, scores, config)


def walk(affinity: Tensor, scores: Tensor, config: PseudoConfig) -> Tensor:
    """Spread scores over the affinity with the settings of a configuration: (B, P, h, w) -> (B, P, h, w)."""
    radius, power, epsilon = config.affinity_radius, config.affinity_power, config.walk_epsilon
    for _ in range(config.walk_steps):
        scores = spread(affinity, scores, radius=radius, power=power, epsilon=epsilon)  # (B, P, h, w)
    return scores
