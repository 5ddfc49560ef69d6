"""The order of the pseudo labels, what they share, and that nothing unasked is computed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

import naive
from afa.config import PseudoConfig
from afa.filtering.crf import dense_crf
from afa.pseudo import pipeline
from afa.pseudo.cam import CamResult, normalize_cam
from afa.pseudo.labels import ignore_outside, threshold_label
from afa.pseudo.pipeline import (
    PSEUDO_KINDS,
    Refiner,
    infer_pseudo,
    initial_label,
    refined_label,
    training_labels,
)
from afa.pseudo.scores import present_classes
from afa.types import NetworkOutput, RawAttention

SIZE = (24, 34)
GRID = (3, 4)
CONFIG = PseudoConfig(dilations=(1, 2, 4), iterations=4, affinity_radius=1)
TAGS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
FULL = torch.tensor([[0, 24, 0, 34], [0, 24, 0, 34]])
BOXES = torch.tensor([[0, 24, 0, 34], [3, 20, 5, 32]])


class FakeScore:
    """Encoder pass over patches of 8 pixels; it notes for how many images it was asked, and whether for affinity."""

    def __init__(self) -> None:
        self.weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, image: Tensor, affinity: bool) -> NetworkOutput:
        self.calls.append((len(image), affinity))
        pooled = adaptive_avg_pool2d(image, (image.shape[2] // 8, image.shape[3] // 8))
        scores = torch.einsum("kc,bchw->bkhw", self.weight, pooled)
        tokens = pooled.flatten(2)
        features = tokens.transpose(1, 2)[:, None]
        logits = tokens.transpose(1, 2) @ tokens
        return NetworkOutput(
            image_logits=scores.amax((2, 3)),
            class_scores=scores,
            affinity=logits.sigmoid() if affinity else None,
            attention=RawAttention(features, features) if affinity else None,
        )


def smooth(batch: int, channels: int, seed: int) -> Tensor:
    coarse = torch.rand(batch, channels, 5, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")


def cams(seed: int) -> Tensor:
    """Peaks over a low ground, so that both background scores find background."""
    return normalize_cam(smooth(2, 3, seed)) ** 1.5


def images() -> Tensor:
    noise = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(7))
    return 0.8 * smooth(2, 3, seed=0) + 0.2 * noise


def affinities() -> Tensor:
    half = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(2))
    return (half + half.transpose(1, 2)).sigmoid()


def cam_result(cam: Tensor) -> CamResult:
    output = NetworkOutput(torch.zeros(2, 3), torch.zeros(2, 3, *GRID), affinity=affinities())
    return CamResult(cam=cam, grid=GRID, walk=output)


def make_initial(cam: Tensor, boxes: Tensor = BOXES, config: PseudoConfig = CONFIG) -> Tensor:
    return initial_label(cam, present_classes(TAGS), Refiner(images(), config), boxes, config=config)


def assert_nearly_all_equal(found: Tensor, expected: np.ndarray) -> None:
    """Rounding may decide a tie another way, at no more than 2 pixels in a thousand."""
    assert (found.numpy() != expected).mean() <= 0.002


@pytest.mark.parametrize("seed", [3, 5])
def test_initial_label_agrees_with_naive(seed: int) -> None:
    cam = cams(seed)
    label = make_initial(cam)
    assert {0, 255} < set(label.unique().tolist()) <= {0, 1, 2, 3, 255}
    for i in range(2):
        expected = naive.initial_label(
            images()[i].numpy(),
            cam[i].numpy(),
            TAGS[i].numpy(),
            BOXES[i].tolist(),
            iterations=4,
            dilations=(1, 2, 4),
        )
        assert_nearly_all_equal(label[i], expected)


@pytest.mark.parametrize("seed", [3, 5])
def test_refined_label_agrees_with_naive(seed: int) -> None:
    cam = cams(seed)
    refiner = Refiner(images(), CONFIG)
    label = refined_label(cam_result(cam), present_classes(TAGS), refiner, BOXES, config=CONFIG)
    assert {0, 255} < set(label.unique().tolist()) <= {0, 1, 2, 3, 255}
    for i in range(2):
        expected = naive.refined_label(
            images()[i].numpy(),
            cam[i].numpy(),
            TAGS[i].numpy(),
            affinities()[i].numpy(),
            BOXES[i].tolist(),
            grid=GRID,
            radius=1,
            iterations=4,
            dilations=(1, 2, 4),
        )
        assert_nearly_all_equal(label[i], expected)


def test_scores_refined_in_the_box_agree_with_naive() -> None:
    scores = smooth(2, 4, seed=5)
    refined = Refiner(images(), CONFIG).in_box(scores, BOXES)
    for i in range(2):
        expected = naive.refine_in_box(
            images()[i].numpy(), scores[i].numpy(), BOXES[i].tolist(), iterations=4, dilations=(1, 2, 4)
        )
        np.testing.assert_allclose(refined[i].numpy(), expected, atol=1e-5)


def test_box_of_another_image_changes_nothing() -> None:
    scores = smooth(2, 4, seed=5)
    alike = Refiner(images(), CONFIG).in_box(scores, FULL)
    mixed = Refiner(images(), CONFIG).in_box(scores, BOXES)
    torch.testing.assert_close(mixed[0], alike[0], atol=1e-6, rtol=0)
    assert not torch.equal(mixed[1], alike[1])


@pytest.mark.parametrize("box", [[5, 6, 4, 30], [5, 20, 7, 8], [9, 10, 9, 10]])
def test_box_of_one_row_or_column_is_refined(box: list[int]) -> None:
    boxes = torch.tensor([[0, 24, 0, 34], box])
    refined = Refiner(images(), CONFIG).in_box(smooth(2, 4, seed=5), boxes)
    assert refined.isfinite().all()
    assert (refined[1] > 0).sum() == 4 * (box[1] - box[0]) * (box[3] - box[2])


def test_two_label_rules_agree_without_refinement() -> None:
    cam = cams(seed=3)
    expected = ignore_outside(threshold_label(cam, TAGS, low=0.35, high=0.55), BOXES)
    for rule in ("two_pass", "threshold"):
        config = replace(CONFIG, refinement="none", refinement_stride=1, label_rule=rule)
        assert torch.equal(make_initial(cam, config=config), expected)


@pytest.mark.parametrize(
    ("refinement", "rule"),
    [*product(["par", "par_color", "pamr", "none"], ["two_pass", "threshold"]), ("crf", "two_pass")],
)
@pytest.mark.parametrize("softmax", [True, False])
def test_labels_stay_within_tags_and_box(refinement: Any, rule: Any, softmax: bool) -> None:
    config = replace(CONFIG, refinement=refinement, label_rule=rule, softmax_scores=softmax)
    labels = training_labels(FakeScore(), images(), TAGS, BOXES, config=config, want_initial=True, want_refined=True)
    for label in (labels.initial_label, labels.refined_label):
        assert label is not None
        assert label.shape == (2, *SIZE)
        assert label.dtype == torch.int64
        assert set(label[0].unique().tolist()) <= {0, 1, 3, 255}
        assert set(label[1].unique().tolist()) <= {0, 2, 255}
        assert torch.equal(ignore_outside(label, BOXES), label)


def test_the_crf_refines_each_set_of_scores_on_the_canvas() -> None:
    config = replace(CONFIG, refinement="crf")
    low, high = smooth(2, 4, seed=5).softmax(1), smooth(2, 4, seed=6).softmax(1)
    found = Refiner(images(), config).on_canvas(torch.cat([low, high], 1), num_sets=2)
    small = interpolate(images(), size=(12, 17), mode="bilinear")
    for each, refined in zip((low, high), found.chunk(2, 1), strict=True):
        shares = interpolate(each, size=(12, 17), mode="bilinear")
        # Bandwidths of 3 and 64 pixels of the image, at half its size.
        expected = dense_crf(shares, 255 * small, gaussian_xy=1.5, bilateral_xy=32.0)
        torch.testing.assert_close(refined, interpolate(expected, size=SIZE, mode="bilinear"), atol=1e-4, rtol=1e-3)
        assert not torch.allclose(expected, shares, atol=0.01)


def test_the_crf_in_the_box_sees_nothing_outside() -> None:
    config = replace(CONFIG, refinement="crf")
    scores = smooth(2, 4, seed=5).softmax(1)
    noisy = images()
    noisy[1, :, :3] = noisy[1, :, :, :5] = 1.0
    found, other = (Refiner(image, config).in_box(scores, BOXES) for image in (images(), noisy))
    assert torch.equal(found, other)
    top, bottom, left, right = BOXES[1].tolist()
    assert not found[1, :, :top].any()
    inside = interpolate(
        interpolate(scores, size=SIZE, mode="bilinear")[1:, :, top:bottom, left:right],
        size=((bottom - top) // 2, (right - left) // 2),
        mode="bilinear",
        align_corners=True,
    )
    image = interpolate(images()[1:, :, top:bottom, left:right], size=inside.shape[2:], mode="bilinear")
    expected = dense_crf(inside, 255 * image, gaussian_xy=1.5, bilateral_xy=32.0)
    expected = interpolate(expected, size=(bottom - top, right - left), mode="bilinear")
    torch.testing.assert_close(found[1:, :, top:bottom, left:right], expected, atol=1e-4, rtol=1e-3)


def test_one_kernel_serves_both_labels_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    original = pipeline.refinement_kernel

    def counted(image: Tensor, **settings: Any) -> Tensor:
        sizes.append(tuple(image.shape))
        return original(image, **settings)

    monkeypatch.setattr(pipeline, "refinement_kernel", counted)
    training_labels(FakeScore(), images(), TAGS, FULL, config=CONFIG, want_initial=True, want_refined=True)
    assert sizes == [(2, 3, 12, 17)]


@pytest.mark.parametrize(("initial", "refined"), [(True, False), (False, True), (True, True)])
def test_only_what_is_wanted_is_made(initial: bool, refined: bool) -> None:
    score = FakeScore()
    labels = training_labels(score, images(), TAGS, FULL, config=CONFIG, want_initial=initial, want_refined=refined)
    assert (labels.initial_label is not None, labels.refined_label is not None) == (initial, refined)
    assert any(affinity for _, affinity in score.calls) == refined
    assert sum(count for count, _ in score.calls) == 3 * 2 * 2


def test_without_propagation_the_refined_label_is_the_initial_one() -> None:
    score = FakeScore()
    config = replace(CONFIG, propagation="none")
    labels = training_labels(score, images(), TAGS, FULL, config=config, want_initial=True, want_refined=True)
    assert labels.refined_label is labels.initial_label
    assert not any(affinity for _, affinity in score.calls)


def test_attention_is_another_walk() -> None:
    made = [
        infer_pseudo(
            FakeScore(), images(), TAGS, config=replace(CONFIG, propagation=propagation), want=("propagated",)
        )["propagated"]
        for propagation in ("affinity", "attention", "none")
    ]
    assert not torch.allclose(made[0], made[1])
    assert not torch.allclose(made[0], made[2])


def test_inference_returns_what_is_asked_and_no_more() -> None:
    for kind in PSEUDO_KINDS:
        assert set(infer_pseudo(FakeScore(), images(), TAGS, config=CONFIG, want=(kind,))) == {kind}


def test_inference_gives_cams_and_labels_of_the_tagged_classes() -> None:
    made = infer_pseudo(FakeScore(), images(), TAGS, config=CONFIG, want=PSEUDO_KINDS)
    assert made["cam"].shape == (2, 3, *SIZE)
    assert made["propagated"].shape == (2, 4, *SIZE)
    assert made["cam"].min() >= 0
    assert made["cam"].max() <= 1
    assert not made["cam"][TAGS == 0].any()
    assert not made["propagated"][:, 1:][TAGS == 0].any()
    assert torch.equal(made["propagated_label"], made["propagated"].argmax(1))
    expected = threshold_label(made["cam"], TAGS, low=0.45, high=0.45)
    assert (made["cam_label"] == expected).float().mean() > 0.999


def test_training_and_inference_make_the_same_labels() -> None:
    made = infer_pseudo(FakeScore(), images(), TAGS, config=CONFIG, want=("initial_label", "refined_label"))
    labels = training_labels(FakeScore(), images(), TAGS, FULL, config=CONFIG, want_initial=True, want_refined=True)
    assert labels.initial_label is not None
    assert labels.refined_label is not None
    assert torch.equal(made["initial_label"], labels.initial_label)
    assert torch.equal(made["refined_label"], labels.refined_label)


def test_image_alone_has_the_labels_it_has_in_a_batch() -> None:
    together = training_labels(FakeScore(), images(), TAGS, BOXES, config=CONFIG, want_initial=True, want_refined=True)
    for i in range(2):
        one = slice(i, i + 1)
        alone = training_labels(
            FakeScore(), images()[one], TAGS[one], BOXES[one], config=CONFIG, want_initial=True, want_refined=True
        )
        for ours, theirs in (
            (alone.initial_label, together.initial_label),
            (alone.refined_label, together.refined_label),
        ):
            assert ours is not None
            assert theirs is not None
            assert_nearly_all_equal(ours[0], theirs[i].numpy())


def test_more_slots_than_tags_change_nothing() -> None:
    labels = [
        training_labels(
            FakeScore(),
            images(),
            TAGS,
            BOXES,
            config=CONFIG,
            want_initial=True,
            want_refined=True,
            num_slots=num_slots,
        )
        for num_slots in (None, 4)
    ]
    for one, two in (
        (labels[0].initial_label, labels[1].initial_label),
        (labels[0].refined_label, labels[1].refined_label),
    ):
        assert one is not None
        assert two is not None
        assert_nearly_all_equal(one, two.numpy())


def test_image_without_tags_is_background_or_ignored() -> None:
    labels = training_labels(
        FakeScore(), images(), torch.zeros(2, 3), BOXES, config=CONFIG, want_initial=True, want_refined=True
    )
    for label in (labels.initial_label, labels.refined_label):
        assert label is not None
        assert set(label.unique().tolist()) <= {0, 255}


def test_inputs_are_left_alone() -> None:
    inputs = (images(), TAGS.clone(), BOXES.clone())
    before = [value.clone() for value in inputs]
    training_labels(FakeScore(), *inputs, config=CONFIG, want_initial=True, want_refined=True)
    infer_pseudo(FakeScore(), inputs[0], inputs[1], config=CONFIG, want=PSEUDO_KINDS)
    assert all(torch.equal(value, copy) for value, copy in zip(inputs, before, strict=True))
