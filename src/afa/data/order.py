"""Which images a training step takes, and how each is cropped: functions of the seed, the step and the place in it.

So a resumed run continues exactly, and N processes see what one would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afa.config import AugmentConfig, Config, TrainConfig
from afa.data.dataset import TaggedImages, Windows
from afa.data.transforms import CropPlan, draw_crop
from afa.errors import AfaError

_ORDER, _AUGMENT, _SHARDS = 0, 1, 2  # Spawn keys: the uses of the seed never share a random stream.


@dataclass(frozen=True, eq=False)
class Repeats:
    """How often an epoch visits each image.

    Attributes:
        factors: (N,) float64, 1 or more: mean number of visits, before `extra` is rounded.
        extra: Visits of any epoch beyond the first of each image: the sum of the factors minus N, rounded up.
    """

    factors: NDArray[np.float64]
    extra: int


def class_repeats(tagged: NDArray[np.bool_], balance: float) -> Repeats:
    """Repeat images with rare classes: an image's factor is the largest of max(1, (mean / n_c) ** balance) of its tags.

    n_c is the number of images with class c, mean the mean of n_c over the classes that any image has. With balance 1,
    an epoch visits each class about mean times or more; it is never longer than the images and tags together.

    Args:
        tagged: (N, C), whether each class is tagged as present.
        balance: 0..1; 0 = every image once.

    Source: Gupta et al., LVIS (CVPR 2019), repeat factor sampling: exponent 1/2, a fixed share in place of the mean.

    >>> class_repeats(np.array([[1, 0], [1, 0], [1, 0], [0, 1]], dtype=bool), 1.0).factors.tolist()
    [1.0, 1.0, 1.0, 2.0]
    """
    counts = tagged.sum(axis=0)
    present = np.flatnonzero(counts)
    factors = np.ones(len(tagged))
    for index in present[np.argsort(-counts[present])].tolist():  # the rarest last: it decides
        factor = (counts.sum() / len(present) / counts[index]) ** balance
        factors[tagged[:, index]] = max(1.0, round(factor * 2**20) / 2**20)  # of such numbers, sums are exact
    return Repeats(factors, math.ceil(factors.sum() - len(factors)))


def visits(
    num_images: int,
    numbers: range,
    *,
    seed: int,
    repeats: Repeats | None = None,
    stream: tuple[int, ...] = (),
    windows: Windows | None = None,
) -> NDArray[np.int64]:
    """The images of some visits: consecutive pieces of one seeded permutation after another.

    Each epoch visits every image once, or as often as `repeats` says, rounded up or down at random.

    Args:
        num_images: At least 1.
        numbers: Numbers of the visits, from 0.
        seed: Seed of the order.
        repeats: Visits of each image; None = one.
        stream: Tells orders of one seed apart.
        windows: Keeps images together that are fetched together: shards come in a random order, and the images of as
            many of them as a window has are mixed. Orders of one seed come to the same shards at the same time.

    Returns:
        (len(numbers),) int64 indices in 0..num_images-1.

    >>> sorted(visits(6, range(6), seed=0).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    epoch, place = np.divmod(np.array(numbers, dtype=np.int64), num_images + (repeats.extra if repeats else 0))
    pairs = zip(epoch.tolist(), place.tolist(), strict=True)
    return np.array(
        [_permutation(num_images, (seed, *stream), e, repeats, windows)[p] for e, p in pairs], dtype=np.int64
    )


class Order:
    """Which images come at which step, and in which order of a batch.

    Images without any class have epochs of their own. They are as large a share of the batches as of all images, or
    `train.negative_share` where that is less.

    Args:
        images: N images.
        config: Its `train` section, and `schedule.batch_size`: images per step, over all processes.

    Attributes:
        lost: (C,) bool, classes that images have, and none of those that `train.max_images` keeps.

    Raises:
        AfaError: No image has a class.
    """

    def __init__(self, images: TaggedImages, config: Config) -> None:
        self.negative = images.negative
        self._lies = images.windows
        self._seed, self._batch_size = config.train.seed, config.schedule.batch_size
        self._groups = [np.flatnonzero(~self.negative), np.flatnonzero(self.negative)]
        if not self._groups[0].size:
            raise AfaError("no image to train on has any of the classes; add images that have them")
        share = self._groups[1].size / len(images)
        tagged = images.tagged
        self._limit(tagged, config.train)
        kept = tagged[self._groups[0]]
        self.lost = tagged.any(axis=0) & ~kept.any(axis=0)
        self._repeats = class_repeats(kept, config.train.class_balance)
        self._share = min(config.train.negative_share, share)

    def _limit(self, tagged: NDArray[np.bool_], train: TrainConfig) -> None:
        """Keep `train.max_images`, drawn as an epoch draws them, and as large a share of those without any class.

        Each class keeps an image, unless there are fewer images than that takes.
        """
        some, none = self._groups
        if not 0 < train.max_images < some.size:
            return
        repeats = class_repeats(tagged[some], train.class_balance)
        drawn = visits(some.size, range(some.size + repeats.extra), seed=train.seed, repeats=repeats, stream=(2,))
        kept = _covering(np.array(list(dict.fromkeys(drawn.tolist()))), tagged[some], train.max_images)
        share = math.ceil(none.size * train.max_images / some.size)
        others = visits(none.size, range(share), seed=train.seed, stream=(3,)).tolist() if share else []
        self._groups = [np.sort(some[kept]), np.sort(none[others])]

    @cached_property
    def _windows(self) -> list[Windows | None]:
        """Where the images of each group lie."""
        return [self._lies and self._lies.take(group) for group in self._groups]

    def indices(self, step: int) -> NDArray[np.int64]:
        """(batch_size,) indices of the images of a step, from 0; those without any class are spread evenly."""
        size, (some, none) = self._batch_size, self._groups
        start, stop = (math.floor(count * size * self._share + 1e-9) for count in (step, step + 1))
        numbers = range(step * size - start, (step + 1) * size - stop)
        settings: dict[str, Any] = {"seed": self._seed, "repeats": self._repeats, "windows": self._windows[0]}
        drawn = [some[visits(len(some), numbers, **settings)]]
        if stop > start:
            settings |= {"repeats": None, "stream": (1,), "windows": self._windows[1]}
            drawn.append(none[visits(len(none), range(start, stop), **settings)])
        places = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in drawn if len(part)])
        return np.concatenate(drawn)[np.argsort(places, kind="stable")]

    def taken(self, num_steps: int) -> list[int]:
        """Indices of the images that the first steps take, in the order in which they first do."""
        first: dict[int, None] = {}
        for step in range(num_steps):
            first.update(dict.fromkeys(self.indices(step).tolist()))
            if len(first) == sum(map(len, self._groups)):
                break
        return list(first)

    def pairs(self, step: int, share: slice) -> list[tuple[int, int]]:
        """Place in the batch and index of each image of a share of it, those without any class last."""
        pairs = list(enumerate(self.indices(step).tolist()))[share]
        return sorted(pairs, key=lambda pair: bool(self.negative[pair[1]]))


def _covering(order: NDArray[np.int64], tagged: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """The first images of an order; if a class has none of them, first a few in which all classes are.

    >>> _covering(np.arange(4), np.array([[1, 0], [1, 0], [1, 1], [0, 1]], dtype=bool), 2)
    array([2, 0])
    """
    counts = tagged.sum(axis=0)
    missing = counts > 0
    if (tagged[order[:count]].any(axis=0) == missing).all():
        return order[:count]
    first: list[int] = []
    for index in np.argsort(counts, kind="stable").tolist():
        if missing[index]:
            holders = order[tagged[order, index]]
            first.append(int(holders[(tagged[holders] & missing).sum(axis=1).argmax()]))
            missing &= ~tagged[first[-1]]
    return np.concatenate([first, order[~np.isin(order, first)]])[:count]


def step_plan(
    size: tuple[int, int], augment: AugmentConfig, *, step: int, row: int, seed: int, multiple: int = 1
) -> CropPlan:
    """Crop of the image, of height and width `size` in pixels, at place `row` of a step's global batch."""
    return draw_crop(size, augment, _generator(seed, _AUGMENT, step, row), multiple=multiple)


@lru_cache(maxsize=8)  # Two epochs each for images with and without classes, and for masks
def _permutation(
    num_images: int, seed: tuple[int, ...], epoch: int, repeats: Repeats | None, windows: Windows | None
) -> NDArray[np.int64]:
    generator = _generator(seed[0], _ORDER, epoch, *seed[1:])
    order = generator.permutation(num_images)
    if repeats is not None and repeats.extra:
        # Systematic sampling: evenly spaced points, each on the stretch of an image as long as its extra visits. An
        # image gets the whole number of its visits above or below their mean, and all together are always as many.
        ends = np.cumsum(repeats.factors[order] - 1)
        points = (np.arange(repeats.extra) + generator.random()) * (ends[-1] / repeats.extra)
        order = generator.permutation(np.concatenate([order, order[np.searchsorted(ends, points)]]))
    if windows is not None:
        turns = _generator(seed[0], _SHARDS, epoch).permutation(windows.num_shards)
        order = order[np.argsort(turns[windows.shard[order]] // windows.size, kind="stable")]
    order.flags.writeable = False
    return order


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
