"""Training augmentation of one image: random scale, flip and crop, on a zero canvas.

Normalization happens in the training step, after the canvas, so that padding is black in pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.config import AugmentConfig


def augment(
    image: NDArray[np.uint8], config: AugmentConfig, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
    """Draw one augmented crop.

    The scaled image, where it is smaller than the crop, lies at a random place on a zero canvas; where it is
    larger, a random window of it is taken. Only that window is ever computed: one bilinear resampling (with
    antialiasing when shrinking) from the original pixels.

    Args:
        image: (H, W, 3) uint8 RGB.
        config: Crop size S, scale range, flip probability, short side.
        rng: Source of all randomness; the same state gives the same crop.

    Returns:
        (S, S, 3) uint8 canvas, and the valid box (top, bottom, left, right) of the part that shows the
        image, half open. The box is never empty.

    Source:
        Paper section 4.1; method.md section 7.
    """
    height, width = image.shape[:2]
    size = config.crop_size
    scale = rng.uniform(config.scale_min, config.scale_max)
    if config.short_side:
        scale *= config.short_side / min(height, width)
    flip = rng.random() < config.flip_probability
    source_y, top, bottom = _place(height, scale, size, rng)
    source_x, left, right = _place(width, scale, size, rng)
    crop = Image.fromarray(image).resize(
        (right - left, bottom - top),
        Image.Resampling.BILINEAR,
        box=(source_x[0], source_y[0], source_x[1], source_y[1]),
    )
    canvas = np.zeros((size, size, 3), dtype=np.uint8)
    pixels = np.asarray(crop)
    canvas[top:bottom, left:right] = pixels[:, ::-1] if flip else pixels
    return canvas, (top, bottom, left, right)


def _place(length: int, scale: float, size: int, rng: np.random.Generator) -> tuple[tuple[float, float], int, int]:
    """One axis: the span of the original that the window covers, and where on the canvas it goes."""
    scaled = max(1, round(length * scale))
    window = min(scaled, size)
    first = int(rng.integers(0, scaled - window + 1))
    start = int(rng.integers(0, size - window + 1))
    ratio = length / scaled
    return (first * ratio, (first + window) * ratio), start, start + window
