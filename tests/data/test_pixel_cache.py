from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afa.config import AugmentConfig
from afa.data import large, pixel_cache
from afa.data.dataset import TaggedImages
from afa.data.large import LargeImages
from afa.data.pixel_cache import PixelCache, free_memory, resolve_cache
from afa.data.transforms import draw_crop, resample_image
from afa.errors import AfaError
from mistakes import refused


def picture(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (10 + index, 20, 3), dtype=np.uint8)


def unreadable(index: int) -> np.ndarray:
    raise AfaError(f"{index}: broken")


def test_every_image_is_what_was_read_and_read_once() -> None:
    cache = PixelCache(5, 2**20)
    for _ in range(2):
        for index in range(5):
            np.testing.assert_array_equal(cache.image(index, picture), picture(index))
            with pytest.raises(ValueError, match="read-only"):
                cache.image(index, picture)[:] = 0
    for index in range(5):
        np.testing.assert_array_equal(cache.image(index, unreadable), picture(index))
    assert cache.used_bytes == sum(picture(index).nbytes for index in range(5))


def test_images_that_do_not_fit_are_read_each_time() -> None:
    cache = PixelCache(5, picture(0).nbytes + picture(1).nbytes)
    for index in (0, 1, 2):
        cache.image(index, picture)
    assert cache.used_bytes == picture(0).nbytes + picture(1).nbytes
    cache.image(1, unreadable)
    np.testing.assert_array_equal(cache.image(2, picture), picture(2))
    with pytest.raises(AfaError, match="2: broken"):
        cache.image(2, unreadable)


@pytest.mark.parametrize("num_bytes", [0, 2**20])
def test_a_failed_read_leaves_no_trace(num_bytes: int) -> None:
    cache = PixelCache(1, num_bytes)
    with pytest.raises(AfaError):
        cache.image(0, unreadable)
    assert cache.used_bytes == 0
    np.testing.assert_array_equal(cache.image(0, picture), picture(0))
    assert cache.used_bytes == (picture(0).nbytes if num_bytes else 0)


def test_threads_share_it() -> None:
    cache = PixelCache(8, 2**20)
    indices = [index for _ in range(40) for index in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: cache.image(index, picture), indices))
    for index, pixels in zip(indices, found, strict=True):
        np.testing.assert_array_equal(pixels, picture(index))
    assert cache.used_bytes == sum(picture(index).nbytes for index in range(8))


def test_more_than_the_system_has_is_one_line() -> None:
    with refused("data.cache_gib: ", "4194304.0 ", "lower"):
        PixelCache(1, 2**52)


def test_resolve_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_cache(0) == 0
    assert resolve_cache(1.5) == 3 * 2**29
    assert resolve_cache(4, processes=4) == 2**30
    monkeypatch.setattr(pixel_cache, "free_memory", lambda: 16 * 2**30)
    assert resolve_cache(-1) == 4 * 2**30
    assert resolve_cache(-1, processes=2) == 2 * 2**30


def test_free_memory_keeps_a_containers_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def free(limit: str, used: str) -> int:
        (tmp_path / "limit").write_text(limit)
        (tmp_path / "used").write_text(used)
        monkeypatch.setattr(pixel_cache, "_CGROUP_FILES", ((tmp_path / "limit", tmp_path / "used"),))
        return free_memory()

    unlimited = free("max\n", "1000\n")
    if not Path("/proc/meminfo").exists():
        assert unlimited == 0
        return
    assert unlimited > 2**20
    assert free("5000\n", "2000\n") == 3000
    assert free("5000\n", "6000\n") == 0


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaggedImages:
    """The last of three pictures is large."""
    for index, side in enumerate((40, 50, 90)):
        pixels = np.random.default_rng(index).integers(0, 256, (side, side + 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((4 * side, 3 * side)).save(tmp_path / f"{index}.png")
    monkeypatch.setattr(large, "LARGE_PIXELS", 200 * 250)
    names = ("0", "1", "2")
    tags = np.ones((3, 1), dtype=bool)
    return TaggedImages(classes=("x",), names=names, paths=[f"{n}.png" for n in names], tags=tags, folder=tmp_path)


def test_large_images_are_decoded_once_and_read_in_part(pictures: TaggedImages, tmp_path: Path) -> None:
    folder = tmp_path / "pixels"
    for cache in (PixelCache(3, 2**20, large=LargeImages(pictures, folder, 10**6)) for _ in range(2)):
        found = [cache.image(index, pictures.image) for index in range(3)]
        assert [isinstance(each, np.memmap) for each in found] == [False, False, True]
        np.testing.assert_array_equal(found[2], pictures.image(2))
        with pytest.raises(ValueError, match="read-only"):
            found[2][:] = 0
        assert cache.used_bytes == found[0].nbytes + found[1].nbytes
        assert len(list(folder.iterdir())) == 1
    augment = AugmentConfig(crop_size=32, scale_min=0.3, scale_max=2.0)
    for seed in range(20):
        plan = draw_crop(found[2].shape[:2], augment, np.random.default_rng(seed))
        crops = [np.zeros((3, 32, 32), dtype=np.uint8) for _ in range(2)]
        for crop, image in zip(crops, (found[2], pictures.image(2)), strict=True):
            resample_image(image, plan, crop)
        assert np.abs(crops[0].astype(int) - crops[1]).max() <= 1
    Image.new("RGB", (360, 271)).save(tmp_path / "2.png")
    again = LargeImages(pictures, folder, 10**6).image(2)
    assert again is not None
    assert not again.any()


@pytest.mark.parametrize("max_bytes", [0, 3 * 360 * 270 - 1])
def test_large_images_without_room_on_disk_are_decoded_each_time(
    pictures: TaggedImages, tmp_path: Path, max_bytes: int
) -> None:
    assert LargeImages(pictures, tmp_path / "pixels", max_bytes).image(2) is None
    assert not (tmp_path / "pixels").exists()


def test_a_disk_that_refuses_is_named(pictures: TaggedImages, tmp_path: Path) -> None:
    (tmp_path / "pixels").write_text("a file")
    with refused(tmp_path / "pixels", "set data.large_gib to 0"):
        LargeImages(pictures, tmp_path / "pixels", 10**6).image(2)
