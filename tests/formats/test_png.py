"""Folders and archives of PNG masks, read by afa itself, by `datasets`, and as CVAT describes its archive."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afa.config import DataConfig
from afa.data.open import open_data
from afa.errors import AfaError
from made_masks import CLASSES, labels, write_made

COLORS = [(10, 20, 30), (200, 0, 0), (0, 0, 255)]


def read_labelmap(text: str) -> dict[str, tuple[int, ...]]:
    lines = [line.split(":") for line in text.splitlines() if not line.startswith("#")]
    assert all(len(line) == 4 for line in lines)
    return {line[0]: tuple(map(int, line[1].split(","))) for line in lines}


def test_voc_is_read_by_afa(tmp_path: Path) -> None:
    items, result = write_made("voc", tmp_path, colors=COLORS)
    data = DataConfig(
        root=str(result.path), mask_dir="SegmentationClass", val_list="ImageSets/Segmentation/default.txt"
    )
    images = open_data(data).masked()
    assert images.classes == CLASSES
    assert images.names == tuple(item.name for item in items)
    for index, label in enumerate(labels()):
        np.testing.assert_array_equal(images.mask(index), label)
    labelmap = read_labelmap((result.path / "labelmap.txt").read_text(encoding="utf-8"))
    assert list(labelmap) == ["background", *CLASSES, "ignored"]
    for item, label in zip(items, labels(), strict=True):
        with Image.open(result.path / "SegmentationClass" / f"{item.name}.png") as mask:
            assert mask.mode == "P"
            painted = np.array(mask.convert("RGB"))
        by_value = dict(zip([0, 1, 2, 3, 255], labelmap.values(), strict=True))
        assert all((painted[label == value] == color).all() for value, color in by_value.items())
    assert result.losses == ()


def test_labelmap_has_no_line_for_ignored_pixels_that_do_not_occur(tmp_path: Path) -> None:
    path = write_made("voc", tmp_path, [np.eye(9, dtype=np.uint8)])[1].path
    assert list(read_labelmap((path / "labelmap.txt").read_text(encoding="utf-8"))) == ["background", *CLASSES]


@pytest.mark.parametrize("format", ["voc", "cvat"])
@pytest.mark.parametrize("name", ["a:b", "#1"])
def test_labelmap_refuses_names_that_it_cannot_hold(tmp_path: Path, format: str, name: str) -> None:
    with pytest.raises(AfaError, match=rf"'{name}' .*labelmap\.txt; rename"):
        write_made(format, tmp_path, classes=("cat", name, "c"))


@pytest.mark.parametrize("colors", [None, COLORS])
def test_cvat_archive(tmp_path: Path, colors: list[tuple[int, int, int]] | None) -> None:
    items, result = write_made("cvat", tmp_path, colors=colors)
    with zipfile.ZipFile(result.path) as archive:
        assert archive.testzip() is None
        labelmap = read_labelmap(archive.read("labelmap.txt").decode())
        assert list(labelmap) == ["background", *CLASSES]
        assert colors is None or list(labelmap.values()) == [(0, 0, 0), *colors]
        names = archive.read("ImageSets/Segmentation/default.txt").decode().splitlines()
        assert names == [item.name for item in items]
        assert len(archive.namelist()) == 2 + 2 * len(items)
        assert all(entry.external_attr >> 16 == 0o644 for entry in archive.infolist())
        for name, label in zip(names, labels(), strict=True):
            for folder in ("SegmentationClass", "SegmentationObject"):
                with Image.open(io.BytesIO(archive.read(f"{folder}/{name}.png"))) as mask:
                    stored, painted = np.array(mask), np.array(mask.convert("RGB"))
                # By index and by color alike, with the ignored pixels in the background.
                np.testing.assert_array_equal(stored, np.where(label == 255, 0, label))
                for value, color in enumerate(labelmap.values()):
                    np.testing.assert_array_equal((painted == color).all(2), stored == value)
    assert result.ignored_pixels == sum((label == 255).sum() for label in labels())
    assert "ignored pixels became background" in str(result)


def test_mmseg_folders(tmp_path: Path) -> None:
    items, result = write_made("mmseg", tmp_path)
    path = result.path
    settings: dict[str, object] = {}
    exec((path / "dataset.py").read_text(encoding="utf-8"), settings)
    found: dict[str, np.ndarray] = {}
    for data in settings["datasets"]:  # type: ignore[attr-defined]
        assert data["reduce_zero_label"] is False
        assert data["metainfo"]["classes"] == ("background", *CLASSES)
        assert len(data["metainfo"]["palette"]) == 4
        # As BaseSegDataset lists its files: images by suffix, each with the mask of the same name.
        images = path / data["data_prefix"]["img_path"]
        for image in images.rglob(f"*{data['img_suffix']}"):
            name = image.relative_to(images).as_posix().removesuffix(data["img_suffix"])
            with Image.open(path / data["data_prefix"]["seg_map_path"] / (name + data["seg_map_suffix"])) as mask:
                found[name] = np.array(mask)
    assert set(found) == {item.name for item in items}
    for item, label in zip(items, labels(), strict=True):
        np.testing.assert_array_equal(found[item.name], label)


def test_hf_is_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    items, result = write_made("hf", tmp_path / "test" / "validation")
    path = result.path
    datasets.disable_progress_bars()
    read = datasets.load_dataset("imagefolder", data_dir=str(path), cache_dir=str(tmp_path / "cache"))
    assert list(read) == ["train"]
    assert read["train"]["name"][:] == [item.name for item in items]
    for row, item, label in zip(read["train"], items, labels(), strict=True):
        np.testing.assert_array_equal(np.array(row["mask"]), label)
        with Image.open(item.image_path) as image:
            np.testing.assert_array_equal(np.array(row["image"]), np.array(image))
        assert row["classes"] == [CLASSES[value - 1] for value in np.unique(label) if 0 < value < 255]


def test_hf_metadata_names_files_that_exist(tmp_path: Path) -> None:
    path = write_made("hf", tmp_path)[1].path
    rows = [json.loads(line) for line in (path / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == len(labels())
    assert all((path / row[key]).is_file() for row in rows for key in ("file_name", "mask_file_name"))
    assert (path / "classes.txt").read_text(encoding="utf-8").splitlines() == ["background", *CLASSES]
