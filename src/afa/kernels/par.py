"""Pixel-adaptive refinement (PAR, paper Eq. 8 to 10), and PAMR, the refinement that it is compared with.

`refinement_kernel` weighs the dilated neighbors of each pixel, once per image; `refine` takes any number of score maps
through these weights. On a GPU both are fused kernels.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from afa.kernels.dispatch import fused_by

RefinementKind = Literal["par", "par_color", "pamr"]
"""`par`; `par_color`, without the position term; or `pamr`, the form of Araslanov & Roth 2020."""

_TINY = 1e-8
_DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def neighbor_offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """Offsets (dy, dx) of the 8 neighbors at each dilation, pixels; the center is not among them.

    >>> neighbor_offsets([2])[:3]
    [(-2, -2), (-2, 0), (-2, 2)]
    """
    return [(dy * dilation, dx * dilation) for dilation in dilations for dy, dx in _DIRECTIONS]


@functools.lru_cache(maxsize=32)
def position_weights(dilations: tuple[int, ...], bandwidth: float, device: torch.device) -> Tensor:
    """(n,) softmax over the neighbors of the position term."""
    distance = torch.tensor(neighbor_offsets(dilations), dtype=torch.float32).square().sum(1).sqrt()  # (n, 2) -> (n,)
    return (-(distance / (distance.std() + _TINY) / bandwidth).square()).softmax(0).to(device)


@torch.no_grad()
@fused_by("par_triton")
def refinement_kernel(
    image: Tensor,
    *,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    rgb_bandwidth: float = 0.3,
    pos_bandwidth: float = 0.3,
    pos_weight: float = 0.01,
    kind: RefinementKind = "par",
    extent: Tensor | None = None,
) -> Tensor:
    """Weights of each pixel's neighbors, from color and position.

    Args:
        image: (B, 3, H, W) RGB in [0, 1].
        dilations: Dilations of the 8 neighbors, pixels.
        rgb_bandwidth: w1.
        pos_bandwidth: w2.
        pos_weight: w3.
        kind: See `RefinementKind`.
        extent: (B, 2) int64 rows and columns, from the top left, that hold each image; where they end is its border.
            None is the whole canvas.

    Returns:
        (B, n, H, W), n = 8 x dilations in the order of `neighbor_offsets`. Weights are positive and sum
        to 1 + pos_weight for `par`, as in the reference, and to 1 for the others. They mean nothing outside `extent`.

    Source:
        Paper Eq. 8 and 9; standard deviations over the n neighbors and the mean over RGB are those of the reference.
    """
    offsets = neighbor_offsets(dilations)
    batch, _, height, width = image.shape
    if extent is not None:
        image = _extend_border(image, extent)
    if image.device.type == "cpu":
        # `_refine_sparse` reads the neighbors of a pixel side by side, so they lie side by side in memory.
        kernel = image.new_empty(batch, height, width, len(offsets)).permute(0, 3, 1, 2)  # (B, n, H, W)
    else:
        kernel = image.new_empty(batch, len(offsets), height, width)  # (B, n, H, W)
    # The caches of a CPU hold the maps of one image, and 16 rows while the softmax transposes them.
    images_at_once, rows_at_once = (1, 16) if image.device.type == "cpu" else (batch, height)
    # Fresh memory costs more than the arithmetic in it, so one buffer serves every image.
    exponent = image.new_empty(images_at_once, len(offsets), height, width)  # (1 or B, n, H, W)
    for images in _blocks(batch, images_at_once):
        _color_exponent(image[images], offsets, rgb_bandwidth, pamr=kind == "pamr", out=exponent)
        for rows in _blocks(height, rows_at_once):
            kernel[images, :, rows] = exponent[:, :, rows].softmax(1)
    if kind == "par":
        kernel += (position_weights(tuple(dilations), pos_bandwidth, image.device) * pos_weight).view(1, -1, 1, 1)
    return kernel


@torch.no_grad()
@fused_by("par_triton")
def refine(
    scores: Tensor, kernel: Tensor, *, dilations: Sequence[int], iterations: int, extent: Tensor | None = None
) -> Tensor:
    """Replace each pixel's scores by the weighted sum of its neighbors' scores, several times over.

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
    if scores.device.type == "cpu" and extent is None:
        return _refine_sparse(scores, kernel, dilations, iterations)
    return _refine_dense(scores, kernel, dilations, iterations, extent)


def _refine_sparse(scores: Tensor, kernel: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    """Multiply each image's scores by a sparse (HW, HW) matrix: fastest on a CPU.

    All score maps of a neighbor are one contiguous read.
    """
    height, width = scores.shape[2:]
    neighbors = _neighbor_indices(height, width, dilations)  # (HW, n)
    row_starts = torch.arange(0, neighbors.numel() + 1, neighbors.shape[1], dtype=torch.int32)
    refined = torch.empty_like(scores)
    for maps, weights, out in zip(scores, kernel, refined, strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse")
            matrix = torch.sparse_csr_tensor(
                row_starts,
                neighbors.flatten(),
                weights.permute(1, 2, 0).flatten(),  # (n, H, W) -> (HW n,)
                (height * width, height * width),
                check_invariants=False,
            )
        table = maps.flatten(1).t().contiguous()  # (P, H, W) -> (HW, P)
        spare = torch.empty_like(table)
        with torch.autocast("cpu", enabled=False):
            for _ in range(iterations):
                torch.mm(matrix, table, out=spare)
                table, spare = spare, table
        out.copy_(table.t().view_as(out))  # (HW, P) -> (P, H, W)
    return refined


def _refine_dense(
    scores: Tensor, kernel: Tensor, dilations: Sequence[int], iterations: int, extent: Tensor | None = None
) -> Tensor:
    """Add up shifted copies of the scores of the whole batch, on any device."""
    reach = max(dilations)
    height, width = scores.shape[2:]
    current = scores
    for _ in range(iterations):
        if extent is not None:
            current = _extend_border(current, extent)
        padded = pad(current, (reach, reach, reach, reach), mode="replicate")  # (B, P, H + 2 reach, W + 2 reach)
        current = torch.zeros_like(scores)
        for n, (dy, dx) in enumerate(neighbor_offsets(dilations)):
            top, left = reach + dy, reach + dx
            current.addcmul_(kernel[:, n, None], padded[:, :, top : top + height, left : left + width])
    return current.clone() if iterations == 0 else current


def _neighbor_indices(height: int, width: int, dilations: Sequence[int]) -> Tensor:
    """(HW, n) int32 flat positions of each pixel's neighbors; the border pixel stands for what lies beyond it."""
    dy, dx = torch.tensor(neighbor_offsets(dilations), dtype=torch.int32).unbind(1)  # (n,) each
    rows = (torch.arange(height, dtype=torch.int32)[:, None] + dy).clamp_(0, height - 1) * width  # (H, n)
    columns = (torch.arange(width, dtype=torch.int32)[:, None] + dx).clamp_(0, width - 1)  # (W, n)
    return (rows[:, None] + columns[None]).view(height * width, -1)  # (H, W, n) -> (HW, n)


def _extend_border(maps: Tensor, extent: Tensor) -> Tensor:
    """Repeat the last row and column of each image's extent over the rest of (B, P, H, W) maps."""
    height, width = maps.shape[2:]
    last = extent[:, None] - 1  # (B, 1, 2)
    rows = torch.arange(height, device=maps.device)[None].minimum(last[:, :, 0])  # (B, H)
    columns = torch.arange(width, device=maps.device)[None].minimum(last[:, :, 1])  # (B, W)
    maps = maps.gather(2, rows[:, None, :, None].expand(-1, maps.shape[1], -1, width))  # (B, P, H, W)
    return maps.gather(3, columns[:, None, None, :].expand(-1, maps.shape[1], height, -1))  # (B, P, H, W)


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _color_exponent(
    image: Tensor, offsets: Sequence[tuple[int, int]], bandwidth: float, *, pamr: bool, out: Tensor
) -> None:
    """Write the color term of each neighbor before the softmax, the mean over RGB, into `out` (B, n, H, W)."""
    reach = max(max(abs(dy), abs(dx)) for dy, dx in offsets)
    batch, channels, height, width = image.shape
    out.zero_()
    difference = image.new_empty(batch, height, width)
    padded = pad(image, (reach, reach, reach, reach), mode="replicate")  # (B, 3, H + 2 reach, W + 2 reach)
    for center, around in zip(image.unbind(1), padded.unbind(1), strict=True):  # (B, H, W) of each color
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
