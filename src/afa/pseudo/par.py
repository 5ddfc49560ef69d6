"""Pixel-adaptive refinement (PAR, paper Eq. 8-10) and PAMR, the refinement it is compared with.

A kernel over dilated neighbors is computed once per image; any number of score maps then goes through it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from afa.kernels.dispatch import fused

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
    extent: Tensor | None = None,
) -> Tensor:
    """Weights of each pixel's neighbors, from color and position.

    Args:
        image: (B, 3, H, W) RGB in [0, 1].
        dilations: Dilations of the 8 neighbors, pixels.
        rgb_bandwidth: w1.
        pos_bandwidth: w2.
        pos_weight: w3.
        kind: `par`; `par_color`, without the position term; or `pamr`, the form of Araslanov & Roth 2020.
        extent: (B, 2) int64 rows and columns, from the top left, that hold each image; where they end is its border.
            None is the whole canvas.

    Returns:
        (B, n, H, W), n = 8 x dilations in the order of `neighbor_offsets`. Weights are positive and sum
        to 1 + pos_weight for `par`, as in the reference, and to 1 for the others. They mean nothing outside `extent`.

    Source:
        Paper Eq. 8 and 9; standard deviations over the n neighbors, mean over RGB: method.md section 3.
    """
    offsets = neighbor_offsets(dilations)
    batch, _, height, width = image.shape
    position = _position_weights(tuple(offsets), pos_bandwidth, image.device) * pos_weight if kind == "par" else None
    if fused(image.device):
        from afa.kernels.par_triton import kernel_weights

        table = _offset_table(tuple(offsets), image.device)
        shift = torch.zeros(len(offsets), device=image.device) if position is None else position
        bounds = _bounds(extent, batch, height, width, image.device)
        return kernel_weights(image, table, shift, bounds, bandwidth=rgb_bandwidth, pamr=kind == "pamr")
    if extent is not None:
        image = _extend_border(image, extent)
    if image.device.type == "cpu":
        # The neighbors of a pixel lie side by side in memory: that is how `_refine_sparse` reads them.
        kernel = image.new_empty(batch, height, width, len(offsets)).permute(0, 3, 1, 2)
    else:
        kernel = image.new_empty(batch, len(offsets), height, width)
    chunks = _chunks(batch, image.device)
    # Fresh memory costs more than the arithmetic in it, so one buffer serves every image.
    exponent = image.new_empty(chunks[0].stop, len(offsets), height, width)
    for images in chunks:
        _color_exponent(image[images], offsets, rgb_bandwidth, pamr=kind == "pamr", out=exponent)
        for rows in _row_blocks(height, image.device):
            kernel[images, :, rows] = exponent[:, :, rows].softmax(1)
    if position is not None:
        kernel += position.view(1, -1, 1, 1)
    return kernel


@torch.no_grad()
def refine(
    scores: Tensor, kernel: Tensor, *, dilations: Sequence[int], iterations: int, extent: Tensor | None = None
) -> Tensor:
    """Replace each pixel's scores by the weighted sum of its neighbors', several times over.

    Args:
        scores: (B, P, H, W).
        kernel: (B, n, H, W) of `refinement_kernel`.
        dilations: The kernel's.
        iterations: How often.
        extent: The kernel's.

    Returns:
        (B, P, H, W), refined; beyond the border the nearest border pixel counts. Without meaning outside `extent`.

    Source:
        Paper Eq. 10.
    """
    assert scores.shape[2:] == kernel.shape[2:], (scores.shape, kernel.shape)
    if fused(scores.device):
        from afa.kernels.par_triton import iterate

        table = _offset_table(tuple(neighbor_offsets(dilations)), scores.device)
        bounds = _bounds(extent, scores.shape[0], scores.shape[2], scores.shape[3], scores.device)
        return iterate(scores, kernel, table, bounds, iterations=iterations)
    if scores.device.type == "cpu" and extent is None:
        return _refine_sparse(scores, kernel, dilations, iterations)
    return _refine_dense(scores, kernel, dilations, iterations, extent)


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


def _refine_sparse(scores: Tensor, kernel: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    """One sparse (HW, HW) matrix an image: all channels of a neighbor are one contiguous read. Fastest on a CPU."""
    height, width = scores.shape[2:]
    neighbors = _neighbor_indices(height, width, dilations)
    row_starts = torch.arange(0, neighbors.numel() + 1, neighbors.shape[1], dtype=torch.int32)
    refined = torch.empty_like(scores)
    for maps, weights, out in zip(scores, kernel, refined, strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse")
            matrix = torch.sparse_csr_tensor(
                row_starts,
                neighbors.flatten(),
                weights.permute(1, 2, 0).flatten(),
                (height * width, height * width),
                check_invariants=False,
            )
        table = maps.flatten(1).t().contiguous()
        spare = torch.empty_like(table)
        with torch.autocast("cpu", enabled=False):
            for _ in range(iterations):
                torch.mm(matrix, table, out=spare)
                table, spare = spare, table
        out.copy_(table.t().view_as(out))
    return refined


def _refine_dense(
    scores: Tensor, kernel: Tensor, dilations: Sequence[int], iterations: int, extent: Tensor | None = None
) -> Tensor:
    """Shifted multiply-adds over the whole batch, on any device."""
    reach = max(dilations)
    height, width = scores.shape[2:]
    current = scores
    for _ in range(iterations):
        if extent is not None:
            current = _extend_border(current, extent)
        padded = pad(current, (reach, reach, reach, reach), mode="replicate")
        current = torch.zeros_like(scores)
        for n, (dy, dx) in enumerate(neighbor_offsets(dilations)):
            top, left = reach + dy, reach + dx
            current.addcmul_(kernel[:, n, None], padded[:, :, top : top + height, left : left + width])
    return current.clone() if iterations == 0 else current


def _neighbor_indices(height: int, width: int, dilations: Sequence[int]) -> Tensor:
    """(HW, n) int32 flat positions of each pixel's neighbors; the border pixel stands for what lies beyond it."""
    dy, dx = torch.tensor(neighbor_offsets(dilations), dtype=torch.int32).unbind(1)
    rows = (torch.arange(height, dtype=torch.int32)[:, None] + dy).clamp_(0, height - 1) * width
    columns = (torch.arange(width, dtype=torch.int32)[:, None] + dx).clamp_(0, width - 1)
    return (rows[:, None] + columns[None]).view(height * width, -1)


@functools.lru_cache(maxsize=32)
def _position_weights(offsets: tuple[tuple[int, int], ...], bandwidth: float, device: torch.device) -> Tensor:
    """(n,) softmax over the neighbors of the position term."""
    distance = torch.tensor(offsets, dtype=torch.float32).square().sum(1).sqrt()
    return (-(distance / (distance.std() + _TINY) / bandwidth).square()).softmax(0).to(device)


@functools.lru_cache(maxsize=32)
def _offset_table(offsets: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(n, 2) int32."""
    return torch.tensor(offsets, dtype=torch.int32, device=device)


def _bounds(extent: Tensor | None, batch: int, height: int, width: int, device: torch.device) -> Tensor:
    """(B, 2) int32 extent on the device, without a copy from the host."""
    if extent is not None:
        return extent.to(torch.int32)
    bounds = torch.full((batch, 2), height, dtype=torch.int32, device=device)
    bounds[:, 1] = width
    return bounds


def _extend_border(maps: Tensor, extent: Tensor) -> Tensor:
    """Repeat the last row and column of each image's extent over the rest of the canvas."""
    height, width = maps.shape[2:]
    last = extent[:, None] - 1
    rows = torch.arange(height, device=maps.device)[None].minimum(last[:, :, 0])
    columns = torch.arange(width, device=maps.device)[None].minimum(last[:, :, 1])
    maps = maps.gather(2, rows[:, None, :, None].expand(-1, maps.shape[1], -1, width))
    return maps.gather(3, columns[:, None, None, :].expand(-1, maps.shape[1], height, -1))


def _chunks(batch: int, device: torch.device) -> list[slice]:
    """Image by image on a CPU, whose caches hold one image's maps; the whole batch at once on other devices."""
    return [slice(i, i + 1) for i in range(batch)] if device.type == "cpu" else [slice(0, batch)]


def _row_blocks(height: int, device: torch.device, block: int = 16) -> list[slice]:
    """Some rows at a time on a CPU, so that a transposition stays in its caches."""
    if device.type != "cpu":
        return [slice(0, height)]
    return [slice(top, min(top + block, height)) for top in range(0, height, block)]


def _color_exponent(
    image: Tensor, offsets: Sequence[tuple[int, int]], bandwidth: float, *, pamr: bool, out: Tensor
) -> None:
    """Write the color term of each neighbor before the softmax, the mean over RGB, into `out` (B, n, H, W)."""
    reach = max(max(abs(dy), abs(dx)) for dy, dx in offsets)
    batch, channels, height, width = image.shape
    out.zero_()
    difference = image.new_empty(batch, height, width)
    for center, around in zip(
        image.unbind(1), pad(image, (reach, reach, reach, reach), mode="replicate").unbind(1), strict=True
    ):
        shifted = [around[:, reach + dy : reach + dy + height, reach + dx : reach + dx + width] for dy, dx in offsets]
        mean = torch.zeros_like(center)
        for neighbor in shifted:
            mean += neighbor
        mean /= len(offsets)
        variance = torch.zeros_like(center)
        for neighbor in shifted:
            torch.sub(neighbor, mean, out=difference)
            variance.addcmul_(difference, difference)
        deviation = (variance / (len(offsets) - 1)).sqrt_()
        if pamr:
            factor = -1.0 / ((_TINY + 0.1 * deviation) * channels)
        else:
            factor = -1.0 / ((deviation + _TINY) * bandwidth).square_().mul_(channels)
        for n, neighbor in enumerate(shifted):
            torch.sub(neighbor, center, out=difference)
            distance = difference.abs_() if pamr else difference.square_()
            out[:, n].addcmul_(distance, factor)
