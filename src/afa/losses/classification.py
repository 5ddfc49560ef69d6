"""Loss of the image-level tags (paper Eq. 11)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def classification_loss(image_logits: Tensor, tags: Tensor) -> Tensor:
    """Multi-label soft margin loss of the image's tags.

    Args:
        image_logits: (B, C).
        tags: (B, C) in {0, 1}, or -1 where it is not known whether the image has the class: without loss.

    Returns:
        Scalar, mean over images and classes.

    Source:
        Paper Eq. 11 with the minus sign that it lacks.
    """
    return F.multilabel_soft_margin_loss(image_logits, tags.clamp(min=0), weight=(tags >= 0).float())
