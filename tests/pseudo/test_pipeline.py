"""The order of the pseudo labels, what they share, and that nothing unasked is computed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

import naive
from afa.config import PseudoConfig
from afa.filtering.crf import CrfSettings, dense_crf
from afa.pseudo import refiner as refiner_module
from afa.pseudo.cam import CamResult, normalize_cam
from afa.pseudo.labels import ignore_outside, threshold_label
from afa.pseudo.pipeline import PSEUDO_KINDS, infer_pseudo, initial_label, refined_label, training_labels
from afa.pseudo.refiner import Refiner
from afa.pseudo.scores import present_classes
from afa.types import NetworkOutput, normalize_image, truncate_levels
from tensors import TAGS, FakeScore, assert_images_agree, symmetric_affinity, unchanged, uniform

SIZE = (24, 34)
GRID = (3, 4)
CONFIG = PseudoConfig(dilations=(1, 2, 4), iterations=4, affinity_radius=1)
KNOBS: dict[str, Any] = {"dilations": (1, 2, 4), "iterations": 4}
"""What `naive` needs to know of the same configuration."""

PRESENT = present_classes(TAGS)
BOTH = ("initial_label", "refined_label")
FULL = torch.tensor([[0, 24, 0, 34], [0, 24, 0, 34]])
BOXES = torch.tensor([[0, 24, 0, 34], [3, 20, 5, 32]])


def enlarged(maps: Tensor, size: tuple[int, int] = SIZE) -> Tensor:
    return interpolate(maps, size=size, mode="bilinear")


def smooth(batch: int, channels: int, seed: int) -> Tensor:
    return enlarged(uniform(batch, channels, 5, 6, seed=seed))


def cams(seed: int) -> Tensor:
    """Peaks over a low ground, so that both background scores find background."""
    return normalize_cam(smooth(2, 3, seed)) ** 1.5


def images() -> Tensor:
    return 0.8 * smooth(2, 3, seed=0) + 0.2 * uniform(2, 3, *SIZE, seed=7)


def labels(
    config: PseudoConfig = CONFIG, boxes: Tensor = FULL, *, tags: Tensor = TAGS, part: slice = slice(None), **given: Any
) -> tuple[Tensor, Tensor]:
    """Both labels of training, of a part of the batch."""
    inputs = images()[part], tags[part], boxes[part]
    made = training_labels(FakeScore(), *inputs, config=config, want=BOTH, **given)
    assert made.initial_label is not None
    assert made.refined_label is not None
    return made.initial_label, made.refined_label


def inferred(*want: str, config: PseudoConfig = CONFIG) -> dict[str, Tensor]:
    return infer_pseudo(FakeScore(), images(), TAGS, config=config, want=want)


def assert_nearly_all_equal(found: Tensor, expected: Tensor | np.ndarray) -> None:
    """Rounding may decide a tie another way, at no more than 2 pixels in a thousand."""
    assert (found.numpy() != np.asarray(expected)).mean() <= 0.002


@pytest.mark.parametrize("seed", [3, 5])
def test_initial_label_agrees_with_naive(seed: int) -> None:
    cam = cams(seed)
    label = initial_label(PRESENT.foreground.gather(cam), PRESENT, Refiner(images(), CONFIG), BOXES)
    assert {0, 255} < set(label.unique().tolist()) <= {0, 1, 2, 3, 255}
    for found, *given in zip(label, images(), cam, TAGS, BOXES, strict=True):
        assert_nearly_all_equal(found, naive.initial_label(*(part.numpy() for part in given), **KNOBS))


@pytest.mark.parametrize("seed", [3, 5])
def test_refined_label_agrees_with_naive(seed: int) -> None:
    cam, affinity = cams(seed), symmetric_affinity(12, seed=2)
    output = NetworkOutput(torch.zeros(2, 3), torch.zeros(2, 3, *GRID), affinity=affinity)
    picked = CamResult(PRESENT.foreground.gather(cam), GRID, output)
    label = refined_label(picked, PRESENT, Refiner(images(), CONFIG), BOXES)
    assert {0, 255} < set(label.unique().tolist()) <= {0, 1, 2, 3, 255}
    for found, *given in zip(label, images(), cam, TAGS, affinity, BOXES, strict=True):
        expected = naive.refined_label(*(part.numpy() for part in given), grid=GRID, radius=1, **KNOBS)
        assert_nearly_all_equal(found, expected)


def test_scores_refined_in_the_box_agree_with_naive() -> None:
    scores = smooth(2, 4, seed=5)
    refined = Refiner(images(), CONFIG).in_box(scores, BOXES)
    assert_images_agree(refined, naive.refine_in_box, images(), scores, BOXES, **KNOBS, atol=1e-5)


def test_box_of_another_image_changes_nothing() -> None:
    scores = smooth(2, 4, seed=5)
    alike, mixed = (Refiner(images(), CONFIG).in_box(scores, boxes) for boxes in (FULL, BOXES))
    torch.testing.assert_close(mixed[0], alike[0], atol=1e-6, rtol=0)
    assert not torch.equal(mixed[1], alike[1])


@pytest.mark.parametrize("box", [[5, 6, 4, 30], [5, 20, 7, 8], [9, 10, 9, 10]])
def test_box_of_one_row_or_column_is_refined(box: list[int]) -> None:
    boxes = torch.tensor([[0, 24, 0, 34], box])
    refined = Refiner(images(), CONFIG).in_box(smooth(2, 4, seed=5), boxes)
    assert refined.isfinite().all()
    assert (refined[1] > 0).sum() == 4 * (box[1] - box[0]) * (box[3] - box[2])


@pytest.mark.parametrize("rule", ["two_pass", "threshold"])
def test_two_label_rules_agree_without_refinement(rule: Any) -> None:
    cam = cams(seed=3)
    expected = ignore_outside(threshold_label(cam, TAGS, low=0.35, high=0.55), BOXES)
    config = replace(CONFIG, refinement="none", refinement_stride=1, label_rule=rule)
    found = initial_label(PRESENT.foreground.gather(cam), PRESENT, Refiner(images(), config), BOXES)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("refinement", "rule"),
    [*product(["par", "par_color", "pamr", "none"], ["two_pass", "threshold"]), ("crf", "two_pass")],
)
@pytest.mark.parametrize("softmax", [True, False])
def test_labels_stay_within_tags_and_box(refinement: Any, rule: Any, softmax: bool) -> None:
    config = replace(CONFIG, refinement=refinement, label_rule=rule, softmax_scores=softmax)
    for label in labels(config, BOXES):
        assert label.shape == (2, *SIZE)
        assert label.dtype == torch.int64
        assert set(label[0].unique().tolist()) <= {0, 1, 3, 255}
        assert set(label[1].unique().tolist()) <= {0, 2, 255}
        assert torch.equal(ignore_outside(label, BOXES), label)


# Bandwidths of 3 and 64 pixels of the image, at half its size.
HALVED = CrfSettings(gaussian_xy=1.5, bilateral_xy=32.0)


def test_the_crf_refines_each_set_of_scores_on_the_canvas() -> None:
    low, high = smooth(2, 4, seed=5).softmax(1), smooth(2, 4, seed=6).softmax(1)
    found = Refiner(images(), replace(CONFIG, refinement="crf")).on_canvas(torch.cat([low, high], 1), num_sets=2)
    for each, refined in zip((low, high), found.chunk(2, 1), strict=True):
        shares = enlarged(each, (12, 17))
        expected = dense_crf(shares, 255 * enlarged(images(), (12, 17)), HALVED)
        torch.testing.assert_close(refined, enlarged(expected), atol=1e-4, rtol=1e-3)
        assert not torch.allclose(expected, shares, atol=0.01)


def test_the_crf_in_the_box_sees_nothing_outside() -> None:
    config = replace(CONFIG, refinement="crf")
    scores, noisy = smooth(2, 4, seed=5).softmax(1), images()
    noisy[1, :, :3] = noisy[1, :, :, :5] = 1.0
    found, other = (Refiner(image, config).in_box(scores, BOXES) for image in (images(), noisy))
    assert torch.equal(found, other)
    top, bottom, left, right = BOXES[1].tolist()
    assert not found[1, :, :top].any()
    inside = (slice(1, 2), slice(None), slice(top, bottom), slice(left, right))
    size, half = (bottom - top, right - left), ((bottom - top) // 2, (right - left) // 2)
    small = interpolate(enlarged(scores)[inside], size=half, mode="bilinear", align_corners=True)
    expected = enlarged(dense_crf(small, 255 * enlarged(images()[inside], half), HALVED), size)
    torch.testing.assert_close(found[inside], expected, atol=1e-4, rtol=1e-3)


def test_one_kernel_serves_both_labels_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    original = refiner_module.refinement_kernel

    def counted(image: Tensor, **settings: Any) -> Tensor:
        sizes.append(tuple(image.shape))
        return original(image, **settings)

    monkeypatch.setattr(refiner_module, "refinement_kernel", counted)
    labels()
    assert sizes == [(2, 3, 12, 17)]


@pytest.mark.parametrize("want", [("initial_label",), ("refined_label",), BOTH])
def test_only_what_is_wanted_is_made(want: tuple[str, ...]) -> None:
    score = FakeScore()
    made = training_labels(score, images(), TAGS, FULL, config=CONFIG, want=want)
    assert tuple(kind for kind in BOTH if getattr(made, kind) is not None) == want
    assert any(affinity for _, affinity in score.calls) == ("refined_label" in want)
    assert score.num_images == 3 * 2 * 2


def test_without_propagation_the_refined_label_is_the_initial_one() -> None:
    score = FakeScore()
    config = replace(CONFIG, propagation="none")
    made = training_labels(score, images(), TAGS, FULL, config=config, want=BOTH)
    assert made.refined_label is made.initial_label is not None
    assert not any(affinity for _, affinity in score.calls)
    alone = training_labels(score, images(), TAGS, FULL, config=config, want=("refined_label",))
    assert alone.initial_label is None
    assert alone.refined_label is not None
    assert torch.equal(alone.refined_label, made.initial_label)


def test_attention_is_another_walk() -> None:
    by_affinity, by_attention, without = (
        inferred("propagated", config=replace(CONFIG, propagation=propagation))["propagated"]
        for propagation in ("affinity", "attention", "none")
    )
    assert not torch.allclose(by_affinity, by_attention)
    assert not torch.allclose(by_affinity, without)


@pytest.mark.parametrize(("scale", "factor"), [("one", 1.0), ("largest", 1.5)])
@pytest.mark.parametrize("want", [("cam", "propagated"), ("cam", "propagated", "refined_label")])
def test_propagated_scores_walk_on_the_affinity_of_one_scale(
    scale: Literal["one", "largest"], factor: float, want: tuple[str, ...]
) -> None:
    made = inferred(*want, config=replace(CONFIG, propagated_scale=scale))
    size = int(SIZE[0] * factor), int(SIZE[1] * factor)
    walked = FakeScore()(normalize_image(enlarged(images(), size)), True)
    assert walked.affinity is not None
    for i in range(2):
        small = naive.bilinear(made["cam"][i].numpy(), walked.class_scores.shape[2:])
        affinity = walked.affinity[i].numpy()
        spread = naive.propagate(small, TAGS[i].numpy(), affinity, background=0.35, radius=1)
        np.testing.assert_allclose(made["propagated"][i].numpy(), naive.bilinear(spread, SIZE), atol=1e-5)
    if "refined_label" in want:
        assert torch.equal(made["refined_label"], labels()[1])


def test_par_sees_truncated_levels_and_the_crf_exact_ones() -> None:
    levels = torch.arange(256).float().view(1, 1, 1, 256).expand(1, 3, 1, 256) / 255
    seen = (255 * truncate_levels(levels)).round()[0, :, 0]  # (3, 256)
    lost = [[level for level in range(256) if seen[c, level] != level] for c in range(3)]
    assert lost == [[1, 6, 61, 62], [56], [42, 45]]
    assert all(seen[c, level] == level - 1 for c in range(3) for level in lost[c])

    image = (255 * images()).round() / 255
    image[:, 0, 5:9] = 61 / 255
    between = image + 0.3 / 255
    assert torch.equal(truncate_levels(between), between)
    truncated, exact = (replace(CONFIG, par_image=kind) for kind in ("truncated", "exact"))
    low = truncate_levels(image)
    assert not torch.equal(low, image)
    assert torch.equal(Refiner(image, truncated).kernel, Refiner(low, exact).kernel)
    assert not torch.equal(Refiner(image, truncated).kernel, Refiner(image, exact).kernel)
    scores = smooth(2, 4, seed=5).softmax(1)
    found, expected = (Refiner(*pair).in_box(scores, BOXES) for pair in ((image, truncated), (low, exact)))
    assert torch.equal(found, expected)
    by_crf = [Refiner(image, replace(each, refinement="crf")).in_box(scores, BOXES) for each in (truncated, exact)]
    assert torch.equal(*by_crf)


@pytest.mark.parametrize("kind", PSEUDO_KINDS)
def test_inference_returns_what_is_asked_and_no_more(kind: str) -> None:
    assert set(inferred(kind)) == {kind}


def test_inference_gives_cams_and_labels_of_the_tagged_classes() -> None:
    made = inferred(*PSEUDO_KINDS)
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
    made = inferred(*BOTH)
    for kind, label in zip(BOTH, labels(), strict=True):
        assert torch.equal(made[kind], label)


def test_image_alone_has_the_labels_it_has_in_a_batch() -> None:
    together = labels(boxes=BOXES)
    for i in range(2):
        for ours, theirs in zip(labels(boxes=BOXES, part=slice(i, i + 1)), together, strict=True):
            assert_nearly_all_equal(ours[0], theirs[i])


def test_more_slots_than_tags_change_nothing() -> None:
    for few, many in zip(labels(boxes=BOXES), labels(boxes=BOXES, num_slots=4), strict=True):
        assert_nearly_all_equal(few, many)


def test_image_without_tags_is_background_or_ignored() -> None:
    for label in labels(boxes=BOXES, tags=torch.zeros(2, 3)):
        assert set(label.unique().tolist()) <= {0, 255}


def test_inputs_are_left_alone() -> None:
    image, tags, boxes = images(), TAGS.clone(), BOXES.clone()
    with unchanged(image, tags, boxes):
        training_labels(FakeScore(), image, tags, boxes, config=CONFIG, want=BOTH)
        infer_pseudo(FakeScore(), image, tags, config=CONFIG, want=PSEUDO_KINDS)
