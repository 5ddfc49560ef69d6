"""Dense CRF: mean-field refinement of class probabilities by color and position.

A Gaussian of position and one of position and color connect every pixel with every other one. Any two different labels
cost the same (Potts). Settings, normalization and labels are those of pydensecrf.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from afa.filtering.lattice import PermutohedralLattice

_LEAST_PROBABILITY = 1e-5  # pydensecrf's when it takes probabilities
_TINY = 1e-20


@dataclass(frozen=True)
class CrfSettings:
    """Updates and kernels of the dense CRF; bandwidths of positions are in pixels, of colors in levels of 0..255.

    Attributes:
        iterations: Mean-field updates.
        gaussian_weight: Weight of the kernel of positions.
        gaussian_xy: Its bandwidth.
        bilateral_weight: Weight of the kernel of positions and colors.
        bilateral_xy: Its bandwidth of positions.
        bilateral_rgb: Its bandwidth of colors.
    """

    iterations: int = 10
    gaussian_weight: float = 3.0
    gaussian_xy: float = 3.0
    bilateral_weight: float = 4.0
    bilateral_xy: float = 64.0
    bilateral_rgb: float = 5.0


@torch.no_grad()
def dense_crf(
    probabilities: Tensor, image: Tensor, settings: CrfSettings | None = None, *, negligible: float = 0.1
) -> Tensor:
    """Refine class probabilities by the images they belong to.

    An iteration adds to the log probability of each class at a pixel what both kernels gather of that class from all
    pixels, this pixel included, and normalizes over the classes. A kernel K is used as D^-1/2 K D^-1/2, where D holds
    the sums of its rows.

    Args:
        probabilities: (B, K, H, W), softmax of the segmentation's logits at the size of the image.
        image: (B, 3, H, W) RGB in 0..255, uint8 or floating.
        settings: Updates and kernels; None: the defaults.
        negligible: Classes to which no pixel of the batch gives more than this share of 1 / K are left out, which
            saves their time; they end with probability 0. At 0.1 none of them could come to win a pixel. 0 keeps all.

    Returns:
        (B, K, H, W) float32 probabilities, stored with the classes of a pixel side by side.

    Source:
        Kraehenbuehl and Koltun 2011.
    """
    settings = settings or CrfSettings()
    batch, num_classes, height, width = probabilities.shape
    assert image.shape == (batch, 3, height, width), (image.shape, probabilities.shape)
    kept = (probabilities.amax((0, 2, 3)) > negligible / num_classes).nonzero().flatten()
    # Pixels are rows: all classes of a pixel lie side by side.
    rows = probabilities.float()[:, kept].flatten(2).transpose(1, 2)  # (B, K, H, W) -> (B, HW, kept)
    unary = rows.contiguous().clamp_(min=_LEAST_PROBABILITY).log_()
    current = _softmax(unary.clone())

    features = bilateral_features(image, xy=settings.bilateral_xy, rgb=settings.bilateral_rgb)  # (B, HW, 5)
    kernels = (
        _gaussian_kernel(batch, height, width, settings.gaussian_xy, settings.gaussian_weight, image.device),
        _normalized(features, settings.bilateral_weight),
    )
    for _ in range(settings.iterations):
        logits = kernels[0].filter(current)
        logits += kernels[1].filter(current)
        logits += unary
        current = _softmax(logits)

    if len(kept) < num_classes:
        refined = current.new_zeros(batch, height * width, num_classes)  # (B, HW, K)
        refined[:, :, kept] = current
        current = refined
    return current.view(batch, height, width, num_classes).permute(0, 3, 1, 2)  # (B, HW, K) -> (B, K, H, W)


def bilateral_features(image: Tensor, *, xy: float, rgb: float) -> Tensor:
    """Position and color of each pixel, as the Gaussian filter takes them.

    Args:
        image: (B, 3, H, W) RGB in 0..255.
        xy: Bandwidth of positions, pixels.
        rgb: Bandwidth of colors, levels.

    Returns:
        (B, HW, 5) float32: x, y, red, green, blue, divided by their bandwidths; pixels in row order.
    """
    batch, colors, height, width = image.shape
    features = torch.empty(batch, 2 + colors, height, width, device=image.device)  # (B, 5, H, W)
    features[:, 0] = torch.arange(width, device=image.device) / xy
    features[:, 1] = torch.arange(height, device=image.device)[:, None] / xy
    features[:, 2:] = image / rgb
    return features.flatten(2).transpose(1, 2)  # (B, 5, H, W) -> (B, HW, 5)


def _softmax(logits: Tensor) -> Tensor:
    """Turn logits (B, HW, K) into probabilities, in place.

    For rows of a few classes this is much faster than `torch.softmax`. No logit lies below that of the least
    probability, so no sum vanishes. Kernels gather hardly more than their weights, so no logit meets the upper limit.
    """
    odds = logits.clamp_(max=80).exp_()
    return odds.div_(odds.sum(2, keepdim=True))


@functools.lru_cache(maxsize=2)
def _gaussian_kernel(
    batch: int, height: int, width: int, xy: float, weight: float, device: torch.device
) -> PermutohedralLattice:
    """Kernel of positions; it depends on the size alone, so it is kept for the next images."""
    image = torch.empty(batch, 0, height, width, device=device)
    return _normalized(bilateral_features(image, xy=xy, rgb=1.0), weight)


def _normalized(features: Tensor, weight: float) -> PermutohedralLattice:
    """Lattice of weight * D^-1/2 K D^-1/2, K the kernel of (B, N, F) features."""
    lattice = PermutohedralLattice(features)
    sums = lattice.filter(features.new_ones(*features.shape[:2], 1))[..., 0]  # (B, N)
    return lattice.scaled((weight / (sums + _TINY)).sqrt())
