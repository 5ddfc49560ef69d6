from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from afa.config import AugmentConfig
from afa.data.transforms import CropPlan, draw_crop, fit_whole, pack_plans, resample_batch, resample_image

PLAIN = AugmentConfig(crop_size=32, scale_min=1.0, scale_max=1.0, flip_probability=0.0)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(7).integers(1, 256, (height, width, 3), dtype=np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def augment(
    image: np.ndarray, config: AugmentConfig, generator: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """(S, S, 3) canvas and valid box of one drawn crop."""
    plan = draw_crop(image.shape[:2], config, generator)
    return render(image, plan, config.crop_size), plan.valid_box


def render(image: np.ndarray, plan: CropPlan, size: int) -> np.ndarray:
    canvas = np.zeros((3, size, size), dtype=np.uint8)
    resample_image(image, plan, canvas)
    return canvas.transpose(1, 2, 0)


def render_axis_by_axis(image: np.ndarray, plan: CropPlan, size: int) -> np.ndarray:
    """(3, S, S) canvas by Pillow, columns first; in one call Pillow chooses what is first, and rounds after it."""
    rows, columns = plan.rows, plan.columns
    top, bottom, left, right = plan.valid_box
    across = Image.fromarray(image).resize(
        (right - left, rows.length), Image.Resampling.BILINEAR, box=(columns.first, 0, columns.last, rows.length)
    )
    part = across.resize(
        (right - left, bottom - top), Image.Resampling.BILINEAR, (0, rows.first, right - left, rows.last)
    )
    canvas = np.zeros((3, size, size), dtype=np.uint8)
    pixels = np.asarray(part).transpose(2, 0, 1)
    canvas[:, top:bottom, left:right] = pixels[:, :, ::-1] if plan.flip else pixels
    return canvas


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


def pad_windows(images: list[np.ndarray], plans: list[CropPlan], *, filler: int) -> Tensor:
    """What `resample_batch` takes: the windows that the plans read, beside them `filler`."""
    parts = [
        image[slice(*plan.rows.window), slice(*plan.columns.window)] for image, plan in zip(images, plans, strict=True)
    ]
    height, width = (max(part.shape[axis] for part in parts) + 5 for axis in (0, 1))
    padded = np.full((len(parts), height, width, 3), filler, dtype=np.uint8)
    for place, part in zip(padded, parts, strict=True):
        place[: part.shape[0], : part.shape[1]] = part
    return torch.from_numpy(padded).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("low", "high"), [(0.05, 0.3), (0.5, 2.0), (1.0, 1.0), (2.0, 5.0)])
@pytest.mark.parametrize("short_side", [0, 50])
def test_matrix_products_equal_pillow(low: float, high: float, short_side: int) -> None:
    config = AugmentConfig(crop_size=64, scale_min=low, scale_max=high, short_side=short_side)
    shapes = [(60, 83), (120, 41), (64, 64), (1, 1), (3, 90), (150, 200), (61, 61), (200, 30)]
    images = [noise(*shape) for shape in shapes] * 6
    plans = [draw_crop(image.shape[:2], config, rng(seed)) for seed, image in enumerate(images)]
    assert len({plan.flip for plan in plans}) == 2
    pixels = pad_windows(images, plans, filler=255)
    before = pixels.clone()
    ours = resample_batch(pixels, pack_plans(plans), 64)
    pillow = np.stack([render(image, plan, 64).transpose(2, 0, 1) for image, plan in zip(images, plans, strict=True)])
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous()
    difference = np.abs(ours.numpy().astype(int) - pillow)
    assert difference.max() <= 2
    assert np.mean(difference > 1) <= 0.001
    one_by_one = [render_axis_by_axis(image, plan, 64) for image, plan in zip(images, plans, strict=True)]
    assert np.mean(ours.numpy() != np.stack(one_by_one)) <= 0.01, "only values halfway between two levels"
    for canvas, plan in zip(ours.clone(), plans, strict=True):
        top, bottom, left, right = plan.valid_box
        canvas[:, top:bottom, left:right] = 0
        assert not canvas.any()
    assert pixels.equal(before)


def test_matrix_products_do_not_see_past_the_window() -> None:
    """Neither the padding nor, beyond the window that a plan names, the image has a say."""
    config = AugmentConfig(crop_size=32)
    images = [noise(70, 90), noise(40, 30)] * 8
    plans = [draw_crop(image.shape[:2], config, rng(seed)) for seed, image in enumerate(images)]
    ours = [resample_batch(pad_windows(images, plans, filler=filler), pack_plans(plans), 32) for filler in (0, 200)]
    assert ours[0].equal(ours[1])
    for image, plan in zip(images, plans, strict=True):
        outside = np.ones(image.shape[:2], dtype=bool)
        outside[slice(*plan.rows.window), slice(*plan.columns.window)] = False
        other = np.where(outside[:, :, None], 255 - image, image)
        np.testing.assert_array_equal(render(other, plan, 32), render(image, plan, 32))


def test_window_of_a_huge_image_is_as_small_as_the_crop_asks() -> None:
    config = AugmentConfig(crop_size=64, scale_min=0.5, scale_max=2.0)
    for seed in range(50):
        plan = draw_crop((6000, 9000), config, rng(seed))
        for begin, end in (plan.rows.window, plan.columns.window):
            assert end - begin <= 64 / 0.5 + 6


def test_crops_stay_those_of_earlier_versions() -> None:
    """A seed means the same crops for good; recorded when drawing and resampling were still one function."""
    generator = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(1, 5, 2)))
    plan = draw_crop((375, 500), AugmentConfig(crop_size=64), generator)
    assert (plan.rows.first, plan.rows.last) == pytest.approx((202.23799126637553, 254.63973799126637), abs=1e-12)
    assert (plan.columns.first, plan.columns.last) == pytest.approx((74.46808510638297, 126.84124386252046), abs=1e-12)
    assert (plan.valid_box, plan.flip) == ((0, 64, 0, 64), False)
    canvas = render(noise(375, 500), plan, 64)
    assert canvas[0, 0].tolist() == [208, 64, 209]
    assert canvas.astype(int).sum() == 1560611


@pytest.mark.parametrize("size", [(30, 47), (47, 30), (100, 3), (200, 64), (33, 33)])
def test_whole_image_fills_the_crop_as_far_as_it_can(size: tuple[int, int]) -> None:
    config = AugmentConfig(crop_size=33, flip_probability=0.5, whole_images=True)
    plans = [draw_crop(size, config, rng(seed)) for seed in range(20)]
    plain, mirrored = (fit_whole(size, 33, flip=flip) for flip in (False, True))
    assert {plan.flip for plan in plans} == {False, True}
    assert all(plan == (mirrored if plan.flip else plain) for plan in plans)
    top, bottom, left, right = plain.valid_box
    assert max(bottom - top, right - left) == 33
    assert abs((bottom - top) / (right - left) / (size[0] / size[1]) - 1) < max(
        0.6 / (bottom - top), 0.6 / (right - left)
    )
    for before, after in ((top, 33 - bottom), (left, 33 - right)):
        assert 0 <= after - before <= 1
    for axis in (plain.rows, plain.columns):
        assert (axis.first, axis.last) == (0, axis.length)
    np.testing.assert_array_equal(render(noise(*size), mirrored, 33), render(noise(*size), plain, 33)[:, ::-1])
    box = mirrored.valid_box
    assert (box[2], box[3]) == (33 - right, 33 - left)
