"""COCO files read by pycocotools and bit by bit, and panoptic PNGs by the formula of their ids."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from made_masks import CLASSES, binary_masks, labels, write_made

# pycocotools' own arrays predate a keyword of numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_instances_are_read_by_pycocotools(tmp_path: Path) -> None:
    items, result = write_made("coco", tmp_path)
    assert result.path == tmp_path / "out" / "coco.json"
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(result.path))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert len(coco.imgs) == len(items)
    for image, item, label in zip(coco.dataset["images"], items, labels(), strict=True):
        assert (image["height"], image["width"]) == label.shape
        assert image["file_name"] == item.image_path.relative_to(tmp_path / "images").as_posix()
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        present = set(np.unique(label)) - {0, 255}
        assert [annotation["category_id"] for annotation in annotations] == sorted(present)
        for annotation in annotations:
            mask = label == annotation["category_id"]
            np.testing.assert_array_equal(coco.annToMask(annotation), mask)
    assert result.ignored_pixels == sum((label == 255).sum() for label in labels())
    assert "ignored pixels are in no annotation" in str(result)


def read_counts(text: str) -> list[int]:
    """Run lengths in COCO's compressed text: five bits a character, lowest first; differences from the fourth on."""
    counts: list[int] = []
    number = shift = 0
    for bits in (ord(character) - 48 for character in text):
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (bits & 16) << shift - 4
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    assert not shift
    return counts


def bounds(mask: NDArray[np.bool_]) -> list[int]:
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]


def test_run_lengths_area_and_box(tmp_path: Path) -> None:
    large = np.zeros((3000, 4000), dtype=bool)
    large[100:2900, 5] = large[7, 2000:] = large[2999, 3999] = True
    masks = [*binary_masks(), large]
    _, result = write_made("coco", tmp_path, [mask.astype(np.uint8) for mask in masks])
    annotations = json.loads(result.path.read_text())["annotations"]
    for annotation, mask in zip(annotations, masks, strict=True):
        assert annotation["segmentation"]["size"] == list(mask.shape)
        counts = read_counts(annotation["segmentation"]["counts"])
        runs = np.repeat(np.arange(len(counts)) % 2, counts)
        np.testing.assert_array_equal(runs.reshape(mask.shape, order="F"), mask)
        assert annotation["area"] == mask.sum()
        assert annotation["bbox"] == bounds(mask)


def test_annotation_ids_are_unique(tmp_path: Path) -> None:
    path = write_made("coco", tmp_path)[1].path
    ids = [annotation["id"] for annotation in json.loads(path.read_text())["annotations"]]
    assert len(ids) > 5
    assert ids == list(range(1, len(ids) + 1))


def test_panoptic_segments(tmp_path: Path) -> None:
    colors = [(10, 20, 30), (1, 0, 0), (0, 0, 255)]
    items, result = write_made("panoptic", tmp_path, colors=colors)
    folder = result.path / "annotations"
    content = json.loads((folder / "panoptic_default.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert names == {1: "cat", 2: "potted plant", 3: "Straße", 4: "background"}
    assert [image["file_name"] for image in content["images"]] == [item.file_name for item in items]
    for image, annotation, label in zip(content["images"], content["annotations"], labels(), strict=True):
        assert annotation["image_id"] == image["id"]
        with Image.open(folder / "panoptic_default" / annotation["file_name"]) as picture:
            assert picture.mode == "RGB"
            red, green, blue = np.moveaxis(np.array(picture, dtype=np.int64), 2, 0)
        ids = red + 256 * green + 65536 * blue
        # What panopticapi checks: every id in the PNG but 0 has an entry, and every entry is in the PNG.
        segments = {segment["id"]: segment for segment in annotation["segments_info"]}
        assert len(segments) == len(annotation["segments_info"])
        assert set(np.unique(ids)) - {0} == set(segments)
        np.testing.assert_array_equal(ids == 0, label == 255)
        for segment_id, segment in segments.items():
            mask = ids == segment_id
            np.testing.assert_array_equal(mask, label == segment["category_id"] % 4)
            assert segment["area"] == mask.sum()
            assert segment["bbox"] == bounds(mask)
