"""LabelMe and YOLO files, painted again and compared with the masks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from afa.formats.write import write_format
from made_masks import CLASSES, iou, labels, paint, write_items


def smooth_labels() -> list[NDArray[np.uint8]]:
    """Overlapping discs, some cut by the border."""
    y, x = np.indices((150, 200)) + 0.5
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        label = np.zeros((150, 200), dtype=np.uint8)
        for _ in range(6):
            center_y, center_x, radius = rng.uniform(0, 150), rng.uniform(0, 200), rng.uniform(15, 60)
            label[(y - center_y) ** 2 + (x - center_x) ** 2 < radius**2] = rng.integers(0, 4)
        found.append(label)
    return found


def repaint(regions: list[tuple[int, NDArray[np.float64]]], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    label = np.zeros(shape, dtype=np.uint8)
    for value, polygon in regions:
        label[paint(polygon, shape)] = value
    return label


def test_labelme_shapes(tmp_path: Path) -> None:
    items = write_items(tmp_path, smooth_labels())
    result = write_format("labelme", items, CLASSES, tmp_path / "out", progress=False)
    for item, label in zip(items, smooth_labels(), strict=True):
        path = result.path / f"{item.name}.json"
        content = json.loads(path.read_text())
        assert (path.parent / content["imagePath"]).samefile(item.image_path)
        assert content["imageData"] is None
        assert (content["imageHeight"], content["imageWidth"]) == label.shape
        assert {shape["shape_type"] for shape in content["shapes"]} == {"polygon"}
        regions = [(CLASSES.index(shape["label"]) + 1, np.array(shape["points"])) for shape in content["shapes"]]
        painted = repaint(regions, label.shape)
        for value in np.unique(label):
            assert iou(painted == value, label == value) > 0.9
        assert (painted == label).mean() > 0.98


def test_yolo_lines(tmp_path: Path) -> None:
    items = write_items(tmp_path, smooth_labels())
    result = write_format("yolo", items, CLASSES, tmp_path / "out", progress=False)
    settings = yaml.safe_load((result.path / "data.yaml").read_text(encoding="utf-8"))
    assert settings == {"train": "images", "val": "images", "names": dict(enumerate(CLASSES))}
    for item, label in zip(items, smooth_labels(), strict=True):
        assert (result.path / "images" / item.file_name).samefile(item.image_path)
        regions = []
        for line in (result.path / "labels" / f"{item.name}.txt").read_text().splitlines():
            value, *numbers = line.split()
            polygon = np.array(numbers, dtype=float).reshape(-1, 2)
            assert ((polygon >= 0) & (polygon <= 1)).all()
            assert len(polygon) >= 3
            regions.append((int(value) + 1, polygon * label.shape[::-1]))
        assert (repaint(regions, label.shape) == label).mean() > 0.98


@pytest.mark.parametrize("format", ["labelme", "yolo"])
def test_what_polygons_lose_is_said_once(tmp_path: Path, format: str) -> None:
    nested = labels()[0]
    items = write_items(tmp_path, [nested, nested])
    result = write_format(format, items, CLASSES, tmp_path / "out", progress=False)
    # Class 1 around 2, and 2 around the background; the 2 x 2 region of class 3.
    assert (result.filled_holes, result.dropped_regions) == (4, 2)
    assert re.search("; 160 ignored pixels .*; 4 holes .*filled.*; 2 specks .*left out$", str(result))


def test_yolo_images_without_an_object_have_an_empty_file(tmp_path: Path) -> None:
    items = write_items(tmp_path, [np.zeros((8, 8), dtype=np.uint8)])
    path = write_format("yolo", items, CLASSES, tmp_path / "out", progress=False).path
    assert (path / "labels" / f"{items[0].name}.txt").read_text() == ""


def test_yolo_finds_labels_of_a_folder_called_images(tmp_path: Path) -> None:
    (item,) = write_items(tmp_path, [np.ones((8, 8), dtype=np.uint8)])
    item = type(item)("a/images/b", item.image_path, item.mask_path)
    path = write_format("yolo", [item], CLASSES, tmp_path / "out", progress=False).path
    assert (path / "images/a/images/b.jpg").is_file()
    assert (path / "images/a/labels/b.txt").read_text().startswith("0 0.000000 0.000000 1.000000")


def test_yolo_quotes_class_names(tmp_path: Path) -> None:
    names = ("yes", "a: b # c", '"\\é😀')
    path = write_format("yolo", write_items(tmp_path), names, tmp_path / "out", progress=False).path
    assert yaml.safe_load((path / "data.yaml").read_text(encoding="utf-8"))["names"] == dict(enumerate(names))
