"""How good the maps of one image are, and in plain words why they are not better. Masks serve this page alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from afa.evaluation.confusion import ConfusionMatrix
from afa.explore.encoded import EncodedImage, Pixels, Stages, at_size
from afa.types import IGNORE_INDEX

ORDERS: Final = {
    "list": "as listed",
    "iou": "worst IoU first",
    "certainty": "least certain first",
    "agreement": "CAM and prediction differ most",
}
"""Orders of the images, and what the page calls them."""

_MISSED: Final = 0.5
_MANY: Final = 0.1
_LINES: Final = 3


@dataclass(frozen=True)
class ImageScores:
    """What one image is ordered by, in percent; None where nothing tells.

    Attributes:
        iou: Mean IoU of the prediction over the classes of the mask.
        certainty: Mean softmax of the predicted classes.
        agreement: Mean IoU of CAM label and prediction.
    """

    iou: float | None
    certainty: float | None
    agreement: float | None


def score_image(seen: EncodedImage, stages: Stages, num_classes: int) -> ImageScores:
    """Score the prediction of an image; without a prediction nothing is scored."""
    if stages.prediction is None or stages.certainty is None:
        return ImageScores(None, None, None)
    predicted = at_size(stages.prediction, seen.pixels.shape[:2])
    cam = at_size(stages.cam_label, predicted.shape)
    return ImageScores(
        iou=None if seen.truth is None else mean_iou(_to_mask(seen, predicted), seen.truth, num_classes),
        certainty=100 * float(stages.certainty.mean()),
        agreement=_agreement(predicted, cam, num_classes) if seen.tags.any() else None,
    )


def _agreement(one: Pixels, other: Pixels, num_classes: int) -> float:
    """Mean IoU of two labels in percent, over the classes of the second, or of the first if that has none."""
    found = mean_iou(one, other, num_classes)
    found = mean_iou(other, one, num_classes) if found is None else found
    return 100.0 if found is None else found


def mean_iou(label: Pixels, truth: Pixels, num_classes: int) -> float | None:
    """Mean IoU in percent over the classes of `truth`, 255 in either left out; None where it has none but background.

    Args:
        label: (H, W) uint8 in 0..C and 255.
        truth: (H, W) likewise.
        num_classes: C.
    """
    counted = np.where(label == IGNORE_INDEX, IGNORE_INDEX, truth)
    confusion = ConfusionMatrix(1 + num_classes)
    confusion.update(counted, np.where(label == IGNORE_INDEX, 0, label))
    found = confusion.miou()
    return None if math.isnan(found) else 100 * found


def _to_mask(seen: EncodedImage, label: Pixels) -> Pixels:
    """A label at the size of the mask, which is that of the file."""
    return label if label.shape == seen.size else at_size(torch.from_numpy(label), seen.size)


def explain(seen: EncodedImage, stages: Stages, classes: Sequence[str], tags: NDArray[np.float32]) -> list[str]:
    """Say in plain words what is wrong with the prediction and which stage of the method began it.

    Args:
        seen: The image.
        stages: Its maps.
        classes: C names.
        tags: (C,) the tags that made the pseudo label.
    """
    if stages.prediction is None or stages.certainty is None:
        return ["The segmentation knows only the classes of the run; CAM and pseudo label look for your words."]
    if seen.truth is None:
        scores = score_image(seen, stages, len(classes))
        lines = [
            "There is no mask of this image, so nothing measures the prediction. Its pixels are "
            f"{scores.certainty:.0f} % certain on average"
            + ("" if scores.agreement is None else f", and it agrees with the CAM to {scores.agreement:.0f} % IoU")
            + "."
        ]
        return lines + ([] if tags.any() else ["No tag is on, so CAM and pseudo label are background."])
    judge = _Judge(seen, stages, classes, tags)
    faults = sorted(judge.faults(), reverse=True)[:_LINES]
    return [line for _, line in faults] or [judge.weakest()]


class _Judge:
    """Compares the stages of an image with its mask, class by class."""

    def __init__(self, seen: EncodedImage, stages: Stages, classes: Sequence[str], tags: NDArray[np.float32]) -> None:
        assert seen.truth is not None
        assert stages.prediction is not None
        self.truth, self.classes, self.tags = seen.truth, ("background", *classes), tags
        size = seen.size
        self.prediction = at_size(stages.prediction, size)
        self.cam = at_size(stages.cam_label, size)
        self.pseudo = at_size(stages.pseudo, size)
        self.counted = seen.truth != IGNORE_INDEX

    def faults(self) -> Iterator[tuple[int, str]]:
        """Wrong pixels and a sentence for each class that is badly wrong."""
        for c in range(1, len(self.classes)):
            true, found = self.truth == c, (self.prediction == c) & self.counted
            missed, extra = int((true & ~found).sum()), int((found & ~true).sum())
            if true.any() and missed > _MISSED * int(true.sum()):
                yield missed, self._missed(c, true, missed)
            if extra > _MANY * int(self.counted.sum()) or (true.any() and extra > _MISSED * int(true.sum())):
                yield extra, self._extra(c, found & ~true, has=bool(true.any()))

    def weakest(self) -> str:
        """Which class has the lowest IoU, where none is badly wrong."""
        confusion = ConfusionMatrix(len(self.classes))
        confusion.update(self.truth, self.prediction)
        known = [(iou, c) for c, iou in enumerate(confusion.per_class_iou()) if iou is not None]
        iou, c = min(known, default=(1.0, 0))
        if iou == 1:
            return "The prediction is the mask."
        others = np.bincount(self.prediction[self.truth == c], minlength=256)
        taken = np.bincount(self.truth[(self.prediction == c) & self.counted], minlength=256)
        others[c] = taken[c] = 0
        lost, grown = int(others.max()), int(taken.max())
        way = f"much of it became {self.classes[int(others.argmax())]!r}"
        if grown > lost:
            way = f"it takes pixels of {self.classes[int(taken.argmax())]!r}"
        return f"No class is badly wrong. The lowest IoU, {iou:.0%}, is that of {self.classes[c]!r}: {way}."

    def _missed(self, c: int, true: NDArray[np.bool_], missed: int) -> str:
        name, total = self.classes[c], int(true.sum())
        line = f"The prediction misses {_percent(missed, total)} of {name!r}; {self._taker(self.prediction, c, true)}."
        in_cam, in_label = (_share((each == c) & true, true) for each in (self.cam, self.pseudo))
        if not self.tags[c - 1]:
            return f"{line} It is no tag of this image, so no pseudo label can show it."
        if in_cam < _MISSED:
            return (
                f"{line} Its CAM covers only {in_cam:.0%} of it: the classifier looks at a part. Lower background "
                "scores or a wider walk would label more."
            )
        if in_label < _MISSED:
            return (
                f"{line} The CAM covers {in_cam:.0%} of it, but the pseudo label keeps {in_label:.0%}: there "
                f"{self._taker(self.pseudo, c, true)}. Background scores, walk or refinement lose it."
            )
        right = _share(true & (self.pseudo == c), self.counted & (self.pseudo == c))
        if right < _MISSED:
            return (
                f"{line} The pseudo label has it, but only {right:.0%} of what it calls {name!r} is that: the CAM "
                "spreads, which teaches the segmentation little."
            )
        return (
            f"{line} The pseudo label has {in_label:.0%} of it, so the label is not at fault: the segmentation "
            "has not learned it."
        )

    def _taker(self, label: Pixels, c: int, true: NDArray[np.bool_]) -> str:
        """What most of a class became in a label that lacks it."""
        others = np.bincount(label[true], minlength=256)
        others[c] = 0
        most = int(others.argmax())
        share = _percent(int(others.max()), int(true.sum()))
        return f"{share} stayed open" if most == IGNORE_INDEX else f"{share} became {self.classes[most]!r}"

    def _extra(self, c: int, extra: NDArray[np.bool_], *, has: bool) -> str:
        name, total = self.classes[c], int(self.counted.sum())
        where = "beyond its mask" if has else "though the mask has none"
        line = f"The prediction puts {name!r} on {_percent(int(extra.sum()), total)} of the image {where}."
        shared = _share((self.pseudo == c) & extra, extra)
        if not self.tags[c - 1]:
            return f"{line} It is no tag: the segmentation, which sees no tags, takes something else for it."
        if shared >= _MISSED:
            return (
                f"{line} The pseudo label does so too ({shared:.0%} of it): the CAM spreads. Higher background scores "
                "would label less."
            )
        return f"{line} The pseudo label does not ({shared:.0%} of it): the segmentation adds it."


def _share(part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> float:
    return float(part.sum() / max(1, whole.sum()))


def _percent(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.0%}"
