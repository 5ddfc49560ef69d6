from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from afa.config import AugmentConfig
from afa.data.transforms import augment

PLAIN = AugmentConfig(crop_size=32, scale_min=1.0, scale_max=1.0, flip_probability=0.0)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(7).integers(1, 256, (height, width, 3), dtype=np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def windows(image: np.ndarray, part: np.ndarray) -> list[tuple[int, int]]:
    """Where in `image` a window equals `part`."""
    height, width = part.shape[:2]
    return [
        (top, left)
        for top in range(image.shape[0] - height + 1)
        for left in range(image.shape[1] - width + 1)
        if np.array_equal(image[top : top + height, left : left + width], part)
    ]


@pytest.mark.parametrize("shape", [(20, 24), (32, 32), (50, 20), (20, 50), (50, 60), (1, 1), (1, 400)])
def test_valid_box_is_exactly_the_image(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    for seed in range(20):
        canvas, (top, bottom, left, right) = augment(image, PLAIN, rng(seed))
        assert canvas.shape == (32, 32, 3)
        assert canvas.dtype == np.uint8
        assert 0 <= top < bottom <= 32
        assert 0 <= left < right <= 32
        assert (bottom - top, right - left) == (min(32, shape[0]), min(32, shape[1]))
        inside = canvas[top:bottom, left:right].copy()
        assert windows(image, inside)
        canvas[top:bottom, left:right] = 0
        assert not canvas.any()


def test_every_place_is_drawn() -> None:
    small, large = noise(30, 31), noise(34, 33)
    places = {augment(small, PLAIN, rng(seed))[1] for seed in range(200)}
    assert places == {(top, top + 30, left, left + 31) for top in range(3) for left in range(2)}
    cuts = {windows(large, augment(large, PLAIN, rng(seed))[0])[0] for seed in range(200)}
    assert cuts == {(top, left) for top in range(3) for left in range(2)}


def test_flip() -> None:
    image = noise(32, 32)
    always = augment(image, replace(PLAIN, flip_probability=1.0), rng())[0]
    np.testing.assert_array_equal(always, image[:, ::-1])
    half = replace(PLAIN, flip_probability=0.5)
    flipped = sum(not np.array_equal(augment(image, half, rng(seed))[0], image) for seed in range(200))
    assert 70 < flipped < 130


@pytest.mark.parametrize("scale", [0.37, 0.5, 1.0, 1.73, 2.0])
def test_window_equals_scaling_the_whole_image_and_cropping(scale: float) -> None:
    image = noise(61, 83)
    height, width = round(61 * scale), round(83 * scale)
    whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    config = replace(PLAIN, scale_min=scale, scale_max=scale)
    for seed in range(2):
        canvas, (top, bottom, left, right) = augment(image, config, rng(seed))
        part = canvas[top:bottom, left:right].astype(int)
        differences = [
            np.abs(whole[y : y + part.shape[0], x : x + part.shape[1]] - part)
            for y in range(height - part.shape[0] + 1)
            for x in range(width - part.shape[1] + 1)
        ]
        best = min(differences, key=np.mean)
        # Pillow takes the window's corners in single precision: a last bit may differ.
        assert best.max() <= 1
        assert np.mean(best > 0) < 0.02


def test_scale_range_is_used() -> None:
    image = noise(40, 20)
    config = replace(PLAIN, scale_min=0.25, scale_max=0.75)
    heights = [box[1] - box[0] for box in (augment(image, config, rng(seed))[1] for seed in range(300))]
    assert min(heights) in (10, 11)
    assert max(heights) in (29, 30)
    assert 18 < np.mean(heights) < 22


def test_short_side_comes_first() -> None:
    config = replace(PLAIN, short_side=16)
    assert augment(noise(32, 64), config, rng())[0].shape == (32, 32, 3)
    top, bottom, left, right = augment(noise(32, 64), config, rng())[1]
    assert (bottom - top, right - left) == (16, 32)
    top, bottom, left, right = augment(noise(8, 4), config, rng())[1]
    assert (bottom - top, right - left) == (32, 16)


def test_same_generator_same_crop_and_input_untouched() -> None:
    image = noise(40, 50)
    before = image.copy()
    config = AugmentConfig(crop_size=32)
    first, second = augment(image, config, rng(3)), augment(image, config, rng(3))
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]
    assert not np.array_equal(first[0], augment(image, config, rng(4))[0])
    np.testing.assert_array_equal(image, before)
