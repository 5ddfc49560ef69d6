"""Heat maps, labels and sheets of pictures, drawn from arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from afa.data.palette import overlay

DISPLAY_SIZE: Final = 384
"""Longest side of a picture, pixels."""

SHEET_SIDE: Final = 192
"""The same of a picture on a sheet."""

Pixels = NDArray[np.uint8]

_STAR: Final = (255, 220, 40)
_HEAT_ANCHORS: Final = (
    (6, 4, 20),
    (60, 16, 92),
    (140, 36, 104),
    (208, 66, 68),
    (243, 126, 38),
    (251, 197, 60),
    (252, 252, 190),
)


class Token(NamedTuple):
    """Place of a token in the grid of the affinity."""

    row: int
    column: int


def lay_out(rows: Sequence[Sequence[Image.Image | None]], captions: Sequence[str]) -> Image.Image:
    """Put pictures of any size on a white RGB sheet, as many a row as captions of columns; None leaves a gap."""
    side, gap, header = SHEET_SIDE, 6, 26
    width = len(captions) * (side + gap) + gap
    sheet = Image.new("RGB", (width, header + len(rows) * (side + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, caption in enumerate(captions):
        left = gap + column * (side + gap)
        draw.text((left + side / 2, header / 2), caption, fill="black", font=font, anchor="mm")
        for row, pictures in enumerate(rows):
            if (picture := pictures[column]) is not None:
                picture = ImageOps.contain(picture, (side, side))
                top = header + gap + row * (side + gap)
                sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
    return sheet


def heat_colors(values: NDArray[np.float64]) -> Pixels:
    """Colors of a heat map, from near black over purple and orange to pale yellow, ever brighter.

    Values in [0, 1] of any shape become uint8 RGB of that shape + (3,).
    """
    positions = np.linspace(0.0, 1.0, len(_HEAT_ANCHORS))
    channels = [np.interp(values, positions, channel) for channel in np.array(_HEAT_ANCHORS, dtype=float).T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


_HEAT_COLORS: Final[Pixels] = heat_colors(np.linspace(0.0, 1.0, 256))


def blend_heat(image: Pixels, scores: Tensor) -> Pixels:
    """Lay scores over an image as one heat map; the photograph stays visible as gray.

    Args:
        image: (H, W, 3) uint8 RGB.
        scores: (classes, h, w), any range: their maximum is drawn, stretched to the whole range of colors; without a
            class, nothing is hot.

    Returns:
        (H, W, 3) uint8.
    """
    blended: NDArray[np.float64] = 0.35 * _gray(image) + 0.65 * heat_map(scores, (image.shape[0], image.shape[1]))
    return blended.round().astype(np.uint8)


def heat_map(scores: Tensor, size: tuple[int, int]) -> Pixels:
    """The (height, width, 3) uint8 colors of `blend_heat` without the image, of (C, h, w) scores."""
    highest = scores.float().amax(0)[None] if len(scores) else scores.new_zeros(1, 1, 1, dtype=torch.float32)
    colors: Pixels = heat_maps(highest, size)[0]
    return colors


def heat_maps(scores: Tensor, size: tuple[int, int]) -> Pixels:
    """Heat maps of N things, each stretched to the whole range of colors: (N, h, w) -> (N, *size, 3) uint8."""
    heat = interpolate(scores.float()[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    heat = heat - heat.amin((1, 2), keepdim=True)
    heat = heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-6)
    levels: Pixels = (255 * heat).round().to(torch.uint8).cpu().numpy()
    colors: Pixels = _HEAT_COLORS[levels]
    return colors


def blend_label(image: Pixels, label: Tensor) -> Pixels:
    """Lay class colors over an image; the photograph stays visible as gray, darker in the background.

    (H, W, 3) uint8 RGB and (h, w) class indices, 255 = ignored, resized by nearest neighbor, give (H, W, 3) uint8.
    """
    resized = interpolate(label[None, None].float(), size=image.shape[:2], mode="nearest-exact")[0, 0]
    label_map: Pixels = resized.to(torch.uint8).cpu().numpy()
    # One of VOC's colors is a plain gray, and others are nearly black; on a dim gray all of them are visible.
    gray = _gray(image)
    gray[label_map == 0] //= 2
    return overlay(gray, label_map, alpha=0.65)


def _gray(image: Pixels) -> Pixels:
    """(H, W, 3) -> (H, W, 3) with three equal channels."""
    return np.array(Image.fromarray(image).convert("L").convert("RGB"))


def draw_star(picture: Pixels, point: Token, grid: tuple[int, int]) -> Image.Image:
    """Draw a star at the center of a token."""
    image = Image.fromarray(picture)
    x, y = ((at + 0.5) * side / cells for at, side, cells in zip(point[::-1], image.size, grid[::-1], strict=True))
    radius = max(image.size) / 22
    corners = []
    for i in range(10):
        angle, reach = math.pi * (i / 5 - 0.5), radius * (1 if i % 2 == 0 else 0.42)
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    ImageDraw.Draw(image).polygon(corners, fill=_STAR, outline=(0, 0, 0))
    return image


def draw_window(image: Image.Image, point: Token, grid: tuple[int, int], radius: int) -> None:
    """Outline the tokens within a radius of one."""
    ends = [
        (max(0, at - radius) * side / cells, min(cells, at + radius + 1) * side / cells - 1)
        for at, side, cells in zip(point[::-1], image.size, grid[::-1], strict=True)
    ]
    (left, right), (top, bottom) = ends
    ImageDraw.Draw(image).rectangle((left, top, right, bottom), outline=_STAR, width=2)
