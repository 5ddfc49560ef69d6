"""Setting images aside for validation so that every class keeps its share: iterative stratification.

What is split, and whether at all, is left to `afa.data.layout`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def split_by_tags(tags: NDArray[np.bool_], names: Sequence[str], *, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Choose images to set aside, the rarest class first.

    The class with the fewest images left is dealt out, each image to the side that lacks most of that class, and so on
    until none is left. The choice depends on the set of images, their tags and the seed, not on their order. Every
    class that has an image keeps at least one on the training side.

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
    # Any order of the images leads to the same one here.
    order = np.array(sorted(range(num_images), key=names.__getitem__))
    order = order[np.random.default_rng(seed).permutation(num_images)]
    present = [np.flatnonzero(row).tolist() for row in tags[order]]
    images_of: list[list[int]] = [[] for _ in range(tags.shape[1])]
    for image, classes in enumerate(present):
        for index in classes:
            images_of[index].append(image)
    left = [len(images) for images in images_of]
    wanted = [[count * share for count in left] for share in (1 - fraction, fraction)]
    wanted_images = [num_images * (1 - fraction), num_images * fraction]
    side = [-1] * num_images
    while any(left):
        rarest = min((index for index, count in enumerate(left) if count), key=left.__getitem__)
        for image in images_of[rarest]:
            if side[image] >= 0:
                continue
            lack = [(wanted[s][rarest], wanted_images[s]) for s in (0, 1)]
            chosen = int(lack[1] > lack[0])
            side[image] = chosen
            wanted_images[chosen] -= 1
            for index in present[image]:
                wanted[chosen][index] -= 1
                left[index] -= 1
    _keep_every_class(side, present, images_of)
    aside[order] = np.array(side) == 1
    return aside


def _keep_every_class(side: list[int], present: list[list[int]], images_of: list[list[int]]) -> None:
    """Give each class an image to train on; then set one image aside if none is, and none is needed."""
    for images in images_of:
        if images and all(side[image] == 1 for image in images):
            side[images[0]] = 0
    if 1 not in side:
        spare = (image for image, classes in enumerate(present) if all(len(images_of[c]) > 1 for c in classes))
        image = next(spare, None)
        if image is not None:
            side[image] = 1
