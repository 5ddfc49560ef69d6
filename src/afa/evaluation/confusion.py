"""The confusion matrix and the intersection over union that it gives.

Counts pixels; the caller decides which predictions are compared with which masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from afa.types import IGNORE_INDEX


class ConfusionMatrix:
    """Pixels counted by true and predicted class.

    Args:
        num_classes: K, background included.
        device: Where pixels are counted; a GPU is not synchronized.

    Attributes:
        matrix: (K, K) int64 pixels on `device`; rows are the ground truth, columns the prediction.

    >>> confusion = ConfusionMatrix(3)
    >>> pixels = confusion.update(torch.tensor([0, 0, 1, 255]), torch.tensor([0, 1, 1, 2]))
    >>> confusion.per_class_iou()
    [0.5, 0.5, None]
    >>> confusion.miou()
    0.5
    """

    def __init__(self, num_classes: int, *, device: torch.device | str = "cpu") -> None:
        assert 1 <= num_classes <= IGNORE_INDEX, num_classes
        self.num_classes = num_classes
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, label: Tensor | np.ndarray, prediction: Tensor | np.ndarray) -> Tensor:
        """Count the pixels of one or more images.

        Args:
            label: Ground truth of any shape, integers 0..K-1, or 255 where nothing is counted.
            prediction: Same shape, 0..K-1 wherever the label is not 255.

        Returns:
            (K, K) int64 pixels of these images alone, as `matrix`.
        """
        truth, predicted = (torch.as_tensor(values).to(self.matrix.device) for values in (label, prediction))
        assert truth.shape == predicted.shape, (truth.shape, predicted.shape)
        counted = truth != IGNORE_INDEX
        if self.matrix.device.type == "cpu":
            for name, values in (("label", truth[counted]), ("prediction", predicted[counted])):
                low, high = (int(value) for value in values.aminmax()) if len(values) else (0, 0)
                assert 0 <= low <= high < self.num_classes, f"{name} outside 0..{self.num_classes - 1}: {low}..{high}"
        # Shapes are static and no value is read: the ignored pixels go into a bin of their own.
        bins = self.matrix.numel()
        pairs = torch.where(counted, truth.long() * self.num_classes + predicted.long(), bins).flatten()
        counts = self.matrix.new_zeros(bins + 1).scatter_add_(0, pairs, torch.ones_like(pairs))
        pixels = counts[:-1].view_as(self.matrix)
        self.matrix += pixels
        return pixels

    def per_class_iou(self) -> list[float | None]:
        """Intersection over union of each class in [0, 1]; None where the ground truth has no such pixel."""
        matrix = self.matrix.cpu()
        correct = matrix.diagonal()
        truth, predicted = matrix.sum(1), matrix.sum(0)
        union = truth + predicted - correct
        return [int(c) / int(u) if t else None for c, u, t in zip(correct, union, truth, strict=True)]

    def miou(self) -> float:
        """Mean intersection over union in [0, 1] over the classes of the ground truth; NaN if it is all background.

        Source:
            docs/method.md, "Evaluation": the mean leaves out classes absent from the ground truth.
        """
        return mean_iou(self.per_class_iou())


def image_scores(pixels: Tensor) -> Tensor:
    """How well one image was segmented, and what was confused most; a GPU is not synchronized.

    Args:
        pixels: (K, K) int64, as of `ConfusionMatrix.matrix`.

    Returns:
        (4,) float32: IoU in [0, 1], the mean over the classes of the ground truth, background included; share of the
        pixels that are right; the most frequent confusion as row * K + column, and its share of the pixels. NaN where
        no pixel counts, but for the place.

    >>> image_scores(torch.tensor([[6, 2], [0, 2]])).tolist()
    [0.625, 0.800000011920929, 1.0, 0.20000000298023224]
    """
    correct, truth = pixels.diagonal(), pixels.sum(1)
    ious = correct / (truth + pixels.sum(0) - correct)
    there, total = truth > 0, truth.sum()
    most, place = (pixels - correct.diag()).flatten().max(0)
    mean = ious.masked_fill(~there, 0.0).sum() / there.sum()
    return torch.stack([mean, correct.sum() / total, place.float(), most / total])


def mean_iou(ious: Sequence[float | None]) -> float:
    """Mean over the K classes that have one, background first; NaN if none but the background has one."""
    present = [iou for iou in ious if iou is not None]
    return math.fsum(present) / len(present) if any(iou is not None for iou in ious[1:]) else math.nan
