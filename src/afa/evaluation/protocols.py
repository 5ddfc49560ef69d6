"""How one image becomes segmentation logits or a pseudo label at its native size.

Knows scales, flips and sizes; neither ground truth nor files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from afa.config import EvaluationConfig, Precision, PseudoConfig
from afa.errors import AfaError
from afa.model.network import AfaNetwork
from afa.pseudo.pipeline import infer_pseudo
from afa.runtime import autocast
from afa.types import NetworkOutput, normalize_image

PROTOCOLS: Final = ("single", "multiscale")
"""Names of the segmentation protocols."""

PSEUDO_LABELS: Final = ("cam", "propagated", "initial", "refined")
"""Kinds of pseudo label: CAM, propagated CAM, refined CAM (initial), refined propagated CAM (refined)."""

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


def image_tensor(image: np.ndarray | Tensor, *, device: torch.device) -> Tensor:
    """Turn an (H, W, 3) uint8 RGB image into (1, 3, H, W) float32 in [0, 1] on `device`."""
    if isinstance(image, np.ndarray):
        # torch takes neither negative strides nor arrays that must not be written to, such as Pillow's.
        image = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    assert image.dtype == torch.uint8, image.dtype
    assert image.ndim == 3, image.shape
    assert image.shape[2] == 3, image.shape
    return image.to(device).permute(2, 0, 1)[None].float() / 255


@torch.inference_mode()
def dense_logits(
    network: AfaNetwork,
    image: np.ndarray | Tensor,
    *,
    protocol: str,
    config: EvaluationConfig,
    out_size: tuple[int, int] | None = None,
    precision: Precision = "fp32",
) -> DenseLogits:
    """Segment one image under a named protocol.

    single: one pass at native size, or at `config.short_side`. multiscale: the longer side becomes
    `config.long_side`, then one pass per scale with its horizontal flip; mean over the flip, maximum over the
    scales, on logits. Sides below 32 pixels are stretched to 32. Logits are enlarged bilinearly
    (align_corners=False) before they are fused.

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

    Source:
        method.md section 8.
    """
    check_choice(protocol, PROTOCOLS, what="protocol")
    device = next(network.parameters()).device
    pixels = normalize_image(image_tensor(image, device=device))
    height, width = pixels.shape[2:]
    out_size = out_size or (height, width)
    if protocol == "single":
        factors = [config.short_side / min(height, width) if config.short_side else 1.0]
    else:
        factors = [scale * config.long_side / max(height, width) for scale in config.scales]
    fused: DenseLogits | None = None
    for factor in factors:
        view = _resize(pixels, (round(height * factor), round(width * factor)), antialias=protocol == "single")
        if protocol == "multiscale":
            view = torch.cat([view, view.flip(-1)])
        with autocast(device, precision):
            output = network(view, segmentation=True, affinity=False)
        segmentation, image_logits = output.seg_logits.float(), output.image_logits.float().mean(0)
        if protocol == "multiscale":
            segmentation = (segmentation[:1] + segmentation[1:].flip(-1)) / 2
        segmentation = interpolate(segmentation, size=out_size, mode="bilinear", align_corners=False)[0]
        if fused is None:
            fused = DenseLogits(segmentation, image_logits)
        else:
            torch.maximum(fused.segmentation, segmentation, out=fused.segmentation)
            torch.maximum(fused.image, image_logits, out=fused.image)
    assert fused is not None
    return fused


def seg_logits(network: AfaNetwork, image: np.ndarray | Tensor, *, protocol: str, config: EvaluationConfig) -> Tensor:
    """The (K, H, W) segmentation logits of `dense_logits`, which see."""
    return dense_logits(network, image, protocol=protocol, config=config).segmentation


@torch.inference_mode()
def pseudo_label(
    network: AfaNetwork,
    image: np.ndarray | Tensor,
    tags: np.ndarray | Tensor,
    *,
    kind: str,
    config: PseudoConfig,
    short_side: int = 0,
    refine: bool = False,
    precision: Precision = "fp32",
) -> Tensor:
    """Make a pseudo label of one tagged image.

    Args:
        network: Its parameters say the device; it stays as it is, buffers and modes included.
        image: (H, W, 3) uint8 RGB.
        tags: (C,) in {0, 1}.
        kind: One of `PSEUDO_LABELS`. cam and propagated decide every pixel with one background score,
            `config.background_cam` and `config.background_propagated`; initial and refined are what training
            learns from, uncertain pixels included.
        config: Everything about pseudo labels.
        short_side: Shorter side that the image is scaled to first, pixels, with its label scaled back; 0 = native.
        refine: Refine a cam or propagated label with `config.refinement`.
        precision: Arithmetic of the network; all else is fp32.

    Returns:
        (H, W) int64, 0..C, and 255 where initial and refined are uncertain.

    Raises:
        AfaError: Unknown kind.

    Source:
        method.md sections 3, 5 and 8.
    """
    check_choice(kind, PSEUDO_LABELS, what="labels")
    device = next(network.parameters()).device

    def score(view: Tensor, affinity: bool) -> NetworkOutput:
        with autocast(device, precision):
            return network.score(view, affinity)

    pixels = image_tensor(image, device=device)
    size = (pixels.shape[2], pixels.shape[3])
    view = pseudo_view(pixels, config=config, short_side=short_side)
    batch_tags = torch.as_tensor(tags, dtype=torch.float32).to(device)[None]
    want = f"{kind}_label"
    label = infer_pseudo(score, view, batch_tags, config=config, want=(want,), refined=refine)[want]
    if label.shape[1:] != size:
        label = interpolate(label[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()
    return label[0]


def pseudo_view(pixels: Tensor, *, config: PseudoConfig, short_side: int) -> Tensor:
    """Scale an image for CAM passes.

    Args:
        pixels: (1, 3, H, W) RGB in [0, 1].
        config: Its smallest scale must leave 32 pixels; smaller images are enlarged.
        short_side: Shorter side, pixels; 0 = native.

    Returns:
        (1, 3, H', W').
    """
    height, width = pixels.shape[2:]
    factor = short_side / min(height, width) if short_side else 1.0
    min_side = math.ceil(MIN_SIDE / min(1.0, *config.scales))
    return _resize(pixels, (round(height * factor), round(width * factor)), min_side=min_side, antialias=True)


def check_choice(value: str, choices: Sequence[str], *, what: str) -> None:
    """Raise an `AfaError` unless `value` is one of `choices`; `what` names it in the message."""
    if value not in choices:
        raise AfaError(f"{what} is {value!r}; use one of {', '.join(choices)}")


def _resize(image: Tensor, size: tuple[int, int], *, min_side: int = MIN_SIDE, antialias: bool = False) -> Tensor:
    """Resize bilinearly to `size`, each side to at least `min_side`."""
    size = (max(min_side, size[0]), max(min_side, size[1]))
    if size == image.shape[2:]:
        return image
    return interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=antialias)
