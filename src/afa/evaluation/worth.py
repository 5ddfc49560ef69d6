"""What a result is worth where there are no masks: what CAM and prediction cover, and how far they agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from afa.config import Config
from afa.data.dataset import TaggedImages
from afa.evaluation.confusion import ConfusionMatrix
from afa.evaluation.evaluate import Sample, image_batches
from afa.evaluation.once import OncePerView, once_per_view
from afa.evaluation.protocols import logit_maps, pseudo_labels
from afa.model.network import AfaNetwork
from afa.runtime import ALONE
from afa.types import IGNORE_INDEX

NOTHING: Final = 0.5
"""Percent of an image: a map that covers less is a failure."""

EVERYTHING: Final = 95.0
"""Percent of an image: a map that covers more is a failure, unless the object fills the image."""

MOST_IMAGES: Final = 500
"""Images that are looked at, evenly spread."""

_THRESHOLD_IMAGES: Final = 24
_UNCERTAIN: Final = 8
_STEP: Final = 0.1
_OFTEN: Final = 0.5
_FEW: Final = 3


@dataclass(frozen=True)
class Coverage:
    """Of a class's map, over the images that are tagged with it.

    Attributes:
        images: How many there are.
        mean: Percent of the pixels, mean over the images.
        nothing: Images of which it covers less than `NOTHING`.
        everything: Images of which it covers more than `EVERYTHING`.
    """

    images: int
    mean: float
    nothing: int
    everything: int

    @classmethod
    def of(cls, shares: np.ndarray) -> Coverage:
        """That of the (N,) shares of N images, percent; see `Coverage`."""
        return cls(len(shares), float(shares.mean()), int((shares < NOTHING).sum()), int((shares > EVERYTHING).sum()))


@dataclass(frozen=True)
class ClassWorth:
    """A class.

    Attributes:
        name: Its name.
        images: How many images that were looked at are tagged with it.
        cam: Coverage of its CAM at `pseudo.background_cam`.
        prediction: Coverage of the prediction, which is not told the tags.
        agreement: IoU of the two over all images, percent; None where neither has a pixel.
    """

    name: str
    images: int
    cam: Coverage
    prediction: Coverage
    agreement: float | None


@dataclass(frozen=True)
class Threshold:
    """What the background scores make of the initial labels.

    Attributes:
        name: `lower`, `set` or `higher`.
        low: `pseudo.background_low`.
        high: `pseudo.background_high`.
        foreground: Percent of the pixels that are labeled as a class.
        uncertain: Percent of the pixels that are left open.
    """

    name: str
    low: float
    high: float
    foreground: float
    uncertain: float


@dataclass(frozen=True)
class Worth:
    """What can be said of a result without masks. None of it measures whether the masks are right.

    Attributes:
        num_images: Images that were looked at.
        agreement: Mean IoU of CAM and prediction over background and classes, percent.
        classes: The classes that an image is tagged with.
        negatives: Images that hold none of the classes: coverage of the prediction by any class; None without such.
        uncertain: Name of the images whose prediction is least certain, and mean softmax of its classes, percent.
        thresholds: Initial labels at three pairs of background scores.
    """

    num_images: int
    agreement: float
    classes: tuple[ClassWorth, ...]
    negatives: Coverage | None
    uncertain: tuple[tuple[str, float], ...]
    thresholds: tuple[Threshold, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, as values that JSON can hold, and `failures`."""
        return dataclasses.asdict(self) | {"failures": list(self.failures())}

    def failures(self) -> Iterator[str]:
        """A line for each map that covers nothing, or everything, in half of its images or more, of at least three."""
        for each in self.classes:
            if each.images < _FEW:
                continue
            for what, found in (("CAM", each.cam), ("prediction", each.prediction)):
                if found.nothing >= _OFTEN * each.images:
                    yield (
                        f"class {each.name!r}: its {what} covers nothing in {found.nothing} of {each.images} images; "
                        f"try {'lower background scores' if what == 'CAM' else 'more steps'}, more images, or other "
                        "words for the class"
                    )
                if found.everything >= _OFTEN * each.images:
                    yield (
                        f"class {each.name!r}: its {what} covers everything in {found.everything} of {each.images} "
                        "images; try higher background scores, or images without the class"
                    )


def spread_evenly(total: int, count: int) -> list[int]:
    """At most `count` of `total` positions, from the first to the last.

    >>> spread_evenly(5, 3), spread_evenly(2, 3)
    ([0, 2, 4], [0, 1])
    """
    picks: list[int] = np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()
    return picks


def threshold_settings(config: Config) -> dict[str, Config]:
    """The settings with lower background scores, as they are, and with higher ones, by name."""
    pseudo = config.pseudo
    return {
        name: dataclasses.replace(
            config,
            pseudo=dataclasses.replace(
                pseudo,
                background_low=min(0.95, max(0.05, pseudo.background_low + shift)),
                background_high=min(0.95, max(0.05, pseudo.background_high + shift)),
            ),
        )
        for name, shift in (("lower", -_STEP), ("set", 0.0), ("higher", _STEP))
    }


def measure_worth(network: AfaNetwork, images: TaggedImages, config: Config) -> Worth:
    """Compare CAM and prediction on tagged images.

    Args:
        network: With as many classes as the images have.
        images: With tags; at most `MOST_IMAGES` of them are looked at.
        config: Its `evaluation` and `pseudo` sections, and `train.precision`.

    Raises:
        AfaError: As `image_batches`.
    """
    images = images.subset(spread_evenly(len(images), MOST_IMAGES))
    config = dataclasses.replace(config, evaluation=config.evaluation.with_crf(False))
    passes = once_per_view(network)
    settings = threshold_settings(config)
    confusion = ConfusionMatrix(1 + len(images.classes))
    shares = np.zeros((2, len(images), 1 + len(images.classes)))  # of CAM and prediction
    certainty = np.zeros(len(images))
    labeled = np.zeros((len(settings), 2))  # foreground and uncertain shares, summed over images
    every = max(1, len(images) // _THRESHOLD_IMAGES)
    kinds = ("tags", "cam")  # sizes of the prediction and of the CAM; no mask is read
    with closing(image_batches(network, images, config, kinds, processes=ALONE)) as batches:
        for batch in batches:
            pixels, tags = [sample.image for sample in batch], [images.tags(sample.index) for sample in batch]
            cams = pseudo_labels(passes, pixels, tags, config, kind="cam")
            for sample, cam, maps in zip(batch, cams, logit_maps(passes, pixels, config), strict=True):
                scores = maps.scores(sample.size).max(0)  # (H, W) each
                confusion.update(cam.cpu(), scores.indices.cpu())
                shares[:, sample.index] = [_shares(each, len(images.classes)) for each in (cam, scores.indices)]
                certainty[sample.index] = float(scores.values.mean())
            labeled += _threshold_shares(
                passes, [s for s in batch if s.index % every == 0], images, list(settings.values())
            )
    looked = max(1, len(range(0, len(images), every)))
    return Worth(
        num_images=len(images),
        agreement=100 * confusion.miou(),
        classes=tuple(_by_class(images, 100 * shares, confusion.per_class_iou())),
        negatives=Coverage.of(100 - 100 * shares[1, images.negative, 0]) if images.negative.any() else None,
        uncertain=tuple(
            (images.names[i], 100 * certainty[i]) for i in np.argsort(certainty, kind="stable")[:_UNCERTAIN]
        ),
        thresholds=tuple(
            Threshold(name, each.pseudo.background_low, each.pseudo.background_high, *(100 * sums / looked).tolist())
            for (name, each), sums in zip(settings.items(), labeled, strict=True)
        ),
    )


def _shares(label: Tensor, num_classes: int) -> np.ndarray:
    """(1 + C,) share of the pixels of background and classes."""
    counts = torch.bincount(label.flatten().long().cpu(), minlength=IGNORE_INDEX + 1)
    return np.asarray(counts[: 1 + num_classes] / label.numel())


def _threshold_shares(
    network: AfaNetwork | OncePerView, batch: list[Sample], images: TaggedImages, settings: list[Config]
) -> np.ndarray:
    """(settings, 2) foreground and uncertain shares of the initial labels, summed over the images."""
    sums = np.zeros((len(settings), 2))
    for row, config in zip(sums, settings, strict=True) if batch else ():
        tags = [images.tags(sample.index) for sample in batch]
        for label in pseudo_labels(network, [sample.image for sample in batch], tags, config, kind="initial"):
            uncertain = float((label == IGNORE_INDEX).float().mean())
            row += (float((label > 0).float().mean()) - uncertain, uncertain)
    return sums


def _by_class(images: TaggedImages, shares: np.ndarray, ious: list[float | None]) -> Iterator[ClassWorth]:
    for place, name in enumerate(images.classes):
        tagged = images.tagged[:, place]
        if not tagged.any():
            continue
        cam, prediction = map(Coverage.of, shares[:, tagged, place + 1])
        iou = ious[place + 1]
        yield ClassWorth(name, int(tagged.sum()), cam, prediction, None if iou is None else 100 * iou)
