"""Fusion of class scores into CAMs, and the passes that give them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

import naive
from afa.pseudo.cam import ViewScore, fuse_scores, multi_scale_cam, normalize_cam
from afa.types import NetworkOutput, normalize_image
from tensors import FakeScore, unchanged, uniform

SCALES = (1.0, 0.5, 1.5)


def images() -> Tensor:
    return uniform(2, 3, 32, 48)


@pytest.mark.parametrize(
    ("size", "grids"),
    [((16, 24), [(2, 3), (1, 2), (3, 5)]), ((9, 7), [(3, 2)]), ((5, 13), [(5, 13), (7, 9)])],
)
def test_fusion_agrees_with_naive(size: tuple[int, int], grids: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(sum(size))
    scores = [torch.randn(4, 3, *grid, generator=generator) for grid in grids]
    cam = fuse_scores(scores, size)
    for i in range(2):
        plain = [score[i].numpy() for score in scores]
        flipped = [score[i + 2].numpy() for score in scores]
        np.testing.assert_allclose(cam[i].numpy(), naive.fuse_scores(plain, flipped, size), atol=1e-5)


def test_fusion_leaves_its_input_alone() -> None:
    scores = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)]
    with unchanged(*scores):
        fuse_scores(scores, (4, 4))


def test_normalized_cam_spans_zero_to_one() -> None:
    cam = normalize_cam(torch.randn(2, 3, 6, 7) * 5 + 2)
    assert torch.equal(cam.amin((2, 3)), torch.zeros(2, 3))
    torch.testing.assert_close(cam.amax((2, 3)), torch.ones(2, 3), atol=1e-4, rtol=0)


def test_class_without_any_positive_score_has_a_zero_cam() -> None:
    cam = fuse_scores([-torch.rand(2, 3, 4, 4) - 0.1], (8, 8))
    assert torch.equal(cam, torch.zeros(1, 3, 8, 8))


def test_flipped_image_has_the_flipped_cam() -> None:
    straight, mirrored = (
        multi_scale_cam(FakeScore(), image, scales=SCALES).cam for image in (images(), images().flip(-1))
    )
    torch.testing.assert_close(mirrored, straight.flip(-1), atol=1e-5, rtol=0)


def test_affinity_is_asked_of_the_plain_images_at_the_largest_scale_alone() -> None:
    plain = multi_scale_cam(FakeScore(), images(), scales=SCALES)
    assert plain.cam.shape == (2, 3, 32, 48)
    assert plain.grid == (6, 9)
    assert plain.walk is None
    score = FakeScore()
    walked = multi_scale_cam(score, images(), scales=SCALES, affinity=True)
    assert [shape for shape, affinity in score.calls if affinity] == [(2, 3, 48, 72)]
    assert walked.walk is not None
    assert walked.walk.affinity is not None
    assert walked.walk.affinity.shape == (2, 54, 54)
    torch.testing.assert_close(plain.cam, walked.cam, atol=1e-6, rtol=0)


def test_scores_at_hand_save_the_plain_pass_at_scale_one() -> None:
    score = FakeScore()
    without = multi_scale_cam(score, images(), scales=(1.0, 0.5)).cam
    all_images = score.num_images
    at_hand = score(normalize_image(images()), False).class_scores
    score.calls.clear()
    reused = multi_scale_cam(score, images(), scales=(1.0, 0.5), plain_scores=at_hand).cam
    assert score.num_images == all_images - 2
    torch.testing.assert_close(reused, without, atol=1e-6, rtol=0)


def test_cam_has_no_gradient() -> None:
    score = FakeScore()
    score.weight.requires_grad_()
    assert not multi_scale_cam(score, images(), scales=(1.0,)).cam.requires_grad


class KeptViews(ViewScore):
    """Has every view at hand, made by the plain recipe, and notes what it was asked for."""

    def __init__(self, image: Tensor) -> None:
        self.score = FakeScore()
        self.normalized = normalize_image(image)
        self.asked: list[tuple[float, tuple[bool, ...], bool]] = []

    def __call__(self, image: Tensor, affinity: bool) -> NetworkOutput:
        raise AssertionError("pixels were shown")

    def view(self, scale: float, flips: Sequence[bool], affinity: bool) -> NetworkOutput:
        self.asked.append((scale, tuple(flips), affinity))
        size = [int(side * scale) for side in self.normalized.shape[2:]]
        scaled = interpolate(self.normalized, size=size, mode="bilinear", align_corners=False)
        return self.score(torch.cat([scaled.flip(-1) if flip else scaled for flip in flips]), affinity)


def test_scores_that_have_views_at_hand_are_asked_for_them() -> None:
    kept = KeptViews(images())
    found = multi_scale_cam(kept, images(), scales=SCALES, affinity=True)
    expected = multi_scale_cam(FakeScore(), images(), scales=SCALES, affinity=True)
    torch.testing.assert_close(found.cam, expected.cam)
    assert found.grid == expected.grid
    both, plain, mirrored = (False, True), (False,), (True,)
    assert kept.asked == [(1.0, both, False), (0.5, both, False), (1.5, plain, True), (1.5, mirrored, False)]
    kept.asked.clear()
    scores = FakeScore()(normalize_image(images()), False).class_scores
    reused = multi_scale_cam(kept, images(), scales=(1.0, 0.5), plain_scores=scores)
    torch.testing.assert_close(reused.cam, multi_scale_cam(FakeScore(), images(), scales=(1.0, 0.5)).cam)
    assert kept.asked == [(1.0, mirrored, False), (0.5, both, False)]
