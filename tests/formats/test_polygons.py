"""LabelMe and YOLO files painted again; outlines against a slow painter of polygons and scipy's components."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from scipy import ndimage

from afa.formats.polygons import outline, signed_area, simplify, trace_rings
from made_masks import CLASSES, binary_masks, iou, labels, paint, write_made


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
    items, result = write_made("labelme", tmp_path, smooth_labels())
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
    items, result = write_made("yolo", tmp_path, smooth_labels())
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
    _, result = write_made(format, tmp_path, [nested, nested])
    # Class 1 around 2, and 2 around the background; the 2 x 2 region of class 3.
    assert (result.filled_holes, result.dropped_regions) == (4, 2)
    assert re.search("; 160 ignored pixels .*; 4 holes .*filled.*; 2 specks .*left out$", str(result))


def test_yolo_images_without_an_object_have_an_empty_file(tmp_path: Path) -> None:
    items, result = write_made("yolo", tmp_path, [np.zeros((8, 8), dtype=np.uint8)])
    assert (result.path / "labels" / f"{items[0].name}.txt").read_text() == ""


def test_yolo_finds_labels_of_a_folder_called_images(tmp_path: Path) -> None:
    path = write_made("yolo", tmp_path, [np.ones((8, 8), dtype=np.uint8)], names=["a/images/b"])[1].path
    assert (path / "images/a/images/b.jpg").is_file()
    assert (path / "images/a/labels/b.txt").read_text().startswith("0 0.000000 0.000000 1.000000")


def test_yolo_quotes_class_names(tmp_path: Path) -> None:
    names = ("yes", "a: b # c", '"\\é😀')
    path = write_made("yolo", tmp_path, classes=names)[1].path
    assert yaml.safe_load((path / "data.yaml").read_text(encoding="utf-8"))["names"] == dict(enumerate(names))


EVERY_NEIGHBOR = np.ones((3, 3), dtype=bool)


def disc(radius: float, *, size: int = 100) -> np.ndarray:
    y, x = np.indices((size, size)) + 0.5
    return (x - size / 2) ** 2 + (y - size / 2) ** 2 < radius**2


def test_rings_follow_regions_and_holes() -> None:
    for mask in binary_masks():
        rings = trace_rings(mask)
        painted = np.zeros(mask.shape, dtype=bool)
        for ring in rings:
            painted ^= paint(ring, mask.shape)
            # It turns at every corner.
            step = np.roll(ring, -1, axis=0) - ring
            assert ((step == 0).sum(1) == 1).all()
            assert ((step * np.roll(step, -1, axis=0)).sum(1) == 0).all()
        np.testing.assert_array_equal(painted, mask)
        areas = [signed_area(ring) for ring in rings]
        assert sum(areas) == mask.sum()
        assert sum(area > 0 for area in areas) == ndimage.label(mask)[1]
        assert sum(area < 0 for area in areas) == ndimage.label(~np.pad(mask, 1), EVERY_NEIGHBOR)[1] - 1


def test_exact_polygons_are_the_regions_with_holes_filled() -> None:
    for mask in binary_masks():
        regions, count = ndimage.label(mask)
        drawn = outline(mask, tolerance=0, min_area=0)
        filled = [ndimage.binary_fill_holes(regions == index, EVERY_NEIGHBOR) for index in range(1, count + 1)]
        assert sorted(drawn.areas) == sorted(region.sum() for region in filled)
        assert drawn.areas == sorted(drawn.areas, reverse=True)
        expected = {region.tobytes() for region in filled}
        assert {paint(polygon, mask.shape).tobytes() for polygon in drawn.polygons} == expected
        assert drawn.dropped == 0


def test_specks_are_dropped_and_holes_are_counted() -> None:
    mask = np.zeros((20, 20), dtype=bool)
    mask[0, 0] = mask[5, 5:14] = mask[10:12, :5] = True
    drawn = outline(mask, min_area=10)
    assert (drawn.areas, drawn.dropped) == ([10.0], 2)
    assert drawn.polygons[0].tolist() == [[0, 10], [5, 10], [5, 12], [0, 12]]
    mask = np.ones((12, 12), dtype=bool)
    mask[2:4, 2:4] = mask[6:9, 6:9] = False
    assert outline(mask).filled_holes == 2
    drawn = outline(np.zeros((4, 5), dtype=bool))
    assert (drawn.polygons, drawn.areas, drawn.filled_holes, drawn.dropped) == ([], [], 0, 0)


def test_simplified_outlines_stay_within_the_tolerance() -> None:
    for mask in [*binary_masks(30), disc(40)]:
        for ring in trace_rings(mask):
            simple = simplify(ring, 1.0)
            assert len(simple) >= 3
            ends = np.roll(simple, -1, axis=0)
            along = ends - simple
            share = ((ring[:, None] - simple) * along).sum(2) / (along**2).sum(1)
            nearest = simple + np.clip(share, 0, 1)[:, :, None] * along
            assert np.hypot(*(ring[:, None] - nearest).T).min(0).max() < 1.001


def test_smooth_shapes_keep_their_area_with_few_corners() -> None:
    mask = disc(40)
    (polygon,) = outline(mask).polygons
    assert len(polygon) < 40
    assert iou(paint(polygon, mask.shape), mask) > 0.98
    (exact,) = outline(mask, tolerance=0).polygons
    assert len(exact) > 150


@pytest.mark.parametrize("slope", [1, 2, 3, 7])
def test_staircases_become_straight(slope: int) -> None:
    mask = np.indices((120, 120))[0] * slope >= np.indices((120, 120))[1]
    (polygon,) = outline(mask).polygons
    assert len(polygon) <= 6


def test_thin_spikes_stay() -> None:
    mask = np.zeros((20, 60), dtype=bool)
    mask[5:15, 5:20] = mask[5, 20:55] = True
    (polygon,) = outline(mask).polygons
    assert polygon[:, 0].max() == 55


def test_a_ring_may_pass_a_corner_twice() -> None:
    """Two pixels touch at a corner and are connected elsewhere: the place between them is no hole."""
    mask = np.ones((9, 9), dtype=bool)
    mask[3:6, 3:6] = False
    mask[2, 2] = mask[1, 1] = mask[0, 0] = False
    (ring,) = trace_rings(mask)
    assert len(np.unique(ring, axis=0)) < len(ring)
    assert signed_area(ring) == mask.sum()
    for tolerance in (0.5, 1.0, 20.0):
        assert np.isfinite(simplify(ring, tolerance)).all()
