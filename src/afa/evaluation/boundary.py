"""Boundary IoU: how well the outlines of regions fit, whatever their size.

Turns label maps into maps of their outlines, which the confusion matrix then counts as it does any others.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from afa.evaluation.confusion import ConfusionMatrix, mean_iou
from afa.types import IGNORE_INDEX

WIDTH: Final = 0.02
"""Width of the band, as a share of the image's diagonal."""

_OUTSIDE: Final = 256.0  # no label: at the edge of the image regions end


class BoundaryConfusion:
    """Pixels near the outlines of regions, counted by true and predicted class.

    For each class, only a band along the inside of the outlines of its regions counts, in the ground truth and in the
    prediction. Where the ground truth is ignored, the prediction is ignored, too, and regions of both end there. A
    prediction that is right at all counted pixels therefore scores 1.

    Args:
        num_classes: K, background included.
        device: Where pixels are counted; a GPU is not synchronized.

    Attributes:
        confusion: Over K + 1 classes; the last is all that is in no band.

    Source:
        Cheng et al. 2021, with the counts of a class summed over all images.
    """

    def __init__(self, num_classes: int, *, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.confusion = ConfusionMatrix(num_classes + 1, device=device)

    def update(self, label: Tensor, prediction: Tensor) -> None:
        """Count the pixels of one image.

        Args:
            label: Ground truth, (H, W) integers 0..K-1, or 255 where nothing is counted.
            prediction: (H, W), 0..K-1 wherever the label is not 255.
        """
        ignored = label == IGNORE_INDEX
        truth, predicted = label.long(), prediction.long().masked_fill(ignored, IGNORE_INDEX)
        bands = (torch.where(outline(each), each, self.num_classes) for each in (truth, predicted))
        truth, predicted = (band.masked_fill(ignored, IGNORE_INDEX) for band in bands)
        self.confusion.update(truth, predicted)

    def per_class_iou(self) -> list[float | None]:
        """Boundary IoU of each of the K classes in [0, 1]; None where the ground truth has no such pixel."""
        return self.confusion.per_class_iou()[: self.num_classes]

    def mean(self) -> float:
        """Mean boundary IoU in [0, 1] over the classes of the ground truth; NaN if there is none."""
        return mean_iou(self.per_class_iou())


def outline(label: Tensor, *, width: float = WIDTH) -> Tensor:
    """Mark the pixels of each region that are near its outline or the edge of the image.

    A pixel is marked unless all pixels of the square around it, `width` of the diagonal to each side but at least one
    pixel, lie in the image and have its label: this is what as many erosions by 3 x 3 pixels leave of a region, taken
    from the region, for all classes at once.

    Args:
        label: (H, W) labels 0..255, ignored ones being labels like others.
        width: Reach, as a share of the diagonal.

    Returns:
        (H, W) bool.
    """
    height, columns = label.shape
    reach = max(1, round(width * math.hypot(height, columns)))
    padded = pad(label.float()[None, None], [reach] * 4, value=_OUTSIDE)
    values = torch.cat([padded, -padded])
    for window in ((2 * reach + 1, 1), (1, 2 * reach + 1)):
        values = max_pool2d(values, window, stride=1)
    return torch.ne(values[0, 0], -values[1, 0])
