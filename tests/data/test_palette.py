from __future__ import annotations

import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afa.data.palette import overlay, voc_palette, write_index_png
from mistakes import refused


def test_palette_is_vocs() -> None:
    palette = voc_palette()
    assert palette.shape == (256, 3)
    assert palette.dtype == np.uint8
    first = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)]
    assert palette[:7].tolist() == [list(color) for color in first]
    assert palette[20].tolist() == [0, 64, 128]
    assert palette[64].tolist() == [32, 0, 0]
    assert len({tuple(color) for color in palette.tolist()}) == 256


@pytest.mark.data
def test_palette_equals_the_one_in_voc_masks(shared_dir: Path) -> None:
    with tarfile.open(shared_dir / "data" / "voc" / "val-dev.tar") as shard:
        member = next(entry for entry in shard if entry.name.endswith(".png"))
        file = shard.extractfile(member)
        assert file is not None
        with Image.open(file) as mask:
            stored = mask.getpalette()
    assert stored is not None
    assert voc_palette()[:21].tolist() == np.reshape(stored, (-1, 3))[:21].tolist()


def test_overlay_tints_classes_only() -> None:
    image = np.full((20, 30, 3), 100, dtype=np.uint8)
    label = np.zeros((20, 30), dtype=np.uint8)
    label[:, 10:20] = 2
    label[:, 20:] = 255
    painted = overlay(image, label, alpha=0.5)
    assert painted.dtype == np.uint8
    assert (painted[:, :10] == 100).all()
    assert painted[5, 15].tolist() == [50, 114, 50]
    assert painted[5, 10].tolist() == [0, 128, 0]  # outline
    ignored = painted[:, 20:]
    assert (ignored > 140).all()
    assert (ignored == ignored[..., :1]).all()
    assert len(np.unique(ignored)) == 2  # hatched
    assert (image == 100).all()
    assert (label[:, :10] == 0).all()


def test_overlay_strength() -> None:
    image = np.full((9, 9, 3), 200, dtype=np.uint8)
    label = np.full((9, 9), 1, dtype=np.uint8)
    np.testing.assert_array_equal(overlay(image, label, alpha=0.0), image)
    np.testing.assert_array_equal(overlay(image, label, alpha=1.0), voc_palette()[label])


def test_index_png_round_trip(tmp_path: Path) -> None:
    label = np.random.default_rng(0).integers(0, 256, (6, 9), dtype=np.uint8)
    path = tmp_path / "new" / "a.png"
    write_index_png(path, label)
    with Image.open(path) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), label)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), voc_palette()[label])
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_index_png_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    old = np.ones((2, 2), dtype=np.uint8)
    write_index_png(path, old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with refused("a.png: ", "too large"):
            write_index_png(path, np.zeros((2, 2), dtype=np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), old)
