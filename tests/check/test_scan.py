from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from afa.check import scan as scan_module
from afa.check.scan import difference_hash, identical_groups, scan_images, similar_groups
from afa.data.images import level_warning
from afa.errors import AfaError


def picture(seed: int, height: int = 60, width: int = 80) -> NDArray[np.uint8]:
    """A smooth image of its own."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(folder: Path, name: str, pixels: NDArray[np.uint8]) -> Path:
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def naive_hash(pixels: NDArray[np.uint8]) -> int:
    """The hash of an image whose sides are multiples of 8 and 9, by the mean of each cell."""
    height, width = pixels.shape[:2]
    cells = pixels.reshape(8, height // 8, 9, width // 9, 3).mean(axis=(1, 3))
    gray = cells @ (0.299, 0.587, 0.114)
    return int("".join("1" if gray[y, x + 1] > gray[y, x] else "0" for y in range(8) for x in range(8)), 2)


def test_hash_compares_the_means_of_neighboring_cells() -> None:
    for seed in range(5):
        pixels = picture(seed, 64, 90)
        assert (difference_hash(pixels) ^ naive_hash(pixels)).bit_count() <= 1  # rounding may tie


def test_every_image_is_measured_and_broken_ones_are_named(tmp_path: Path) -> None:
    paths = [save(tmp_path, f"{i}.png", picture(i, 40 + i, 50)) for i in range(70)]
    gray = np.repeat(picture(99)[:, :, :1], 3, axis=2)
    paths.append(save(tmp_path, "gray.png", gray))
    gray[3, 5] = 1, 2, 3
    paths.append(save(tmp_path, "nearly_gray.png", gray))
    buffer = io.BytesIO()
    Image.fromarray(picture(7)).save(buffer, format="JPEG")
    for name, content in (("cut.jpg", buffer.getvalue()[:600]), ("text.jpg", b"text"), ("zero.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        paths.append(tmp_path / name)
    done = []

    def read_mask(index: int) -> None:
        if index == 1:
            raise AfaError("the mask is odd")

    scan = scan_images(paths, threads=3, read_mask=read_mask, tell=lambda: done.append(1))
    assert scan.mask_failures == {1: "the mask is odd"}
    assert len(done) == len(paths)
    assert scan.sizes[:70].tolist() == [[40 + i, 50] for i in range(70)]
    assert np.flatnonzero(scan.gray).tolist() == [70]
    assert sorted(scan.failures) == [72, 73, 74]
    assert "cut.jpg: cannot be read as an image (" in str(scan.failures[72])
    assert "0 bytes" in str(scan.failures[74])
    assert scan.readable.tolist() == list(range(72))
    assert identical_groups(scan) == []


def test_dark_pictures_of_sixteen_bits_are_seen(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 900, dtype=np.uint16)).save(tmp_path / "gray.png")
    Image.fromarray(np.full((4, 4), 90, dtype=np.uint8)).save(tmp_path / "plain.png")
    scan = scan_images([tmp_path / "gray.png", tmp_path / "plain.png"], threads=1)
    assert scan.peaks.tolist() == [900, 0]
    assert level_warning(scan.peaks.tolist(), 65535).endswith("set data.white_level to 1023")
    words = level_warning([-4095, 60_000, 0], 65535)
    assert words.startswith("the largest value of 1 images of 16-bit colors is 4095 of 65535")
    assert level_warning([-65535, 60_000, 0], 65535) == ""


def test_copies_are_found_whatever_their_file(tmp_path: Path) -> None:
    first, second = picture(1), picture(2)
    half = np.array(Image.fromarray(second).resize((40, 30), Image.Resampling.BICUBIC))
    paths = [
        save(tmp_path, "a.png", first),
        save(tmp_path, "b.png", second),
        save(tmp_path, "c.bmp", first),
        save(tmp_path, "half.png", half),
        save(tmp_path, "other.png", picture(3)),
        save(tmp_path, "flat.png", np.full((60, 80, 3), 90, dtype=np.uint8)),
        save(tmp_path, "flat_too.png", np.full((60, 80, 3), 91, dtype=np.uint8)),
    ]
    Image.fromarray(first).save(tmp_path / "d.jpg", quality=80)
    scan = scan_images([*paths, tmp_path / "d.jpg"], threads=2)
    assert identical_groups(scan) == [[0, 2]]
    assert similar_groups(scan) == [[0, 7], [1, 3]]  # 0 stands for 2; flat images are not compared


def test_pairs_are_those_of_a_comparison_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 300, dtype=np.uint64)
    for i in range(150):  # half of them are another one with some bits changed
        bits = rng.choice(64, rng.integers(0, 6), replace=False)
        hashes[150 + i] = hashes[i] ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64), initial=np.uint64(0))
    every = [int(value) for value in hashes]
    expected = {(i, j) for j in range(300) for i in range(j) if (every[i] ^ every[j]).bit_count() <= 3}
    assert len(expected) > 50

    def pairs() -> set[tuple[int, int]]:
        found = [np.stack(each, axis=1) for each in scan_module._candidates(hashes)]
        return set(map(tuple, np.sort(np.concatenate(found), axis=1).tolist()))

    assert pairs() == expected
    monkeypatch.setattr(scan_module, "_WINDOW", 2)
    assert pairs() <= expected
