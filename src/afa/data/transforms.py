"""Training augmentation: random scale, flip and crop on a zero canvas, as one bilinear resampling per image.

The draw knows no pixels and the resampling no randomness: a plan says which part of an image becomes which part of
the canvas, and either Pillow (one image, CPU) or two matrix products (a batch, any device) carry it out, with the
same results up to rounding. Normalization happens in the training step, after the canvas, so that padding is black
in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from afa.config import AugmentConfig


@dataclass(frozen=True)
class Span:
    """One axis of a crop: pixels `first` to `last` of the image fill places `start` to `end` of the canvas.

    `first` and `last` are distances from the image's edge, which may fall inside a pixel; `end` is the place after the
    last one; the image has `length` pixels along the axis.
    """

    length: int
    first: float
    last: float
    start: int
    end: int

    @property
    def window(self) -> tuple[int, int]:
        """First pixel, and the one after the last, that the resampling reads: the part and the filter's reach."""
        reach = max(1.0, (self.last - self.first) / (self.end - self.start))
        return max(0, math.floor(self.first - reach)), min(self.length, math.ceil(self.last + reach))


@dataclass(frozen=True)
class CropPlan:
    """A drawn crop: its vertical and horizontal axis, and whether it is mirrored left to right."""

    rows: Span
    columns: Span
    flip: bool

    @property
    def valid_box(self) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of the canvas that shows the image, half open, never empty."""
        return self.rows.start, self.rows.end, self.columns.start, self.columns.end


def draw_crop(size: tuple[int, int], config: AugmentConfig, rng: np.random.Generator, *, multiple: int = 1) -> CropPlan:
    """Draw scale, flip and place of one crop (paper section 4.1).

    The scaled image, where it is smaller than the crop, lies at a random place on the canvas; where it is larger,
    a random window of it is taken.

    Args:
        size: Height and width of the image, pixels.
        config: Crop size, scale range, flip probability, short side; `whole_images` draws nothing but the flip.
        rng: Source of all randomness; the same state gives the same plan.
        multiple: As `fit_whole`, for `whole_images`.
    """
    if config.whole_images:
        flip = bool(rng.random() < config.flip_probability)
        return fit_whole(size, config.crop_size, flip=flip, multiple=multiple)
    height, width = size
    scale = rng.uniform(config.scale_min, config.scale_max)
    if config.short_side:
        scale *= config.short_side / min(height, width)
    flip = bool(rng.random() < config.flip_probability)
    rows = _draw_span(height, scale, config.crop_size, rng)
    columns = _draw_span(width, scale, config.crop_size, rng)
    return CropPlan(rows, columns, flip)


def fit_whole(size: tuple[int, int], crop_size: int, *, flip: bool, multiple: int = 1) -> CropPlan:
    """The plan that shows a whole image, as large as fits.

    Args:
        size: Height and width of the image, pixels.
        crop_size: Side of the canvas, pixels.
        flip: Mirror the image left to right.
        multiple: Round the sides of the view to multiples of this, and put it into the top left corner, so that tokens
            lie where they lie in the view; 1: in the middle of the canvas.
    """
    lengths = whole_size(size, crop_size, multiple)
    starts = [(crop_size - length) // 2 if multiple == 1 else 0 for length in lengths]
    if flip and multiple == 1:
        starts[1] = crop_size - lengths[1] - starts[1]
    rows, columns = (
        Span(side, 0.0, float(side), start, start + length)
        for side, start, length in zip(size, starts, lengths, strict=True)
    )
    return CropPlan(rows, columns, flip)


def whole_size(size: tuple[int, int], crop_size: int, multiple: int = 1) -> tuple[int, int]:
    """Height and width at which an image fits into the canvas, the longer side filling it.

    >>> whole_size((375, 500), 384, 16)
    (288, 384)
    """
    height, width = (multiple * max(1, round(side * crop_size / max(size) / multiple)) for side in size)
    return height, width


def resample_image(
    image: NDArray[np.uint8],
    plan: CropPlan,
    canvas: NDArray[np.uint8],
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> None:
    """Carry out a plan with Pillow: with antialiasing when shrinking. Only the shown part is computed.

    Args:
        image: (H, W, 3) uint8 RGB or (H, W) uint8 mask, of the plan's size.
        plan: The crop.
        canvas: (3, S, S) or (S, S) uint8, written inside the plan's valid box.
        resampling: For masks nearest: each place takes the value of the pixel that holds its center.
    """
    rows, columns = plan.rows, plan.columns
    size = (columns.end - columns.start, rows.end - rows.start)
    (top, bottom), (left, right) = (0, rows.length), (0, columns.length)
    if isinstance(image, np.memmap):  # of a file, no more than the crop reads
        (top, bottom), (left, right) = rows.window, columns.window
        image = np.ascontiguousarray(image[top:bottom, left:right])
    box = (columns.first - left, rows.first - top, columns.last - left, rows.last - top)
    pixels = np.asarray(Image.fromarray(image).resize(size, resampling, box=box))
    pixels = pixels[:, ::-1] if plan.flip else pixels
    place = canvas[..., rows.start : rows.end, columns.start : columns.end]
    place[:] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels


def pack_plans(plans: Sequence[CropPlan]) -> Tensor:
    """The numbers of B plans as one tensor, for `resample_batch`.

    Returns:
        (B, 2, 6) float64, rows before columns: where the shown part begins and the pixels that each place covers,
        both from the window's first pixel; pixels of the window; start and end on the canvas; 1 if flipped.
    """
    return torch.tensor(
        [[_numbers(plan.rows, False), _numbers(plan.columns, plan.flip)] for plan in plans], dtype=torch.float64
    )


def resample_batch(pixels: Tensor, plans: Tensor, crop_size: int) -> Tensor:
    """Carry out B plans where the pixels are: one matrix product per axis, without waiting for the device.

    Within one level of `resample_image` (two on a pixel in thousands): both round to whole levels after each axis,
    here the columns first, while Pillow's order depends on its version and the shape.

    Args:
        pixels: (B, 3, H, W) uint8 RGB, in any strides: each image's window in the upper left corner, beside it
            whatever there was.
        plans: (B, 2, 6) float64 of `pack_plans`, on the same device.
        crop_size: S, side of the canvas, pixels.

    Returns:
        (B, 3, S, S) uint8, 0 outside the valid boxes.
    """
    batch, channels, height, width = pixels.shape
    rows = _filter_matrix(plans[:, 0], height, crop_size)
    columns = _filter_matrix(plans[:, 1], width, crop_size)
    # (B, H, 3, W): the columns' product then leaves what the rows' product takes, and no copy lies between them.
    lines = pixels.permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)
    across = _round(lines.view(batch, height * channels, width) @ columns.transpose(1, 2))
    down = _round(rows @ across.view(batch, height, channels * crop_size))
    canvas = down.view(batch, crop_size, channels, crop_size).permute(0, 2, 1, 3)
    return canvas.to(torch.uint8, memory_format=torch.contiguous_format)


def _draw_span(length: int, scale: float, size: int, rng: np.random.Generator) -> Span:
    scaled = max(1, round(length * scale))
    window = min(scaled, size)
    first = int(rng.integers(0, scaled - window + 1))
    start = int(rng.integers(0, size - window + 1))
    ratio = length / scaled
    return Span(length, first * ratio, (first + window) * ratio, start, start + window)


def _numbers(span: Span, flip: bool) -> tuple[float, ...]:
    begin, end = span.window
    first, last = np.float32(span.first), np.float32(span.last)  # the precision of Pillow's box
    step = float(last - first) / (span.end - span.start)
    return float(first) - begin, step, end - begin, span.start, span.end, flip


def _filter_matrix(spans: Tensor, length: int, crop_size: int) -> Tensor:
    """(B, 6) numbers of one axis -> (B, S, length) weights of the pixels at each place: rows add up to 1, or are 0.

    Pillow's bilinear filter: a triangle around the place's center, one pixel wide to each side, or as many pixels as
    a place covers when shrinking.
    """
    first, step, available, start, end, flip = spans.unsqueeze(2).unbind(1)
    place = torch.arange(crop_size, device=spans.device)
    pixel = torch.arange(length, device=spans.device)
    order = torch.where(flip > 0, end - 1 - place, place - start)
    center = first + (order + 0.5) * step
    # Far from the origin single precision would be coarse: distances are taken from the nearest pixel's edge.
    edge = center.floor()
    distance = (pixel - edge.unsqueeze(2)).float() + (0.5 - (center - edge)).float().unsqueeze(2)
    distance = distance.abs() / step.float().clamp(min=1).unsqueeze(2)
    shown = ((place >= start) & (place < end)).unsqueeze(2) & (pixel < available).unsqueeze(1)
    weight = (1 - distance).clamp(min=0) * shown
    return weight / weight.sum(2, keepdim=True).clamp(min=1e-6)


def _round(levels: Tensor) -> Tensor:
    """To whole levels, halves up, as Pillow does."""
    return (levels + 0.5).floor()
