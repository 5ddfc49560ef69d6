"""Hard labels from scores: two thresholds, merge, valid box."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import naive
from afa.pseudo.labels import ignore_outside, merge_labels, threshold_label
from afa.pseudo.scores import best_slot, present_scores, with_background
from afa.types import inside_box
from tensors import TAGS, assert_images_agree, uniform

BOXES = torch.tensor([[0, 9, 0, 12], [2, 7, 3, 11]])


def cams(seed: int = 0) -> Tensor:
    return uniform(2, 3, 9, 12, seed=seed)


def cam_label(cam: Tensor, tags: Tensor, *, background: float) -> Tensor:
    return present_scores(with_background(cam, background), tags, softmax=False).argmax(1)


@pytest.mark.parametrize("seed", range(3))
def test_thresholds_agree_with_naive(seed: int) -> None:
    cam = cams(seed)
    label = ignore_outside(threshold_label(cam, TAGS, low=0.35, high=0.55), BOXES)
    assert_images_agree(label, naive.threshold_label, cam, TAGS, BOXES, low=0.35, high=0.55)


def test_two_labels_merged_are_the_two_thresholds_at_once() -> None:
    low, high = (cam_label(cams(), TAGS, background=background) for background in (0.35, 0.55))
    assert torch.equal(merge_labels(low, high), threshold_label(cams(), TAGS, low=0.35, high=0.55))


def test_merge_agrees_with_naive_on_every_pair() -> None:
    low, high = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    merged = merge_labels(low[None], high[None])[0]
    np.testing.assert_array_equal(merged.numpy(), naive.merge(low.numpy(), high.numpy()))


def test_class_without_a_tag_is_never_a_label() -> None:
    cam = cams()
    cam[0, 1] = 1.0
    assert set(cam_label(cam, TAGS, background=0.45)[0].unique().tolist()) <= {0, 1, 3}
    assert set(threshold_label(cam, TAGS, low=0.35, high=0.55)[0].unique().tolist()) <= {0, 1, 3, 255}


def test_image_without_tags_is_background() -> None:
    nothing = torch.zeros(2, 3)
    assert not cam_label(cams(), nothing, background=0.45).any()
    assert not threshold_label(cams(), nothing, low=0.35, high=0.55).any()


def test_background_wins_where_the_cam_only_equals_it() -> None:
    cam = torch.full((1, 1, 2, 2), 0.45)
    assert not cam_label(cam, torch.ones(1, 1), background=0.45).any()


def test_higher_background_never_adds_foreground() -> None:
    low, high = (cam_label(cams(), TAGS, background=background) > 0 for background in (0.35, 0.55))
    assert not (high & ~low).any()
    assert high.sum() < low.sum()


def test_everything_outside_the_box_is_ignored_and_nothing_inside() -> None:
    label = torch.ones(2, 9, 12, dtype=torch.int64)
    masked = ignore_outside(label, BOXES)
    assert (masked[0] == 1).all()
    assert (masked[1, 2:7, 3:11] == 1).all()
    assert (masked[1] == 255).sum() == 9 * 12 - 5 * 8
    assert (label == 1).all()


def test_empty_box_holds_nothing() -> None:
    assert not inside_box(torch.tensor([[3, 3, 0, 5]]), 9, 12).any()


@pytest.mark.parametrize("shape", [(2, 1, 3, 5), (1, 2, 7, 4), (3, 9, 6, 6)])
def test_best_slot_is_the_first_of_the_largest(shape: tuple[int, ...]) -> None:
    scores = torch.randint(0, 4, shape).float()  # with many ties
    assert torch.equal(best_slot(scores), torch.from_numpy(scores.numpy().argmax(1)))
