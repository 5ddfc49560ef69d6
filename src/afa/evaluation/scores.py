"""What a pass over a list of images counts, and the scores that come of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.config import SUPERVISION_NAMES
from afa.data.dataset import MaskedImages
from afa.evaluation.boundary import BoundaryConfusion
from afa.evaluation.confusion import ConfusionMatrix, image_scores
from afa.runs.run import ImageScore
from afa.runtime import Processes
from afa.types import IGNORE_INDEX


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of one pass over a list.

    Attributes:
        miou: Percent; NaN when no mask has a pixel of a class.
        per_class: IoU by class name, background first, in percent; None for classes that no mask has.
        protocol: Protocol of the segmentation. Pseudo labels have their own scales, those of `pseudo.scales`.
        labels: What was scored.
        num_images: Images scored, over all processes.
        seconds: Wall time.
        matrix: (K, K) int64 pixels; rows are the ground truth.
        extras: Further figures in percent. `tag_f1` (seg): micro-averaged F1 of the tags that the classifier
            finds (logit > 0), None when no image has tags. `coverage` (initial, refined): share of the
            labeled ground truth that the pseudo label decides; what it leaves uncertain is not scored.
            `boundary_iou`: mean boundary IoU, where it was asked for.
        boundary_per_class: As `per_class`, of the boundary IoU; empty unless it was asked for.
        refinement: What cam and propagated labels went through before they were scored: `par` or another of
            `pseudo.refinement`, `crf`, or both with a plus between; empty for none. Initial and refined labels
            name the CRF alone, as the rest is theirs by definition.
        supervision: What the network learned from, in the words of `SUPERVISION_NAMES`.
        images: Scores of the single images, in the order of the list.
        tags: (M, C) logits of the classifier for the M images with tags, and (M, C) their tags: 1, 0, or -1 where it
            is unknown; None but for seg.
    """

    miou: float
    per_class: dict[str, float | None]
    protocol: str
    labels: str
    num_images: int
    seconds: float
    matrix: NDArray[np.int64]
    extras: dict[str, float | None] = field(default_factory=dict)
    boundary_per_class: dict[str, float | None] = field(default_factory=dict)
    refinement: str = ""
    supervision: str = SUPERVISION_NAMES["tags"]
    images: tuple[ImageScore, ...] = ()
    tags: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes: everything but the logits of the tags, scores in percent with two decimals."""
        boundary = {name: rounded(iou) for name, iou in self.boundary_per_class.items()}
        return {
            "miou": rounded(self.miou),
            "per_class": {name: rounded(iou) for name, iou in self.per_class.items()},
            "protocol": self.protocol,
            "labels": self.labels,
            "supervision": self.supervision,
            "num_images": self.num_images,
            "seconds": round(self.seconds, 2),
            **({"refinement": self.refinement} if self.refinement else {}),
            **{name: rounded(value) for name, value in self.extras.items()},
            **({"boundary_per_class": boundary} if boundary else {}),
            "confusion": self.matrix.tolist(),
            "images": [asdict(each) for each in self.images],
        }


class Counts:
    """Counts during a pass. On a GPU nothing is read before the end, because reading synchronizes it."""

    def __init__(self, images: MaskedImages, labels: str, device: torch.device, *, boundary: bool) -> None:
        num_classes = 1 + len(images.classes)
        self.started = time.monotonic()
        self.images = images
        self.labels = labels
        self.device = device if device.type == "cuda" else torch.device("cpu")
        self.confusion = ConfusionMatrix(num_classes, device=self.device)
        self.outlines = BoundaryConfusion(num_classes, device=self.device) if boundary else None
        self.tags = torch.zeros(3, dtype=torch.int64, device=self.device)  # true positives, predicted, present
        self.pixels = torch.zeros(2, dtype=torch.int64, device=self.device)  # decided by the prediction, labeled
        self.rows = torch.zeros(len(images), 4, device=self.device)  # `image_scores` of each image
        self.logits = torch.zeros(len(images), len(images.classes) if labels == "seg" else 0, device=self.device)

    def add(self, index: int, mask: Tensor, prediction: Tensor) -> None:
        """Count the pixels of an image; those that the prediction leaves uncertain are not scored.

        Args:
            index: Its place in the list.
            mask: (H, W) uint8 class indices, 255 = not labeled.
            prediction: (H, W) class indices, 255 = uncertain.
        """
        prediction, truth = prediction.to(self.device), mask.to(self.device, non_blocking=True)
        decided = truth.masked_fill(prediction == IGNORE_INDEX, IGNORE_INDEX)
        self.pixels += torch.stack([(decided != IGNORE_INDEX).sum(), (truth != IGNORE_INDEX).sum()])
        self.rows[index] = image_scores(self.confusion.update(decided, prediction))
        if self.outlines is not None:
            self.outlines.update(decided, prediction)

    def add_tags(self, logits: Mapping[int, Tensor]) -> None:
        """Count the tags that the classifier finds (logit > 0).

        Args:
            logits: (C,) logits of images, by their index; those without tags are passed over.
        """
        tagged = [index for index in logits if self.images.has_tags(index)]
        if tagged:
            rows = torch.stack([logits[index] for index in tagged]).to(self.device)  # (B, C)
            for index, row in zip(tagged, rows, strict=True):
                self.logits[index] = row
            tags = torch.from_numpy(np.stack([self.images.targets(index) for index in tagged]))
            tags = tags.to(self.device, non_blocking=True)  # (B, C)
            found, present = (rows > 0) & (tags >= 0), tags > 0
            self.tags += torch.stack([(found & present).sum(), found.sum(), present.sum()])

    def sum_up(self, processes: Processes) -> None:
        """Add up over all processes, and synchronize the device."""
        matrices = [self.confusion, *([self.outlines.confusion] if self.outlines else [])]
        counts = [self.tags, self.pixels, *(each.matrix.flatten() for each in matrices)]
        sums = torch.split(processes.total(torch.cat(counts)).cpu(), [len(each) for each in counts])
        self.tags, self.pixels = sums[:2]
        self.rows, self.logits = (processes.total(each).cpu() for each in (self.rows, self.logits))
        for each, matrix in zip(matrices, sums[2:], strict=True):
            each.matrix = matrix.view_as(each.matrix)

    def scores(self) -> dict[str, Any]:
        """These counts as fields of an `EvaluationResult`."""
        extras: dict[str, float | None] = {}
        hits, found, present = self.tags.tolist()
        decided, labeled = self.pixels.tolist()
        if self.labels == "seg":
            extras["tag_f1"] = 100 * 2 * hits / (found + present) if found + present else None
        elif self.labels in ("initial", "refined"):
            extras["coverage"] = 100 * decided / labeled if labeled else None
        if self.outlines is not None:
            extras["boundary_iou"] = 100 * self.outlines.mean()
        return {
            "miou": 100 * self.confusion.miou(),
            "per_class": _by_name(self.confusion.per_class_iou(), self.images.classes),
            "boundary_per_class": _by_name(self.outlines.per_class_iou(), self.images.classes) if self.outlines else {},
            "matrix": self.confusion.matrix.numpy(),
            "images": tuple(self._image_scores()),
            "tags": self._tags(),
            "extras": extras,
            "seconds": time.monotonic() - self.started,
        }

    def _image_scores(self) -> Iterator[ImageScore]:
        names = ("background", *self.images.classes)
        for image, (iou, accuracy, place, share) in zip(self.images.names, self.rows.tolist(), strict=True):
            truth, prediction = divmod(int(place), len(names))
            pair = (names[truth], names[prediction]) if share > 0 else ("", "")
            yield ImageScore(image, rounded(100 * iou), rounded(100 * accuracy), *pair, rounded(100 * share))

    def _tags(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        tagged = [i for i in range(len(self.images)) if self.images.has_tags(i)]
        if self.labels != "seg" or not tagged:
            return None
        return self.logits[tagged].numpy(), np.stack([self.images.targets(i) for i in tagged])


def _by_name(ious: Sequence[float | None], classes: Sequence[str]) -> dict[str, float | None]:
    """Scores in percent by class name, background first."""
    percent = (None if iou is None else 100 * iou for iou in ious)
    return dict(zip(("background", *classes), percent, strict=True))


def rounded(percent: float | None) -> float | None:
    """A score as `--json` writes it: two decimals; None where there is none or it is NaN."""
    return None if percent is None or math.isnan(percent) else round(percent, 2)
