"""How images of one size become segmentation logits or pseudo labels at their native sizes.

Knows scales, flips and sizes, but neither ground truth nor files.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Final, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from afa.config import Config, EvaluationConfig, Protocol
from afa.errors import AfaError
from afa.evaluation.once import OncePerView
from afa.filtering.crf import CrfSettings, dense_crf
from afa.model.network import AfaNetwork
from afa.pseudo.cam import ScoreFunction, multi_scale_cam
from afa.pseudo.pipeline import infer_pseudo
from afa.runtime import autocast
from afa.types import NetworkOutput, normalize_image

PROTOCOLS: Final = get_args(Protocol)
"""Names of the segmentation protocols."""

PSEUDO_LABELS: Final = ("cam", "propagated", "initial", "refined")
"""Kinds of pseudo label: CAM, propagated CAM, refined CAM (initial), refined propagated CAM (refined)."""

_LEAST_PROBABILITY: Final = 1e-20  # has a logarithm, and is not seen

MIN_SIDE: Final = 32
"""Shortest side of the network's input, pixels; with less, the first stage of MiT has no keys left."""


@dataclasses.dataclass(frozen=True)
class LogitMaps:
    """Output of the network for one image at its original, small size; enlarged maps would take much memory.

    Attributes:
        maps: One (K, h, w) float32 map of logits for each scale.
        image: (C,) float32 class logits of the whole image, fused over the scales.
    """

    maps: tuple[Tensor, ...]
    image: Tensor

    def allow(self, classes: np.ndarray | None) -> LogitMaps:
        """Rule classes out.

        Args:
            classes: (K,) bool, False for those that become the largest nowhere, with a softmax of 0; None allows all.
        """
        if classes is None:
            return self
        # Not minus infinity: interpolation multiplies it by 0.
        bias = torch.from_numpy(np.where(classes, 0, -1e30).astype(np.float32))
        bias = bias.to(self.image.device, non_blocking=True)[:, None, None]
        return LogitMaps(tuple(logits + bias for logits in self.maps), self.image)

    @torch.inference_mode()
    def enlarge(self, size: tuple[int, int]) -> Tensor:
        """Fuse the scales at a size, (height, width): (K, H, W) float32 logits."""
        fused: Tensor | None = None
        for logits in self.maps:
            large = interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
            fused = large if fused is None else torch.maximum(fused, large, out=fused)
        assert fused is not None
        return fused

    @torch.inference_mode()
    def label(self, size: tuple[int, int]) -> Tensor:
        """The class of the largest logit at a size, (height, width): (H, W) uint8."""
        # On a CPU, the maximum with its index over a strided dimension is several times faster than the index alone.
        return self.enlarge(size).max(0).indices.to(torch.uint8)

    @torch.inference_mode()
    def scores(self, size: tuple[int, int]) -> Tensor:
        """Softmax over the classes at a size, (height, width): (K, H, W) float32."""
        logits = self.enlarge(size)
        # In place, so that the maps of a large photograph exist only once.
        logits.sub_(logits.amax(0)).exp_()
        return logits.div_(logits.sum(0))


def host_tensor(array: np.ndarray, *, device: torch.device) -> Tensor:
    """Turn an array of any shape into a tensor that is ready to go to `device`, page-locked if that is a GPU."""
    # torch accepts neither negative strides nor read-only arrays, such as Pillow's.
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def image_tensor(image: np.ndarray | Tensor, *, device: torch.device) -> Tensor:
    """Turn an (H, W, 3) uint8 RGB image into (1, 3, H, W) float32 in [0, 1] on `device`."""
    if isinstance(image, np.ndarray):
        image = host_tensor(image, device=device)
    assert image.dtype == torch.uint8, image.dtype
    assert image.ndim == 3, image.shape
    assert image.shape[2] == 3, image.shape
    return image.to(device, non_blocking=device.type == "cuda").permute(2, 0, 1)[None].float() / 255


def view_sizes(size: tuple[int, int], config: Config) -> tuple[tuple[int, int], ...]:
    """The (height, width) of each pass in which the network sees an image of a (height, width) under the protocol.

    Images of equal ones can be batched. The `evaluation` section says protocol, sizes and scales.
    """
    height, width = size
    evaluation = config.evaluation
    if _chained(evaluation):
        base = _long_size(size, evaluation)
        return tuple(_scaled_down(base, scale) for scale in evaluation.scales)
    if evaluation.multiscale:
        factors = [scale * evaluation.long_side / max(size) for scale in evaluation.scales]
    else:
        factors = [evaluation.short_side / min(size) if evaluation.short_side else 1.0]
    return tuple((max(MIN_SIDE, round(height * f)), max(MIN_SIDE, round(width * f))) for f in factors)


def _chained(evaluation: EvaluationConfig) -> bool:
    """Whether the other scales are made from the image at the long side."""
    return evaluation.multiscale and evaluation.multiscale_rule == "reference"


def _long_size(size: tuple[int, int], evaluation: EvaluationConfig) -> tuple[int, int]:
    return _scaled_down(size, evaluation.long_side / max(size))


def _scaled_down(size: tuple[int, int], factor: float) -> tuple[int, int]:
    return max(MIN_SIDE, int(size[0] * factor)), max(MIN_SIDE, int(size[1] * factor))


def group_sizes(size: tuple[int, int], config: Config) -> tuple[tuple[int, int], ...]:
    """Sizes by which images are put into batches: `view_sizes`, and for the CRF the image's own, its largest work."""
    sizes = view_sizes(size, config)
    return (*sizes, size) if config.evaluation.crf else sizes


@torch.inference_mode()
def logit_maps(
    network: AfaNetwork | OncePerView,
    images: Sequence[np.ndarray | Tensor],
    config: Config,
    *,
    allowed: Sequence[np.ndarray | None] | None = None,
) -> list[LogitMaps]:
    """Segment images that the network sees at the same sizes, all in one batch.

    single: one pass at native size, or at `evaluation.short_side`. multiscale: the longer side becomes
    `evaluation.long_side`, then one pass per scale with its horizontal flip; mean over the flip, maximum over the
    scales, on logits; `evaluation.multiscale_rule` says from which image, and at which size. Sides below 32 pixels are
    stretched to 32. Logits are enlarged bilinearly (align_corners=False) before they are fused. +crf: what is fused at
    the size of the image, as a softmax, is refined by the dense CRF; the logits returned are the logarithm of its
    probabilities.

    Args:
        network: In eval mode; its parameters say the device.
        images: (H, W, 3) uint8 RGB each, of equal `view_sizes`.
        config: Its `evaluation` section says protocol, sizes, scales and CRF, `train.precision` the arithmetic.
        allowed: For each image (K,) bool, False for classes that no pixel may become, or None; None allows all.

    Returns:
        Logits of each image on the device of the network; without the CRF a GPU is not synchronized.

    Raises:
        AfaError: Unknown protocol.

    Source:
        docs/method.md, "Evaluation".
    """
    check_choice(config.evaluation.protocol, PROTOCOLS, what="protocol")
    device = next(network.parameters()).device
    pixels = [normalize_image(image_tensor(image, device=device)) for image in images]  # (1, 3, H, W) each
    sizes = {view_sizes(_size(image), config) for image in pixels}
    assert len(sizes) == 1, sizes
    if chained := _chained(config.evaluation):
        pixels = [_resize(each, _long_size(_size(each), config.evaluation)) for each in pixels]
    passes = [_view_logits(network, pixels, size, config) for size in sizes.pop()]
    image_logits = functools.reduce(torch.maximum, [image for _, image in passes])  # (B, C)
    logits = [segmentation for segmentation, _ in passes]  # (B, K, h, w) each
    if chained:
        scales = config.evaluation.scales
        grid = _size(logits[scales.index(1.0) if 1.0 in scales else 0])
        logits = [functools.reduce(torch.maximum, [_resize(each, grid) for each in logits])]
    maps = [LogitMaps(tuple(each[i] for each in logits), image_logits[i]) for i in range(len(images))]
    allowed = allowed or [None] * len(maps)
    maps = [each.allow(classes) for each, classes in zip(maps, allowed, strict=True)]
    if not config.evaluation.crf:
        return maps
    # Repeated after the CRF, which gives every class at least a small probability.
    refined = through_crf(maps, images, config=config.evaluation)
    return [each.allow(classes) for each, classes in zip(refined, allowed, strict=True)]


def _view_logits(
    network: AfaNetwork | OncePerView, pixels: Sequence[Tensor], size: tuple[int, int], config: Config
) -> tuple[Tensor, Tensor]:
    """(B, K, h, w) segmentation and (B, C) image logits of normalized images seen at one size."""
    multiscale = config.evaluation.multiscale
    view = torch.cat([_resize(image, size, antialias=not multiscale) for image in pixels])  # (B, 3, H', W')
    if multiscale:
        view = torch.cat([view, view.flip(-1)])  # (2 B, 3, H', W')
    with autocast(view.device, config.train.precision):
        output: NetworkOutput = network(view, segmentation=True, affinity=False)
    assert output.seg_logits is not None
    segmentation, image_logits = output.seg_logits.float(), output.image_logits.float()
    if multiscale:
        plain, flipped = segmentation.chunk(2)  # (B, K, h, w) each
        segmentation = (plain + flipped.flip(-1)) / 2
        image_logits = torch.stack(image_logits.chunk(2)).mean(0)  # (2 B, C) -> (2, B, C) -> (B, C)
    return segmentation, image_logits


def through_crf(
    maps: Sequence[LogitMaps], images: Sequence[np.ndarray | Tensor], *, config: EvaluationConfig
) -> list[LogitMaps]:
    """Put the logits of (H, W, 3) uint8 RGB images through the dense CRF; on a GPU, images of one size together.

    Each image gets one map of log probabilities at its size.
    """
    device = maps[0].image.device
    groups: dict[object, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(i if device.type == "cpu" else image.shape, []).append(i)
    refined: dict[int, LogitMaps] = {}
    for group in groups.values():
        pixels = torch.cat([image_tensor(images[i], device=device) * 255 for i in group])
        size = (pixels.shape[2], pixels.shape[3])
        probabilities = torch.stack([maps[i].scores(size) for i in group])
        for i, found in zip(group, crf(probabilities, pixels, config=config), strict=True):
            refined[i] = LogitMaps((found.clamp(min=_LEAST_PROBABILITY).log(),), maps[i].image)
    return [refined[i] for i in range(len(maps))]


def crf(probabilities: Tensor, pixels: Tensor, *, config: EvaluationConfig) -> Tensor:
    """Refine probabilities by the dense CRF with the `crf_*` keys of a configuration.

    (B, K, H, W) probabilities that sum to 1 over K and (B, 3, H, W) RGB in 0..255 give (B, K, H, W) float32 ones.
    """
    names = [each.name for each in dataclasses.fields(CrfSettings)]
    settings = CrfSettings(**{name: getattr(config, f"crf_{name}") for name in names})
    return dense_crf(probabilities, pixels, settings)


@torch.inference_mode()
def pseudo_labels(
    network: AfaNetwork | OncePerView,
    images: Sequence[np.ndarray | Tensor],
    tags: Sequence[np.ndarray | Tensor],
    config: Config,
    *,
    kind: str,
    refine: bool = False,
    limits: Tensor | None = None,
) -> list[Tensor]:
    """Make pseudo labels of tagged images that the network sees at the same size, all in one batch.

    Args:
        network: Its parameters say the device; it stays as it is, buffers and modes included.
        images: (H, W, 3) uint8 RGB each, of equal `pseudo_sizes`.
        tags: (C,) in {0, 1} for each image.
        config: Its `pseudo` section; `evaluation.short_side`, to which images are scaled first, with their labels
            scaled back, and the CRF's settings for `pseudo.crf`; `train.precision`, of the network: all else is fp32.
        kind: One of `PSEUDO_LABELS`. cam and propagated decide every pixel with one background score,
            `pseudo.background_cam` and `pseudo.background_propagated`; initial and refined are what training
            learns from, uncertain pixels included.
        refine: Refine cam or propagated labels with `pseudo.refinement`.
        limits: (2, C), if the images are tiles of one image: what `cam_limits` returned of it.

    Returns:
        For each image (H, W) int64, 0..C, and 255 where initial and refined are uncertain; without tags all 0.

    Raises:
        AfaError: Unknown kind.

    Source:
        Paper Eq. 4, 6 and 7; docs/method.md, "Evaluation".
    """
    check_choice(kind, PSEUDO_LABELS, what="labels")
    device = next(network.parameters()).device
    labels = [torch.zeros(image.shape[:2], dtype=torch.int64, device=device) for image in images]
    chosen = [i for i, each in enumerate(tags) if (each > 0).any()]
    if not chosen:
        return labels
    pixels = [image_tensor(images[i], device=device) for i in chosen]  # (1, 3, H, W) each
    view = torch.cat([pseudo_view(image, config) for image in pixels])  # (B, 3, H', W')
    batch_tags = torch.stack([torch.as_tensor(tags[i], dtype=torch.float32) for i in chosen])  # (B, C)
    batch_tags = batch_tags.to(device, non_blocking=device.type == "cuda")
    want = f"{kind}_label"
    finish = functools.partial(crf, config=config.evaluation) if config.pseudo.crf else None
    if limits is not None:
        limits = limits.to(device)[:, None, :, None, None].expand(-1, len(view), -1, -1, -1)  # (2, B, C, 1, 1)
    score = _scorer(network, config)
    made = infer_pseudo(
        score, view, batch_tags, config=config.pseudo, want=(want,), refined=refine, crf=finish, limits=limits
    )
    for i, label, image in zip(chosen, made[want], pixels, strict=True):
        if label.shape != image.shape[2:]:
            label = interpolate(label[None, None].float(), size=image.shape[2:], mode="nearest-exact")[0, 0].long()
        labels[i] = label
    return labels


@torch.inference_mode()
def cam_limits(network: AfaNetwork, images: Sequence[np.ndarray | Tensor], config: Config) -> Tensor:
    """The range of the CAMs of tiles before these are scaled to [0, 1], so that one image has one range.

    Args:
        network, config: As for `pseudo_labels`.
        images: (H, W, 3) uint8 RGB each, tiles of equal `pseudo_sizes`.

    Returns:
        (2, C) smallest and largest value of each class over the tiles.
    """
    device = next(network.parameters()).device
    view = torch.cat([pseudo_view(image_tensor(image, device=device), config) for image in images])  # (B, 3, H', W')
    unscaled = torch.tensor([0.0, 1 - 1e-5], device=device).view(2, 1, 1, 1, 1)
    scales, mirrored = config.pseudo.scales, config.pseudo.mirror
    made = multi_scale_cam(_scorer(network, config), view, scales=scales, mirrored=mirrored, limits=unscaled)
    return torch.stack([made.cam.amin((0, 2, 3)), made.cam.amax((0, 2, 3))])


def _scorer(network: AfaNetwork | OncePerView, config: Config) -> ScoreFunction:
    def score(view: Tensor, affinity: bool) -> NetworkOutput:
        with autocast(view.device, config.train.precision):
            return network.score(view, affinity)

    return score


def pseudo_view(pixels: Tensor, config: Config) -> Tensor:
    """Scale a (1, 3, H, W) RGB image in [0, 1] for CAM passes.

    `evaluation.short_side` is its shorter side then, 0 the native one; the smallest of `pseudo.scales` must leave 32
    pixels: smaller images are enlarged.
    """
    return _resize(pixels, _pseudo_view_size((pixels.shape[2], pixels.shape[3]), config), antialias=True)


def pseudo_sizes(size: tuple[int, int], config: Config) -> tuple[tuple[int, int], ...]:
    """The (height, width) of each pass in which the network sees an image of a (height, width) for its pseudo label."""
    height, width = _pseudo_view_size(size, config)
    return tuple((int(height * scale), int(width * scale)) for scale in config.pseudo.scales)


def check_choice(value: str, choices: Sequence[str], *, what: str) -> None:
    """Raise an `AfaError` unless `value` is one of `choices`; `what` names it in the message."""
    if value not in choices:
        raise AfaError(f"{what} is {value!r}; use one of {', '.join(choices)}")


def _pseudo_view_size(size: tuple[int, int], config: Config) -> tuple[int, int]:
    short_side = config.evaluation.short_side
    factor = short_side / min(size) if short_side else 1.0
    min_side = math.ceil(MIN_SIDE / min(1.0, *config.pseudo.scales))
    return max(min_side, round(size[0] * factor)), max(min_side, round(size[1] * factor))


def _size(maps: Tensor) -> tuple[int, int]:
    """(height, width) of (B, C, H, W)."""
    return maps.shape[2], maps.shape[3]


def _resize(image: Tensor, size: tuple[int, int], *, antialias: bool = False) -> Tensor:
    if size == image.shape[2:]:
        return image
    return interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=antialias)
