"""The confusion matrix and the intersection over union that it gives.

Counts pixels; which predictions are compared with which masks is up to the caller.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from afa.types import IGNORE_INDEX


class ConfusionMatrix:
    """Pixels counted by true and predicted class.

    Args:
        num_classes: K, background included.

    Attributes:
        matrix: (K, K) int64 pixels; rows are the ground truth, columns the prediction.

    >>> confusion = ConfusionMatrix(3)
    >>> confusion.update(torch.tensor([0, 0, 1, 255]), torch.tensor([0, 1, 1, 2]))
    >>> confusion.per_class_iou()
    [0.5, 0.5, None]
    >>> confusion.miou()
    0.5
    """

    def __init__(self, num_classes: int) -> None:
        assert 1 <= num_classes <= IGNORE_INDEX, num_classes
        self.num_classes = num_classes
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, label: Tensor | np.ndarray, prediction: Tensor | np.ndarray) -> None:
        """Count the pixels of one or more images.

        Args:
            label: Ground truth of any shape, integers 0..K-1, or 255 where nothing is counted.
            prediction: Same shape, 0..K-1 wherever the label is not 255.
        """
        truth, predicted = torch.as_tensor(label), torch.as_tensor(prediction)
        assert truth.shape == predicted.shape, (truth.shape, predicted.shape)
        counted = truth != IGNORE_INDEX
        truth = truth[counted].long()
        predicted = predicted.to(truth.device)[counted].long()
        if not len(truth):
            return
        for name, values in (("label", truth), ("prediction", predicted)):
            low, high = (int(value) for value in values.aminmax())
            assert 0 <= low <= high < self.num_classes, f"{name} outside 0..{self.num_classes - 1}: {low}..{high}"
        pairs = torch.bincount(truth * self.num_classes + predicted, minlength=self.num_classes**2)
        self.matrix += pairs.view(self.num_classes, self.num_classes).cpu()

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another matrix over the same classes."""
        assert other.num_classes == self.num_classes, (other.num_classes, self.num_classes)
        self.matrix += other.matrix

    def per_class_iou(self) -> list[float | None]:
        """Intersection over union of each class in [0, 1]; None where the ground truth has no such pixel."""
        correct = self.matrix.diagonal()
        truth, predicted = self.matrix.sum(1), self.matrix.sum(0)
        union = truth + predicted - correct
        return [int(c) / int(u) if t else None for c, u, t in zip(correct, union, truth, strict=True)]

    def miou(self) -> float:
        """Mean intersection over union in [0, 1] over the classes of the ground truth; NaN if there is none.

        Source:
            method.md section 8: classes absent from the ground truth are left out of the mean.
        """
        present = [iou for iou in self.per_class_iou() if iou is not None]
        return math.fsum(present) / len(present) if present else math.nan
