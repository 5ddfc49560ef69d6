"""From an image and its tags to pseudo labels: CAM, labels, walk and refinement in the method's order.

Nothing here has a gradient. What a step shares is computed once: one refinement kernel per image serves both
thresholds, all classes and, wherever the valid box is the whole canvas, both labels; the two thresholds go through
walk and refinement side by side; only the classes of the tags take part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from afa.config import PseudoConfig
from afa.filtering.crf import dense_crf
from afa.kernels.dispatch import fused
from afa.kernels.resize import resize
from afa.pseudo.box import move_box
from afa.pseudo.cam import CamResult, ScoreFunction, multi_scale_cam
from afa.pseudo.labels import cam_label, ignore_outside, merge_labels, threshold_label
from afa.pseudo.par import refine, refinement_kernel
from afa.pseudo.scores import PresentClasses, best_slot, mask_scores, present_classes, present_scores, with_background
from afa.pseudo.walk import mean_attention_affinity, propagate, spread
from afa.types import IGNORE_INDEX

PSEUDO_KINDS = ("cam", "propagated", "cam_label", "propagated_label", "initial_label", "refined_label")
"""What `infer_pseudo` can be asked for."""


CrfFunction = Callable[[Tensor, Tensor], Tensor]
"""((B, P, H, W) probabilities, (B, 3, H, W) RGB in 0..255) -> (B, P, H, W) probabilities."""


class Refiner:
    """Low-level refinement of score maps by the images of one batch.

    The kernel is computed when it is first needed, once per batch.

    Args:
        image: (B, 3, H, W) RGB in [0, 1].
        config: Refinement settings.
    """

    def __init__(self, image: Tensor, config: PseudoConfig) -> None:
        self.image = image
        self.config = config
        self.size = (image.shape[2], image.shape[3])

    @property
    def small_size(self) -> tuple[int, int]:
        """Size at which scores are refined on the canvas."""
        stride = self.config.refinement_stride
        return (max(1, self.size[0] // stride), max(1, self.size[1] // stride))

    @cached_property
    def kernel(self) -> Tensor:
        """(B, n, h, w) kernel of the whole canvas."""
        return self._kernel(_resize(self.image, self.small_size))

    def on_canvas(self, scores: Tensor, *, num_sets: int = 1) -> Tensor:
        """Refine (B, P, h, w) scores over the whole canvas, to (B, P, H, W).

        Args:
            scores: One or more sets of scores side by side.
            num_sets: How many. The CRF lets the scores of a set compete; other refinements take each score alone.
        """
        scores = _resize(scores, self.small_size)
        if self.config.refinement == "crf":
            scores = self._crf(scores, _resize(self.image, self.small_size), num_sets)
        elif self.config.refinement != "none":
            scores = self._refine(scores, self.kernel)
        return _resize(scores, self.size)

    def in_box(self, scores: Tensor, valid_box: Tensor, *, num_sets: int = 1) -> Tensor:
        """Refine (B, P, h, w) scores inside each valid box, to (B, P, H, W); 0 outside the box.

        Image and scores are cropped at full size and then brought to the refinement size, scores with aligned
        corners (method.md sections 3 and 5). `num_sets` as in `on_canvas`.
        """
        scores = _resize(scores, self.size)
        if self.config.refinement == "none":
            return scores
        by_crf = self.config.refinement == "crf"
        if not by_crf and (scores.device.type != "cpu" or fused(scores.device)):
            return self._refine_boxes(scores, valid_box)
        boxes = valid_box.tolist()
        if not by_crf and all(box == [0, self.size[0], 0, self.size[1]] for box in boxes):
            small = interpolate(scores, size=self.small_size, mode="bilinear", align_corners=True)
            return _resize(self._refine(small, self.kernel), self.size)
        refined = torch.zeros_like(scores)
        for index, (top, bottom, left, right) in enumerate(boxes):
            inside = (slice(index, index + 1), slice(None), slice(top, bottom), slice(left, right))
            refined[inside] = self._refine_crop(index, inside, scores[inside], num_sets)
        return refined

    def _refine_boxes(self, scores: Tensor, valid_box: Tensor) -> Tensor:
        """All boxes at once: each box's small image lies in the top left of a canvas that fits the largest."""
        extent = torch.stack([valid_box[:, 1] - valid_box[:, 0], valid_box[:, 3] - valid_box[:, 2]], 1)
        extent = (extent // self.config.refinement_stride).clamp(min=1)
        corner = torch.stack([torch.zeros_like(extent), extent], 2).flatten(1)
        image = move_box(self.image, self.small_size, source=valid_box, target=corner, align_corners=False)
        small = move_box(scores, self.small_size, source=valid_box, target=corner, align_corners=True)
        refined = self._refine(small, self._kernel(image, extent), extent)
        return move_box(refined, self.size, source=corner, target=valid_box, align_corners=False)

    def _refine_crop(self, index: int, inside: tuple[slice, ...], crop: Tensor, num_sets: int) -> Tensor:
        size = (crop.shape[2], crop.shape[3])
        stride = self.config.refinement_stride
        small_size = (max(1, size[0] // stride), max(1, size[1] // stride))
        small = interpolate(crop, size=small_size, mode="bilinear", align_corners=True)
        if self.config.refinement == "crf":
            return _resize(self._crf(small, _resize(self.image[inside], small_size), num_sets), size)
        if size == self.size:
            kernel = self.kernel[index : index + 1]
        else:
            kernel = self._kernel(_resize(self.image[inside], small_size))
        return _resize(self._refine(small, kernel), size)

    def _kernel(self, image: Tensor, extent: Tensor | None = None) -> Tensor:
        config = self.config
        assert config.refinement != "none"
        assert config.refinement != "crf"
        return refinement_kernel(
            image,
            dilations=config.dilations,
            rgb_bandwidth=config.rgb_bandwidth,
            pos_bandwidth=config.pos_bandwidth,
            pos_weight=config.pos_weight,
            kind=config.refinement,
            extent=extent,
        )

    def _refine(self, scores: Tensor, kernel: Tensor, extent: Tensor | None = None) -> Tensor:
        config = self.config
        return refine(scores, kernel, dilations=config.dilations, iterations=config.iterations, extent=extent)

    def _crf(self, scores: Tensor, image: Tensor, num_sets: int) -> Tensor:
        """Each set of scores through the dense CRF, with its bandwidths of positions in pixels of the full size."""
        stride = self.config.refinement_stride
        refined = [
            dense_crf(each, 255 * image, gaussian_xy=3.0 / stride, bilateral_xy=64.0 / stride)
            for each in scores.chunk(num_sets, 1)
        ]
        return torch.cat(refined, 1)


@dataclass(frozen=True)
class TrainingLabels:
    """Pseudo labels of a training batch.

    Attributes:
        initial_label: (B, H, W) int64 in 0..C and 255; None when nothing learns from it at this step.
        refined_label: The same after walk and refinement; None likewise.
    """

    initial_label: Tensor | None
    refined_label: Tensor | None


@torch.no_grad()
def training_labels(
    score: ScoreFunction,
    image: Tensor,
    tags: Tensor,
    valid_box: Tensor,
    *,
    config: PseudoConfig,
    want_initial: bool,
    want_refined: bool,
    plain_scores: Tensor | None = None,
    num_slots: int | None = None,
) -> TrainingLabels:
    """Make the pseudo labels that a training step learns from, and no others.

    Args:
        score: Encoder pass.
        image: (B, 3, H, W) RGB in [0, 1].
        tags: (B, C), above 0 where present.
        valid_box: (B, 4) int64 (top, bottom, left, right), half open.
        config: Settings.
        want_initial: Make the initial label.
        want_refined: Make the refined label.
        plain_scores: (B, C, h, w) class scores of the training forward, reused for scale 1.
        num_slots: 1 + the largest number of tags of an image, if known.

    Returns:
        The labels that were wanted.
    """
    walks = want_refined and config.propagation != "none"
    present = present_classes(tags, num_slots=num_slots)
    cam = multi_scale_cam(
        score,
        image,
        scales=config.scales,
        affinity=walks,
        plain_scores=plain_scores,
        pick=present.foreground.gather,
    )
    refiner = Refiner(image, config)
    initial = refined = None
    if want_initial or (want_refined and not walks):
        initial = _initial_label(cam.cam, present, refiner, valid_box, config)
    if want_refined:
        refined = _refined_label(cam, present, refiner, valid_box, config) if walks else initial
    return TrainingLabels(initial if want_initial else None, refined)


def initial_label(
    cam: Tensor, present: PresentClasses, refiner: Refiner, valid_box: Tensor, *, config: PseudoConfig
) -> Tensor:
    """Label from CAM and low-level refinement.

    Args:
        cam: (B, C, H, W) in [0, 1].
        present: Classes that compete.
        refiner: Refiner of the same images.
        valid_box: (B, 4) int64.
        config: Settings.

    Returns:
        (B, H, W) int64 in 0..C and 255.

    Source:
        Paper Eq. 4 and section 3.4; method.md section 3.
    """
    return _initial_label(present.foreground.gather(cam), present, refiner, valid_box, config)


def _initial_label(
    cam: Tensor,
    present: PresentClasses,
    refiner: Refiner,
    valid_box: Tensor,
    config: PseudoConfig,
    crf: CrfFunction | None = None,
) -> Tensor:
    """`initial_label` from the (B, P - 1, H, W) CAMs of the present classes."""
    small = _resize(cam, refiner.small_size)
    refined = refiner.on_canvas(_competing_scores(small, present, config), num_sets=2)
    if crf is not None:
        refined = torch.cat([_through_crf(each, present.valid, refiner, crf) for each in refined.chunk(2, 1)], 1)
    return ignore_outside(_decide(refined, present, config), valid_box)


def refined_label(
    cam: CamResult, present: PresentClasses, refiner: Refiner, valid_box: Tensor, *, config: PseudoConfig
) -> Tensor:
    """Label from CAM, random walk and low-level refinement.

    Args:
        cam: CAM with the affinity or attention of its largest scale.
        present: Classes that compete.
        refiner: Refiner of the same images.
        valid_box: (B, 4) int64.
        config: Settings.

    Returns:
        (B, H, W) int64 in 0..C and 255.

    Source:
        Paper Eq. 6 and 7; method.md section 5.
    """
    picked = dataclasses.replace(cam, cam=present.foreground.gather(cam.cam))
    return _refined_label(picked, present, refiner, valid_box, config)


def _refined_label(
    cam: CamResult,
    present: PresentClasses,
    refiner: Refiner,
    valid_box: Tensor,
    config: PseudoConfig,
    crf: CrfFunction | None = None,
) -> Tensor:
    """`refined_label` from the (B, P - 1, H, W) CAMs of the present classes."""
    small = _resize(cam.cam, cam.grid)
    scores = _competing_scores(small, present, config)
    walked = spread(
        _walked_affinity(cam, config),
        scores,
        radius=config.affinity_radius,
        power=config.affinity_power,
        epsilon=config.walk_epsilon,
    )
    on_canvas = config.refinement_region == "canvas"
    refined = refiner.on_canvas(walked, num_sets=2) if on_canvas else refiner.in_box(walked, valid_box, num_sets=2)
    if crf is not None:
        refined = torch.cat([_through_crf(each, present.valid, refiner, crf) for each in refined.chunk(2, 1)], 1)
    return ignore_outside(_decide(refined, present, config), valid_box)


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
    num_slots: int | None = None,
) -> dict[str, Tensor]:
    """Make CAMs and pseudo labels of whole images.

    Args:
        score: Encoder pass.
        image: (B, 3, H, W) RGB in [0, 1].
        tags: (B, C), above 0 where present.
        config: Settings.
        want: What to return, of `PSEUDO_KINDS`.
        refined: Also put `cam_label` and `propagated_label` through the low-level refinement.
        crf: Put the scores of all labels through this at last; None: nothing.
        num_slots: 1 + the largest number of tags of an image, if known on the host.

    Returns:
        By name: `cam` (B, C, H, W) in [0, 1], absent classes 0; `propagated` (B, K, H, W) scores after the walk;
        `cam_label` and `propagated_label` (B, H, W) int64 in 0..C at their background scores; `initial_label` and
        `refined_label` (B, H, W) int64 in 0..C and 255.
    """
    assert set(want) <= set(PSEUDO_KINDS), want
    walks = config.propagation != "none" and bool({"propagated", "propagated_label", "refined_label"} & set(want))
    size = (image.shape[2], image.shape[3])
    present = present_classes(tags, num_slots=num_slots)
    foreground = present.foreground
    picked = multi_scale_cam(score, image, scales=config.scales, affinity=walks, pick=foreground.gather)
    cam = picked
    if {"cam", "cam_label", "propagated", "propagated_label"} & set(want):
        cam = dataclasses.replace(picked, cam=foreground.scatter(picked.cam, tags.shape[1]))
    refiner = Refiner(image, config)
    box = _whole_box(*size, image.device).expand(image.shape[0], -1)
    result: dict[str, Tensor] = {}
    if "cam" in want:
        result["cam"] = cam.cam
    if "cam_label" in want:
        if refined or crf is not None:
            scores = present_scores(with_background(cam.cam, config.background_cam), tags, softmax=True)
            scores = refiner.on_canvas(scores) if refined else scores
            result["cam_label"] = _finished(scores, tags, refiner, crf).argmax(1)
        else:
            result["cam_label"] = cam_label(cam.cam, tags, background=config.background_cam)
    if {"propagated", "propagated_label"} & set(want):
        scores = _propagated_scores(cam, tags, config)
        if "propagated" in want:
            result["propagated"] = _resize(scores, size)
        if "propagated_label" in want:
            scores = refiner.in_box(scores, box) if refined else _resize(scores, size)
            result["propagated_label"] = _finished(scores, tags, refiner, crf).argmax(1)
    if "initial_label" in want or ("refined_label" in want and not walks):
        label = _initial_label(picked.cam, present, refiner, box, config, crf)
        result.update({kind: label for kind in ("initial_label", "refined_label") if kind in want})
    if "refined_label" in want and walks:
        result["refined_label"] = _refined_label(picked, present, refiner, box, config, crf)
    return result


@functools.lru_cache(maxsize=64)
def _whole_box(height: int, width: int, device: torch.device) -> Tensor:
    """(1, 4) valid box of a whole image."""
    return torch.tensor([[0, height, 0, width]], device=device)


def _walked_affinity(cam: CamResult, config: PseudoConfig) -> Tensor:
    """(B, hw, hw) what the random walk walks on: the learned affinity or the mean attention."""
    assert cam.walk is not None
    if config.propagation == "attention":
        logits = cam.walk.attention_logits
        assert logits is not None
        return mean_attention_affinity(logits, scale=cam.walk.attention_scale)
    assert cam.walk.affinity is not None
    return cam.walk.affinity


def _propagated_scores(cam: CamResult, tags: Tensor, config: PseudoConfig) -> Tensor:
    """(B, K, h, w) scores at the background score of propagated CAMs; without a walk, those of the CAM."""
    if cam.walk is None:
        scores = with_background(cam.cam, config.background_propagated)
        return present_scores(scores, tags, softmax=config.softmax_scores)
    return propagate(
        cam.cam,
        tags,
        _walked_affinity(cam, config),
        grid=cam.grid,
        background=config.background_propagated,
        radius=config.affinity_radius,
        power=config.affinity_power,
        epsilon=config.walk_epsilon,
        softmax=config.softmax_scores,
    )


def _competing_scores(cam: Tensor, present: PresentClasses, config: PseudoConfig) -> Tensor:
    """What is refined or walked: per background score the slots' scores, or for Eq. 4 as printed the CAMs."""
    if config.label_rule == "threshold":
        return mask_scores(cam, present.valid[:, 1:], softmax=False)
    groups = [
        mask_scores(with_background(cam, background), present.valid, softmax=config.softmax_scores)
        for background in (config.background_low, config.background_high)
    ]
    return torch.cat(groups, 1)


def _finished(scores: Tensor, tags: Tensor, refiner: Refiner, crf: CrfFunction | None) -> Tensor:
    """(B, K, H, W) scores through the CRF, if there is one."""
    if crf is None:
        return scores
    valid = torch.cat([torch.ones_like(tags[:, :1], dtype=torch.bool), tags > 0], 1)
    return _through_crf(scores, valid, refiner, crf)


def _through_crf(scores: Tensor, valid: Tensor, refiner: Refiner, crf: CrfFunction) -> Tensor:
    """(B, P, H, W) scores, as shares of their sum, through the CRF; 0 in the channels that are not valid."""
    shares = scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return mask_scores(crf(shares, refiner.image * 255), valid, softmax=False)


def _decide(scores: Tensor, present: PresentClasses, config: PseudoConfig) -> Tensor:
    """Turn what `_competing_scores` gave, after refinement, into one label per pixel."""
    if config.label_rule == "threshold":
        slots = threshold_label(scores, present.valid[:, 1:], low=config.background_low, high=config.background_high)
        known = slots != IGNORE_INDEX
        return torch.where(known, present.to_class(torch.where(known, slots, 0)), slots)
    low, high = scores.chunk(2, 1)
    return merge_labels(present.to_class(best_slot(low)), present.to_class(best_slot(high)))


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[2:] == size:
        return maps
    return resize(maps, size)
