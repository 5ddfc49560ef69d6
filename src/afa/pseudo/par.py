"""Pixel-adaptive refinement (PAR, paper Eq. 8-10) and PAMR, the refinement it is compared with.

A kernel over dilated neighbors is computed once per image; any number of score maps then goes through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

_TINY = 1e-8
_DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def neighbor_offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """Offsets (dy, dx) of the 8 neighbors at each dilation, pixels; the center is not among them.

    >>> neighbor_offsets([2])[:3]
    [(-2, -2), (-2, 0), (-2, 2)]
    """
    return [(dy * dilation, dx * dilation) for dilation in dilations for dy, dx in _DIRECTIONS]


@torch.no_grad()
def refinement_kernel(
    image: Tensor,
    *,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    rgb_bandwidth: float = 0.3,
    pos_bandwidth: float = 0.3,
    pos_weight: float = 0.01,
    kind: Literal["par", "par_color", "pamr"] = "par",
) -> Tensor:
    """Weights of each pixel's neighbors, from color and position.

    Args:
        image: (B, 3, H, W) RGB in [0, 1].
        dilations: Dilations of the 8 neighbors, pixels.
        rgb_bandwidth: w1.
        pos_bandwidth: w2.
        pos_weight: w3.
        kind: `par`; `par_color`, without the position term; or `pamr`, the form of Araslanov & Roth 2020.

    Returns:
        (B, n, H, W), n = 8 x dilations in the order of `neighbor_offsets`. Weights are positive and sum
        to 1 + pos_weight for `par`, as in the reference, and to 1 for the others.

    Source:
        Paper Eq. 8 and 9; standard deviations over the n neighbors, mean over RGB: method.md section 3.
    """
    offsets = neighbor_offsets(dilations)
    kernel = torch.empty(
        image.shape[0], len(offsets), *image.shape[2:], dtype=image.dtype, device=image.device
    )
    for start, stop in _chunks(image):
        _color_weights(image[start:stop], offsets, rgb_bandwidth, pamr=kind == "pamr", out=kernel[start:stop])
    if kind == "par":
        distance = torch.tensor(offsets, dtype=image.dtype, device=image.device).square().sum(1).sqrt()
        position = -(distance / (distance.std() + _TINY) / pos_bandwidth).square()
        kernel += pos_weight * position.softmax(0).view(1, -1, 1, 1)
    return kernel


@torch.no_grad()
def refine(scores: Tensor, kernel: Tensor, *, dilations: Sequence[int], iterations: int) -> Tensor:
    """Replace each pixel's scores by the weighted sum of its neighbors', several times over.

    Args:
        scores: (B, P, H, W).
        kernel: (B, n, H, W) of `refinement_kernel`.
        dilations: The kernel's.
        iterations: How often.

    Returns:
        (B, P, H, W), refined; beyond the border the nearest border pixel counts.

    Source:
        Paper Eq. 10.
    """
    assert scores.shape[2:] == kernel.shape[2:], (scores.shape, kernel.shape)
    offsets = neighbor_offsets(dilations)
    reach = max(dilations)
    height, width = scores.shape[2:]
    refined = torch.empty_like(scores)
    for start, stop in _chunks(scores):
        current, weights = scores[start:stop], kernel[start:stop].unsqueeze(2)
        for _ in range(iterations):
            padded = pad(current, (reach, reach, reach, reach), mode="replicate")
            current = torch.zeros_like(current)
            for n, (dy, dx) in enumerate(offsets):
                top, left = reach + dy, reach + dx
                current.addcmul_(weights[:, n], padded[:, :, top : top + height, left : left + width])
        refined[start:stop] = current
    return refined


@torch.no_grad()
def par(
    image: Tensor,
    scores: Tensor,
    *,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
    rgb_bandwidth: float = 0.3,
    pos_bandwidth: float = 0.3,
    pos_weight: float = 0.01,
    kind: Literal["par", "par_color", "pamr"] = "par",
) -> Tensor:
    """Refine score maps by the image they belong to; the whole of PAR in one call.

    Args:
        image: (B, 3, H, W) RGB in [0, 1].
        scores: (B, P, h, w), resized to the image first (bilinear, corners aligned).
        dilations: As `refinement_kernel`.
        iterations: As `refine`.
        rgb_bandwidth: As `refinement_kernel`.
        pos_bandwidth: As `refinement_kernel`.
        pos_weight: As `refinement_kernel`.
        kind: As `refinement_kernel`.

    Returns:
        (B, P, H, W).

    Source:
        Paper section 3.4.
    """
    if scores.shape[2:] != image.shape[2:]:
        scores = interpolate(scores, size=image.shape[2:], mode="bilinear", align_corners=True)
    kernel = refinement_kernel(
        image,
        dilations=dilations,
        rgb_bandwidth=rgb_bandwidth,
        pos_bandwidth=pos_bandwidth,
        pos_weight=pos_weight,
        kind=kind,
    )
    return refine(scores, kernel, dilations=dilations, iterations=iterations)


def _chunks(batch: Tensor) -> list[tuple[int, int]]:
    """Image by image on a CPU, whose caches hold one image's maps; the whole batch at once on other devices."""
    count = batch.shape[0]
    return [(i, i + 1) for i in range(count)] if batch.device.type == "cpu" else [(0, count)]


def _color_weights(
    image: Tensor, offsets: Sequence[tuple[int, int]], bandwidth: float, *, pamr: bool, out: Tensor
) -> None:
    """Softmax over the neighbors of the color term, written into `out` (B, n, H, W)."""
    reach = max(max(abs(dy), abs(dx)) for dy, dx in offsets)
    height, width = image.shape[2:]
    padded = pad(image, (reach, reach, reach, reach), mode="replicate")
    shifted = [
        padded[:, :, reach + dy : reach + dy + height, reach + dx : reach + dx + width] for dy, dx in offsets
    ]
    mean = torch.zeros_like(image)
    for neighbor in shifted:
        mean += neighbor
    mean /= len(offsets)
    variance = torch.zeros_like(image)
    for neighbor in shifted:
        difference = neighbor - mean
        variance.addcmul_(difference, difference)
    deviation = (variance / (len(offsets) - 1)).sqrt_()
    if pamr:
        factor = -1.0 / ((_TINY + 0.1 * deviation) * 3)
        for n, neighbor in enumerate(shifted):
            torch.sum((neighbor - image).abs_().mul_(factor), 1, out=out[:, n])
    else:
        factor = -1.0 / ((deviation + _TINY) * bandwidth).square_().mul_(3)
        for n, neighbor in enumerate(shifted):
            torch.sum((neighbor - image).square_().mul_(factor), 1, out=out[:, n])
    out.copy_(out.softmax(1))
