"""How images of one size become segmentation logits or pseudo labels at their native sizes.

Knows scales, flips and sizes; neither ground truth nor files.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from afa.config import EvaluationConfig, Precision, PseudoConfig
from afa.errors import AfaError
from afa.filtering.crf import CrfSettings, dense_crf
from afa.model.network import AfaNetwork
from afa.pseudo.pipeline import infer_pseudo
from afa.runtime import autocast
from afa.types import NetworkOutput, normalize_image

PROTOCOLS: Final = ("single", "multiscale", "single+crf", "multiscale+crf")
"""Names of the segmentation protocols."""

CRF: Final = "+crf"
"""End of the names of protocols whose softmax goes through the dense CRF."""

PSEUDO_LABELS: Final = ("cam", "propagated", "initial", "refined")
"""Kinds of pseudo label: CAM, propagated CAM, refined CAM (initial), refined propagated CAM (refined)."""

_LEAST_PROBABILITY: Final = 1e-20  # has a logarithm, and is not seen

MIN_SIDE: Final = 32
"""Shortest side that the network is given, pixels; with less, the first stage of MiT has no keys left."""


@dataclasses.dataclass(frozen=True)
class DenseLogits:
    """What the network says of one image.

    Attributes:
        segmentation: (K, H, W) float32 logits at the size asked for.
        image: (C,) float32 class logits of the whole image, fused as the segmentation is.
    """

    segmentation: Tensor
    image: Tensor


@dataclasses.dataclass(frozen=True)
class LogitMaps:
    """What the network says of one image, as small as it says it; enlarging is what takes memory.

    Attributes:
        maps: One (K, h, w) float32 map of logits for each scale.
        image: (C,) float32 class logits of the whole image, fused over the scales.
    """

    maps: tuple[Tensor, ...]
    image: Tensor

    def allow(self, classes: np.ndarray) -> LogitMaps:
        """Rule classes out.

        Args:
            classes: (K,) bool, False for those that no pixel may become.

        Returns:
            Maps in which those are never the largest and have a softmax of 0.
        """
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
        # Over a strided dimension a CPU finds the maximum with its index several times faster than the index alone.
        return self.enlarge(size).max(0).indices.to(torch.uint8)

    @torch.inference_mode()
    def scores(self, size: tuple[int, int]) -> Tensor:
        """Softmax over the classes at a size, (height, width): (K, H, W) float32."""
        logits = self.enlarge(size)
        # In place: the maps of a large photograph are there once, not twice.
        logits.sub_(logits.amax(0)).exp_()
        return logits.div_(logits.sum(0))


def host_tensor(array: np.ndarray, *, device: torch.device) -> Tensor:
    """Turn an array of any shape into a tensor that is ready to go to `device`, page-locked if that is a GPU."""
    # torch takes neither negative strides nor arrays that must not be written to, such as Pillow's.
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


def view_sizes(size: tuple[int, int], *, protocol: str, config: EvaluationConfig) -> tuple[tuple[int, int], ...]:
    """Sizes at which the network sees an image under a protocol; images of equal ones can be batched.

    Args:
        size: (height, width) of the image.
        protocol: One of `PROTOCOLS`.
        config: Sizes and scales.

    Returns:
        (height, width) of each pass.
    """
    height, width = size
    if protocol.removesuffix(CRF) == "single":
        factors = [config.short_side / min(size) if config.short_side else 1.0]
    else:
        factors = [scale * config.long_side / max(size) for scale in config.scales]
    return tuple((max(MIN_SIDE, round(height * f)), max(MIN_SIDE, round(width * f))) for f in factors)


def group_sizes(size: tuple[int, int], *, protocol: str, config: EvaluationConfig) -> tuple[tuple[int, int], ...]:
    """Sizes by which images are put into batches: `view_sizes`, and for the CRF the image's own, its largest work.

    Args:
        size: (height, width) of the image.
        protocol: One of `PROTOCOLS`.
        config: Sizes and scales.

    Returns:
        (height, width) of each pass, and of the image where the protocol ends with the CRF.
    """
    sizes = view_sizes(size, protocol=protocol, config=config)
    return (*sizes, size) if protocol.endswith(CRF) else sizes


@torch.inference_mode()
def logit_maps(
    network: AfaNetwork,
    images: Sequence[np.ndarray | Tensor],
    *,
    protocol: str,
    config: EvaluationConfig,
    allowed: Sequence[np.ndarray | None] | None = None,
    precision: Precision = "fp32",
) -> list[LogitMaps]:
    """Segment images that the network sees at the same sizes, all in one batch.

    single: one pass at native size, or at `config.short_side`. multiscale: the longer side becomes
    `config.long_side`, then one pass per scale with its horizontal flip; mean over the flip, maximum over the
    scales, on logits. Sides below 32 pixels are stretched to 32. Logits are enlarged bilinearly
    (align_corners=False) before they are fused. +crf: what is fused at the size of the image, as a softmax, is
    refined by the dense CRF; the logits returned are the logarithm of its probabilities.

    Args:
        network: In eval mode; its parameters say the device.
        images: (H, W, 3) uint8 RGB each, of equal `view_sizes`.
        protocol: One of `PROTOCOLS`.
        config: Sizes, scales and the settings of the CRF.
        allowed: For each image (K,) bool, False for classes that no pixel may become, or None; None allows all.
        precision: Arithmetic of the network.

    Returns:
        Logits of each image on the device of the network; without the CRF a GPU is not synchronized.

    Raises:
        AfaError: Unknown protocol.

    Source:
        docs/method.md, "Evaluation".
    """
    check_choice(protocol, PROTOCOLS, what="protocol")
    device = next(network.parameters()).device
    pixels = [normalize_image(image_tensor(image, device=device)) for image in images]
    base = protocol.removesuffix(CRF)
    sizes = {view_sizes((image.shape[2], image.shape[3]), protocol=protocol, config=config) for image in pixels}
    assert len(sizes) == 1, sizes
    scales: list[Tensor] = []
    image_logits: Tensor | None = None
    for size in sizes.pop():
        views = [_resize(image, size, antialias=base == "single") for image in pixels]
        view = torch.cat(views) if len(views) > 1 else views[0]
        if base == "multiscale":
            view = torch.cat([view, view.flip(-1)])
        with autocast(device, precision):
            output = network(view, segmentation=True, affinity=False)
        segmentation, image_scores = output.seg_logits.float(), output.image_logits.float()
        if base == "multiscale":
            plain, flipped = segmentation.chunk(2)
            segmentation = (plain + flipped.flip(-1)) / 2
            image_scores = image_scores.unflatten(0, (2, -1)).mean(0)
        scales.append(segmentation)
        image_logits = image_scores if image_logits is None else torch.maximum(image_logits, image_scores)
    assert image_logits is not None
    maps = [LogitMaps(tuple(scale[i] for scale in scales), image_logits[i]) for i in range(len(images))]
    allowed = allowed or [None] * len(maps)
    maps = [_restrict(each, classes) for each, classes in zip(maps, allowed, strict=True)]
    if base == protocol:
        return maps
    # Again afterwards: the CRF gives the least probability to every class.
    refined = _through_crf(maps, images, config=config)
    return [_restrict(each, classes) for each, classes in zip(refined, allowed, strict=True)]


def _restrict(maps: LogitMaps, classes: np.ndarray | None) -> LogitMaps:
    return maps if classes is None else maps.allow(classes)


def _through_crf(
    maps: Sequence[LogitMaps], images: Sequence[np.ndarray | Tensor], *, config: EvaluationConfig
) -> list[LogitMaps]:
    """One map of log probabilities at the size of each image; on a GPU, images of one size together."""
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
    """Refine probabilities by the dense CRF with the settings of a configuration.

    Args:
        probabilities: (B, K, H, W), summing to 1 over K.
        pixels: (B, 3, H, W) RGB in 0..255.
        config: Its `crf_*` keys.

    Returns:
        (B, K, H, W) float32 probabilities.
    """
    settings = CrfSettings(
        iterations=config.crf_iterations,
        gaussian_weight=config.crf_gaussian_weight,
        gaussian_xy=config.crf_gaussian_xy,
        bilateral_weight=config.crf_bilateral_weight,
        bilateral_xy=config.crf_bilateral_xy,
        bilateral_rgb=config.crf_bilateral_rgb,
    )
    return dense_crf(probabilities, pixels, settings)


def dense_logits(
    network: AfaNetwork,
    image: np.ndarray | Tensor,
    *,
    protocol: str,
    config: EvaluationConfig,
    out_size: tuple[int, int] | None = None,
    precision: Precision = "fp32",
) -> DenseLogits:
    """Segment one image under a named protocol, as `logit_maps` does several.

    Args:
        network: In eval mode; its parameters say the device.
        image: (H, W, 3) uint8 RGB.
        protocol: One of `PROTOCOLS`.
        config: Sizes and scales.
        out_size: (height, width) of the logits; None is that of the image.
        precision: Arithmetic of the network.

    Returns:
        Logits on the device of the network.

    Raises:
        AfaError: Unknown protocol.
    """
    (maps,) = logit_maps(network, [image], protocol=protocol, config=config, precision=precision)
    return DenseLogits(maps.enlarge(out_size or (image.shape[0], image.shape[1])), maps.image)


def seg_logits(network: AfaNetwork, image: np.ndarray | Tensor, *, protocol: str, config: EvaluationConfig) -> Tensor:
    """The (K, H, W) segmentation logits of `dense_logits`, which see."""
    return dense_logits(network, image, protocol=protocol, config=config).segmentation


def pseudo_label(
    network: AfaNetwork,
    image: np.ndarray | Tensor,
    tags: np.ndarray | Tensor,
    *,
    kind: str,
    config: PseudoConfig,
    short_side: int = 0,
    refine: bool = False,
    crf_config: EvaluationConfig | None = None,
    precision: Precision = "fp32",
) -> Tensor:
    """Make a pseudo label of one tagged image, as `pseudo_labels` does of several.

    Args:
        network: Its parameters say the device; it stays as it is, buffers and modes included.
        image: (H, W, 3) uint8 RGB.
        tags: (C,) in {0, 1}.
        kind: One of `PSEUDO_LABELS`.
        config: Everything about pseudo labels.
        short_side: Shorter side that the image is scaled to first, pixels, with its label scaled back; 0 = native.
        refine: Refine a cam or propagated label with `config.refinement`.
        crf_config: Settings of the CRF, for `config.crf`; None is the default.
        precision: Arithmetic of the network; all else is fp32.

    Returns:
        (H, W) int64, 0..C, and 255 where initial and refined are uncertain.

    Raises:
        AfaError: Unknown kind.
    """
    (label,) = pseudo_labels(
        network,
        [image],
        [tags],
        kind=kind,
        config=config,
        short_side=short_side,
        refine=refine,
        crf_config=crf_config,
        precision=precision,
    )
    return label


@torch.inference_mode()
def pseudo_labels(
    network: AfaNetwork,
    images: Sequence[np.ndarray | Tensor],
    tags: Sequence[np.ndarray | Tensor],
    *,
    kind: str,
    config: PseudoConfig,
    short_side: int = 0,
    refine: bool = False,
    crf_config: EvaluationConfig | None = None,
    precision: Precision = "fp32",
) -> list[Tensor]:
    """Make pseudo labels of tagged images that the network sees at the same size, all in one batch.

    Args:
        network: Its parameters say the device; it stays as it is, buffers and modes included.
        images: (H, W, 3) uint8 RGB each, of equal `pseudo_sizes`.
        tags: (C,) in {0, 1} for each image.
        kind: One of `PSEUDO_LABELS`. cam and propagated decide every pixel with one background score,
            `config.background_cam` and `config.background_propagated`; initial and refined are what training
            learns from, uncertain pixels included.
        config: Everything about pseudo labels.
        short_side: Shorter side that images are scaled to first, pixels, with their labels scaled back; 0 = native.
        refine: Refine cam or propagated labels with `config.refinement`.
        crf_config: Settings of the CRF, for `config.crf`; None is the default.
        precision: Arithmetic of the network; all else is fp32.

    Returns:
        For each image (H, W) int64, 0..C, and 255 where initial and refined are uncertain.

    Raises:
        AfaError: Unknown kind.

    Source:
        Paper Eq. 4, 6 and 7; docs/method.md, "Evaluation".
    """
    check_choice(kind, PSEUDO_LABELS, what="labels")
    device = next(network.parameters()).device

    def score(view: Tensor, affinity: bool) -> NetworkOutput:
        with autocast(device, precision):
            return network.score(view, affinity)

    pixels = [image_tensor(image, device=device) for image in images]
    view = torch.cat([pseudo_view(image, config=config, short_side=short_side) for image in pixels])
    batch_tags = torch.stack([torch.as_tensor(each, dtype=torch.float32) for each in tags])
    batch_tags = batch_tags.to(device, non_blocking=device.type == "cuda")
    want = f"{kind}_label"
    finish = functools.partial(crf, config=crf_config or EvaluationConfig()) if config.crf else None
    labels = infer_pseudo(score, view, batch_tags, config=config, want=(want,), refined=refine, crf=finish)[want]
    return [
        interpolate(label[None, None].float(), size=image.shape[2:], mode="nearest-exact")[0, 0].long()
        if label.shape != image.shape[2:]
        else label
        for label, image in zip(labels, pixels, strict=True)
    ]


def pseudo_view(pixels: Tensor, *, config: PseudoConfig, short_side: int) -> Tensor:
    """Scale an image for CAM passes.

    Args:
        pixels: (1, 3, H, W) RGB in [0, 1].
        config: Its smallest scale must leave 32 pixels; smaller images are enlarged.
        short_side: Shorter side, pixels; 0 = native.

    Returns:
        (1, 3, H', W').
    """
    size = _pseudo_view_size((pixels.shape[2], pixels.shape[3]), config=config, short_side=short_side)
    return _resize(pixels, size, antialias=True)


def pseudo_sizes(size: tuple[int, int], *, config: PseudoConfig, short_side: int) -> tuple[tuple[int, int], ...]:
    """Sizes at which the network sees an image for its pseudo label; images of equal ones can be batched.

    Args:
        size: (height, width) of the image.
        config: Its scales apply.
        short_side: Shorter side that the image is scaled to first, pixels; 0 = native.

    Returns:
        (height, width) of each pass.
    """
    height, width = _pseudo_view_size(size, config=config, short_side=short_side)
    return tuple((int(height * scale), int(width * scale)) for scale in config.scales)


def check_choice(value: str, choices: Sequence[str], *, what: str) -> None:
    """Raise an `AfaError` unless `value` is one of `choices`; `what` names it in the message."""
    if value not in choices:
        raise AfaError(f"{what} is {value!r}; use one of {', '.join(choices)}")


def _pseudo_view_size(size: tuple[int, int], *, config: PseudoConfig, short_side: int) -> tuple[int, int]:
    factor = short_side / min(size) if short_side else 1.0
    min_side = math.ceil(MIN_SIDE / min(1.0, *config.scales))
    return max(min_side, round(size[0] * factor)), max(min_side, round(size[1] * factor))


def _resize(image: Tensor, size: tuple[int, int], *, antialias: bool = False) -> Tensor:
    if size == image.shape[2:]:
        return image
    return interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=antialias)
