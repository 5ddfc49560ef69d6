"""Label Studio's tasks and interface, read back; its run lengths against a slow reader of the bits."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import numpy as np
import pytest

from afa.formats.labelstudio import LENGTH_BITS, brush_rle
from made_masks import binary_masks, labels, read_label_studio, write_made

CLASSES = ('the "cat"', "<&>", "Straße")


def test_tasks_hold_the_masks(tmp_path: Path) -> None:
    items, result = write_made("labelstudio", tmp_path, classes=CLASSES)
    tasks = json.loads((result.path / "tasks.json").read_text())
    for task, item, label in zip(tasks, items, labels(), strict=True):
        (prediction,) = task["predictions"]
        painted = np.where(label == 255, 255, 0).astype(np.uint8)
        for region in prediction["result"]:
            assert (region["original_height"], region["original_width"]) == label.shape
            assert region["type"] == "brushlabels"
            (name,) = region["value"]["brushlabels"]
            alpha = read_label_studio(region["value"]["rle"]).reshape(*label.shape, 4)[:, :, 3]
            assert not painted[alpha > 0].any()
            painted[alpha > 0] = CLASSES.index(name) + 1
        np.testing.assert_array_equal(painted, label)
        ids = [region["id"] for region in prediction["result"]]
        assert len(set(ids)) == len(ids)
        # Local storage serves paths below its root, here the folder above that of the images.
        url = urlsplit(task["data"]["image"])
        assert url.path == "/data/local-files/"
        assert (tmp_path / parse_qs(url.query)["d"][0]).samefile(item.image_path)


def test_interface_fits_the_tasks(tmp_path: Path) -> None:
    path = write_made("labelstudio", tmp_path, classes=CLASSES)[1].path
    view = ElementTree.fromstring((path / "config.xml").read_text(encoding="utf-8"))
    brush, image = view.find("BrushLabels"), view.find("Image")
    assert brush is not None
    assert image is not None
    assert [label.attrib["value"] for label in brush] == list(CLASSES)
    assert [label.attrib["background"] for label in brush] == ["#800000", "#008000", "#808000"]
    assert image.attrib["value"] == "$image"
    task = json.loads((path / "tasks.json").read_text())[0]
    for region in task["predictions"][0]["result"]:
        assert (region["from_name"], region["to_name"]) == (brush.attrib["name"], image.attrib["name"])


def test_bits_give_four_equal_channels() -> None:
    for mask in binary_masks():
        pixels = read_label_studio(brush_rle(mask)).reshape(*mask.shape, 4)
        np.testing.assert_array_equal(pixels, np.repeat(255 * mask[:, :, None].astype(np.uint8), 4, axis=2))


@pytest.mark.parametrize("num_pixels", [1, 2, 3, 4, 5, 64, 65, 16384, 16385, 2 * 16384, 40000])
def test_runs_at_the_limits_of_each_width(num_pixels: int) -> None:
    """Lengths are bytes, four for a pixel: 8, 16, 256 and 65,536 are the longest of a block."""
    mask = np.zeros((1, 40001), dtype=bool)
    mask[0, 1 : 1 + num_pixels] = True
    values = read_label_studio(brush_rle(mask))
    assert values.sum() == 255 * 4 * num_pixels
    assert values[4 : 4 + 4 * num_pixels].all()


def test_header() -> None:
    stream = brush_rle(np.ones((2, 3), dtype=bool))
    assert stream[:4] == [0, 0, 0, 24]
    bits = "".join(f"{byte:08b}" for byte in stream[4:7])
    assert bits[:21] == "00111" + "".join(f"{width - 1:04b}" for width in LENGTH_BITS)
