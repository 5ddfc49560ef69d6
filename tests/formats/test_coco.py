"""COCO files read by pycocotools, and panoptic PNGs by the formula of their ids."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from afa.formats.write import write_format
from made_masks import CLASSES, labels, write_items

# pycocotools' own arrays predate a keyword of numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_instances_are_read_by_pycocotools(tmp_path: Path) -> None:
    items = write_items(tmp_path)
    result = write_format("coco", items, CLASSES, tmp_path / "out", progress=False)
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
            assert annotation["area"] == mask.sum()
            assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
    assert result.ignored_pixels == sum((label == 255).sum() for label in labels())
    assert "ignored pixels are in no annotation" in str(result)


def test_annotation_ids_are_unique(tmp_path: Path) -> None:
    path = write_format("coco", write_items(tmp_path), CLASSES, tmp_path, progress=False).path
    ids = [annotation["id"] for annotation in json.loads(path.read_text())["annotations"]]
    assert len(ids) > 5
    assert ids == list(range(1, len(ids) + 1))


def test_panoptic_segments(tmp_path: Path) -> None:
    colors = [(10, 20, 30), (1, 0, 0), (0, 0, 255)]
    items = write_items(tmp_path)
    result = write_format("panoptic", items, CLASSES, tmp_path / "out", colors=colors, progress=False)
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
            left, top, width, height = segment["bbox"]
            assert mask[top : top + height, left : left + width].sum() == mask.sum()
            assert mask[[top, top + height - 1]].any(1).all()
            assert mask[:, [left, left + width - 1]].any(0).all()
