"""From an image and its tags to pseudo labels: CAM, labels, walk and refinement in the method's order.

Nothing here has a gradient. What several labels need is computed once: one refinement kernel per image serves
both thresholds, all classes and, where the valid box is the whole canvas, both labels. The scores of the two thresholds
go through walk and refinement side by side. Only the classes of the tags take part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from afa.config import PseudoConfig
from afa.pseudo.cam import CamResult, ScoreFunction, multi_scale_cam
from afa.pseudo.labels import ignore_outside, merge_labels, threshold_label
from afa.pseudo.refiner import Refiner, resized
from afa.pseudo.scores import (
    PresentClasses,
    best_slot,
    mask_scores,
    present_classes,
    present_scores,
    valid_channels,
    with_background,
)
from afa.pseudo.walk import mean_attention_affinity, propagate, walk
from afa.types import IGNORE_INDEX, NetworkOutput, normalize_image

PSEUDO_KINDS = ("cam", "propagated", "cam_label", "propagated_label", "initial_label", "refined_label")
"""What `infer_pseudo` can be asked for."""


CrfFunction = Callable[[Tensor, Tensor], Tensor]
"""((B, P, H, W) probabilities, (B, 3, H, W) RGB in 0..255) -> (B, P, H, W) probabilities."""


@dataclass(frozen=True)
class TrainingLabels:
    """Pseudo labels of a training batch.

    Attributes:
        initial_label: (B, H, W) int64 in 0..C and 255; None when nothing learns from it at this step.
        refined_label: The same after walk and refinement; None likewise.
    """

    initial_label: Tensor | None = None
    refined_label: Tensor | None = None


@torch.no_grad()
def training_labels(
    score: ScoreFunction,
    image: Tensor,
    tags: Tensor,
    valid_box: Tensor,
    *,
    config: PseudoConfig,
    want: Collection[str],
    plain_scores: Tensor | None = None,
    num_slots: int | None = None,
) -> TrainingLabels:
    """Make the pseudo labels that a training step learns from, and no others.

    Args:
        score: Encoder pass.
        image: (B, 3, H, W) RGB in [0, 1].
        tags: (B, C), above 0 where present.
        valid_box: (B + N, 4) int64 (top, bottom, left, right), half open; the last N are those of images that hold none
            of the classes, whose label is background everywhere.
        config: Settings.
        want: Of `initial_label` and `refined_label` those to make.
        plain_scores: (B, C, h, w) class scores of the training forward, reused for scale 1.
        num_slots: 1 + the largest number of tags of an image, if known.

    Returns:
        The labels that were wanted, of B + N images.
    """
    count = len(image)
    background = torch.zeros(len(valid_box) - count, *image.shape[2:], dtype=torch.int64, device=image.device)
    background = ignore_outside(background, valid_box[count:])  # (N, H, W)
    if not count:
        return TrainingLabels(**dict.fromkeys(want, background))
    walks = "refined_label" in want and config.propagation != "none"
    present = present_classes(tags, num_slots=num_slots)
    pick = present.foreground.gather
    cam = multi_scale_cam(
        score,
        image,
        scales=config.scales,
        mirrored=config.mirror,
        affinity=walks,
        plain_scores=plain_scores,
        pick=pick,
    )
    labels = _merged_labels(want, cam, present, Refiner(image, config), valid_box[:count])  # (B, H, W) each
    if len(background):
        labels = {kind: torch.cat([label, background]) for kind, label in labels.items()}  # (B + N, H, W) each
    return TrainingLabels(**labels)


@torch.no_grad()
def infer_pseudo(
    score: ScoreFunction,
    image: Tensor,
    tags: Tensor,
    *,
    config: PseudoConfig,
    want: Collection[str],
    refined: bool = False,
    crf: CrfFunction | None = None,
    limits: Tensor | None = None,
) -> dict[str, Tensor]:
    """Make CAMs and pseudo labels of whole images.

    Args:
        score: Encoder pass.
        image: (B, 3, H, W) RGB in [0, 1].
        tags: (B, C), above 0 where present.
        config: Settings.
        want: What to return, of `PSEUDO_KINDS`.
        refined: Also put `cam_label` and `propagated_label` through the low-level refinement.
        crf: Refines the scores of all labels last; None: nothing does.
        limits: (2, B, C, 1, 1), for tiles: the range of the CAMs of their image, as of `normalize_cam`.

    Returns:
        By name: `cam` (B, C, H, W) in [0, 1], absent classes 0; `propagated` (B, K, H, W) scores after the walk;
        `cam_label` and `propagated_label` (B, H, W) int64 in 0..C at their background scores; `initial_label` and
        `refined_label` (B, H, W) int64 in 0..C and 255.
    """
    assert set(want) <= set(PSEUDO_KINDS), want
    walks = (
        {"refined_label"} if config.propagated_scale == "one" else {"propagated", "propagated_label", "refined_label"}
    )
    present = present_classes(tags)
    foreground = present.foreground
    picked = multi_scale_cam(
        score,
        image,
        scales=config.scales,
        mirrored=config.mirror,
        affinity=config.propagation != "none" and not walks.isdisjoint(want),
        pick=foreground.gather,
        limits=limits,
    )
    refiner = Refiner(image, config)
    box = _whole_box(*refiner.size, image.device).expand(image.shape[0], -1)  # (B, 4)
    made = _merged_labels(want, picked, present, refiner, box, crf)
    if "cam_label" in want:
        softmax = refined or crf is not None
        scores = mask_scores(with_background(picked.cam, config.background_cam), present.valid, softmax=softmax)
        scores = refiner.on_canvas(scores) if refined else scores  # (B, P, H, W)
        made["cam_label"] = present.to_class(best_slot(_through_crf(scores, present.valid, refiner, crf)))  # (B, H, W)
    if set(want) == set(made):
        return made
    cam = dataclasses.replace(picked, cam=foreground.scatter(picked.cam, tags.shape[1]))  # (B, C, H, W)
    if "cam" in want:
        made["cam"] = cam.cam
    if "propagated" in want or "propagated_label" in want:
        if config.propagation != "none" and config.propagated_scale == "one":
            cam = _with_affinity(cam, score(normalize_image(image), True))
        scores = _propagated_scores(cam, tags, config)  # (B, K, h, w)
        if "propagated" in want:
            made["propagated"] = resized(scores, refiner.size)  # (B, K, H, W)
        if "propagated_label" in want:
            scores = refiner.in_box(scores, box) if refined else resized(scores, refiner.size)  # (B, K, H, W)
            made["propagated_label"] = _through_crf(scores, valid_channels(tags), refiner, crf).argmax(1)  # (B, H, W)
    return made


def _merged_labels(
    want: Collection[str],
    cam: CamResult,
    present: PresentClasses,
    refiner: Refiner,
    valid_box: Tensor,
    crf: CrfFunction | None = None,
) -> dict[str, Tensor]:
    """Those of `initial_label` and `refined_label` that are wanted, by name; without a walk they are one label."""
    kinds = [kind for kind in ("initial_label", "refined_label") if kind in want]
    made: dict[str, Tensor] = {}
    if "initial_label" in kinds or (kinds and cam.walk is None):
        made = dict.fromkeys(kinds, initial_label(cam.cam, present, refiner, valid_box, crf=crf))
    if cam.walk is not None and "refined_label" in kinds:
        made["refined_label"] = refined_label(cam, present, refiner, valid_box, crf=crf)
    return made


def initial_label(
    cam: Tensor, present: PresentClasses, refiner: Refiner, valid_box: Tensor, *, crf: CrfFunction | None = None
) -> Tensor:
    """Label from CAM and low-level refinement.

    Args:
        cam: (B, P - 1, H, W) in [0, 1], the CAMs of the present classes.
        present: Classes that compete.
        refiner: Refiner of the same images.
        valid_box: (B, 4) int64.
        crf: Refines the scores last; None: nothing does.

    Returns:
        (B, H, W) int64 in 0..C and 255.

    Source:
        Paper Eq. 4 and section 3.4.
    """
    small = resized(cam, refiner.small_size)  # (B, P - 1, H/2, W/2) at stride 2
    refined = refiner.on_canvas(_competing_scores(small, present, refiner.config), num_sets=2)  # (B, 2 P, H, W)
    return ignore_outside(_decide(refined, present, refiner, crf), valid_box)


def refined_label(
    cam: CamResult, present: PresentClasses, refiner: Refiner, valid_box: Tensor, *, crf: CrfFunction | None = None
) -> Tensor:
    """Label from CAM, random walk and low-level refinement.

    Args:
        cam: (B, P - 1, H, W) CAMs of the present classes, with the affinity or attention of their largest scale.
        present: Classes that compete.
        refiner: Refiner of the same images.
        valid_box: (B, 4) int64.
        crf: As `initial_label`.

    Returns:
        (B, H, W) int64 in 0..C and 255.

    Source:
        Paper Eq. 6 and 7.
    """
    config = refiner.config
    small = resized(cam.cam, cam.grid)  # (B, P - 1, h, w)
    walked = walk(_walked_affinity(cam, config), _competing_scores(small, present, config), config)  # (B, 2 P, h, w)
    if config.refinement_region == "canvas":
        refined = refiner.on_canvas(walked, num_sets=2)  # (B, 2 P, H, W)
    else:
        refined = refiner.in_box(walked, valid_box, num_sets=2)  # (B, 2 P, H, W)
    return ignore_outside(_decide(refined, present, refiner, crf), valid_box)


@functools.lru_cache(maxsize=64)
def _whole_box(height: int, width: int, device: torch.device) -> Tensor:
    """(1, 4) valid box of a whole image."""
    return torch.tensor([[0, height, 0, width]], device=device)


def _walked_affinity(cam: CamResult, config: PseudoConfig) -> Tensor:
    """(B, hw, hw) affinity of the random walk: the learned one or the mean attention."""
    assert cam.walk is not None
    if config.propagation == "attention":
        logits = cam.walk.attention_logits
        assert logits is not None
        return mean_attention_affinity(logits, scale=cam.walk.attention_scale)
    assert cam.walk.affinity is not None
    return cam.walk.affinity


def _with_affinity(cam: CamResult, found: NetworkOutput) -> CamResult:
    """The same CAM, to walk along the affinity of another pass."""
    height, width = found.class_scores.shape[2:]
    return dataclasses.replace(cam, grid=(height, width), walk=found)


def _propagated_scores(cam: CamResult, tags: Tensor, config: PseudoConfig) -> Tensor:
    """(B, K, h, w) scores at the background score of propagated CAMs; without a walk, (B, K, H, W) of the CAM."""
    background = config.background_propagated
    if cam.walk is None:
        return present_scores(with_background(cam.cam, background), tags, softmax=config.softmax_scores)
    return propagate(cam.cam, tags, _walked_affinity(cam, config), grid=cam.grid, background=background, config=config)


def _competing_scores(cam: Tensor, present: PresentClasses, config: PseudoConfig) -> Tensor:
    """The scores that are refined or walked.

    (B, 2 P, H, W), the scores of the slots at each background score; for Eq. 4 as printed (B, P - 1, H, W), the CAMs.
    """
    if config.label_rule == "threshold":
        return mask_scores(cam, present.valid[:, 1:], softmax=False)
    groups = [
        mask_scores(with_background(cam, background), present.valid, softmax=config.softmax_scores)
        for background in (config.background_low, config.background_high)
    ]
    return torch.cat(groups, 1)


def _through_crf(scores: Tensor, valid: Tensor, refiner: Refiner, crf: CrfFunction | None) -> Tensor:
    """Put (B, P, H, W) scores, as shares of their sum, through the CRF if there is one; channels not valid become 0."""
    if crf is None:
        return scores
    shares = scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return mask_scores(crf(shares, refiner.image * 255), valid, softmax=False)


def _decide(scores: Tensor, present: PresentClasses, refiner: Refiner, crf: CrfFunction | None) -> Tensor:
    """Turn what `_competing_scores` gave, after refinement, into one label per pixel: (B, H, W) int64."""
    if crf is not None:
        scores = torch.cat([_through_crf(each, present.valid, refiner, crf) for each in scores.chunk(2, 1)], 1)
    config = refiner.config
    if config.label_rule == "threshold":
        slots = threshold_label(scores, present.valid[:, 1:], low=config.background_low, high=config.background_high)
        known = slots != IGNORE_INDEX
        return torch.where(known, present.to_class(torch.where(known, slots, 0)), slots)
    low, high = scores.chunk(2, 1)  # (B, 2 P, H, W) -> (B, P, H, W) each
    return merge_labels(present.to_class(best_slot(low)), present.to_class(best_slot(high)))
