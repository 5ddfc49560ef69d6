"""Which images train and which are for validation: what folders, files and columns state, or a split made here.

A split that is made here sets images aside so that every class keeps its share: iterative stratification.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from afa.config import DataConfig
from afa.data.dataset import TagTable

TRAIN: Final = 0
VALIDATION: Final = 1
TEST: Final = 2
"""Of an image that neither trains nor is scored."""
UNSTATED: Final = -1

SIDES: Final = {
    "train": TRAIN, "training": TRAIN,
    "val": VALIDATION, "valid": VALIDATION, "validation": VALIDATION, "dev": VALIDATION,
    "test": TEST, "testing": TEST,
}  # fmt: skip
"""Names of the sides of a split."""


def side_of(text: str) -> int:
    """The side that a name speaks of: `instances_val2014` of validation.

    >>> side_of("instances_val2014"), side_of("instances")
    (1, -1)
    """
    return next((SIDES[word] for word in re.findall(r"[a-z]+", text.lower()) if word in SIDES), UNSTATED)


def choose_sides(
    data: DataConfig, table: TagTable, tagged: NDArray[np.bool_], negative: NDArray[np.bool_]
) -> tuple[NDArray[np.int8], str]:
    """Put each image on a side: as stated, else as the outermost folders say, else by a split made here.

    Args:
        data: Whether to make a split, and how.
        table: N images.
        tagged: (N, C), whether a class is tagged as present.
        negative: (N,), whether an image is known to hold none of them; for the split made here that is one more class.

    Returns:
        (N,) `TRAIN`, `VALIDATION` or `TEST`; and in words how they came about.
    """
    stated = table.sides
    if (stated == UNSTATED).all():
        tops = [path.partition("/")[0] if "/" in path else "" for path in table.names]
        sides_of = {top: SIDES.get(top.lower(), UNSTATED) for top in set(tops)}
        if {TRAIN, VALIDATION} <= set(sides_of.values()):
            stated = np.array([sides_of[top] for top in tops], dtype=np.int8)
    sides = np.where(stated == UNSTATED, np.int8(TRAIN), stated)
    if (sides == VALIDATION).any():
        return sides, "as the data says"
    if not data.val_list:
        return sides, "data.val_list is empty"
    if data.split_fraction == 0:
        return sides, "data.split_fraction is 0"
    if negative.any():
        tagged = np.column_stack([tagged, negative])
    splittable = np.flatnonzero((sides == TRAIN) & tagged.any(axis=1))
    chosen = [table.names[i] for i in splittable.tolist()]
    aside = split_by_tags(tagged[splittable], chosen, fraction=data.split_fraction, seed=data.split_seed)
    sides[splittable[aside]] = VALIDATION
    return sides, f"set aside here by tags, seed {data.split_seed}"


def split_by_tags(tags: NDArray[np.bool_], names: Sequence[str], *, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Choose images to set aside, the rarest class first.

    The class with the fewest images left is dealt out, each image to the side that lacks most of that class, and so on
    until none is left. The choice depends on the set of images, their tags and the seed, not on their order.

    Args:
        tags: (N, C), each image with at least one class.
        names: N different names.
        fraction: Share of the images to set aside, 0 to 1.
        seed: Seed of the choice among equals.

    Returns:
        (N,), True where an image is set aside. With a fraction above 0 at least one is, as far as each class keeps
        one for training.

    Source: Sechidis, Tsoumakas and Vlahavas, On the Stratification of Multi-Label Data (2011), algorithm 1.

    >>> tags = np.eye(2, dtype=bool).repeat(5, axis=0)
    >>> aside = split_by_tags(tags, "abcdefghij", fraction=0.2, seed=0)
    >>> tags[aside].sum(axis=0).tolist()
    [1, 1]
    """
    num_images = len(names)
    assert tags.shape[0] == num_images, (tags.shape, num_images)
    aside = np.zeros(num_images, dtype=bool)
    if fraction <= 0 or num_images < 2:
        return aside
    # Any order of the images gives the same order here.
    order = np.array(sorted(range(num_images), key=names.__getitem__))
    order = order[np.random.default_rng(seed).permutation(num_images)]
    tags = tags[order]
    left = tags.sum(axis=0)
    wanted = np.outer((1 - fraction, fraction), left)  # (2, C) images that each side still lacks
    wanted_images = [num_images * (1 - fraction), num_images * fraction]
    side = np.full(num_images, -1)
    while left.any():
        rarest = np.where(left > 0, left, num_images + 1).argmin()
        for image in np.flatnonzero(tags[:, rarest] & (side < 0)).tolist():
            lack = [(wanted[s, rarest], wanted_images[s]) for s in (0, 1)]
            side[image] = chosen = int(lack[1] > lack[0])
            wanted_images[chosen] -= 1
            wanted[chosen] -= tags[image]
        left = tags[side < 0].sum(axis=0)
    _keep_every_class(side, tags)
    aside[order] = side == 1
    return aside


def _keep_every_class(side: NDArray[np.int64], tags: NDArray[np.bool_]) -> None:
    """Give each class an image to train on; then set one image aside if none is, and none is needed."""
    for images in map(np.flatnonzero, tags.T):
        if images.size and (side[images] == 1).all():
            side[images[0]] = 0
    is_spare = (~tags | (tags.sum(axis=0) > 1)).all(axis=1)
    if not (side == 1).any() and is_spare.any():
        side[is_spare.argmax()] = 1
