from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afa.data.split import split_by_tags


def random_tags(num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """Tags whose classes are ever rarer; each image has one at least."""
    rng = np.random.default_rng(seed)
    tags = rng.random((num_images, num_classes)) < 0.6 ** np.arange(1, num_classes + 1)
    tags[np.arange(num_images), rng.integers(0, num_classes, num_images)] = True
    return np.asarray(tags)


def names_of(tags: np.ndarray) -> list[str]:
    return [f"image {i}" for i in range(len(tags))]


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_every_class_keeps_its_share(fraction: float) -> None:
    tags = random_tags(1000, 12, seed=0)
    aside = split_by_tags(tags, names_of(tags), fraction=fraction, seed=0)
    assert abs(aside.mean() - fraction) < 0.01
    wanted = tags.sum(axis=0) * fraction
    ours = np.abs(tags[aside].sum(axis=0) - wanted)
    assert ours.max() <= 3
    chance = np.random.default_rng(0).random(1000) < fraction
    assert ours.sum() < np.abs(tags[chance].sum(axis=0) - wanted).sum() / 4


def test_the_order_of_the_images_does_not_matter() -> None:
    tags = random_tags(200, 6, seed=1)
    names = names_of(tags)
    aside = split_by_tags(tags, names, fraction=0.2, seed=3)
    assert (split_by_tags(tags, names, fraction=0.2, seed=3) == aside).all()
    order = np.random.default_rng(2).permutation(200)
    shuffled = split_by_tags(tags[order], [names[i] for i in order], fraction=0.2, seed=3)
    assert (shuffled == aside[order]).all()
    assert (split_by_tags(tags, names, fraction=0.2, seed=4) != aside).any()


@settings(max_examples=60, deadline=None)
@given(
    num_images=st.integers(1, 25), num_classes=st.integers(1, 6), seed=st.integers(0, 99), fraction=st.floats(0.01, 0.9)
)
def test_every_class_can_be_trained(num_images: int, num_classes: int, seed: int, fraction: float) -> None:
    tags = random_tags(num_images, num_classes, seed)
    aside = split_by_tags(tags, names_of(tags), fraction=fraction, seed=seed)
    assert (tags[~aside].any(axis=0) == tags.any(axis=0)).all()
    spare = (tags.sum(axis=0) > 1) | ~tags  # an image that no class needs
    assert aside.any() or not spare.all(axis=1).any()


def test_nothing_is_set_aside_for_nothing() -> None:
    tags = random_tags(10, 2, seed=0)
    assert not split_by_tags(tags, names_of(tags), fraction=0.0, seed=0).any()
    assert not split_by_tags(tags[:1], ["a"], fraction=0.5, seed=0).any()
