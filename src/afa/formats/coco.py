"""COCO's two JSON files: instances, with each class's mask as RLE, and panoptic, with PNGs of segments.

Both describe classes, not objects: two cats in an image are one annotation. The JSON is written as images come,
so memory does not grow with their number.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from afa.formats.job import Job, JsonList, MaskItem

PANOPTIC_BACKGROUND: Final = (1, 1, 1)
"""Color of the background in panoptic PNGs, in which black is a pixel of no segment."""


def write_coco(job: Job) -> None:
    """Write an instances file: categories 1..C, and an annotation for each image and class that it shows."""
    categories = [{"id": value, "name": name, "supercategory": ""} for value, name in enumerate(job.classes, start=1)]
    with _coco_file(job.partial, categories) as (images, annotations):
        annotation_id = 0
        for image_id, (item, label) in enumerate(job.masks, start=1):
            job.count_ignored(label)
            images.add(_image(image_id, item, label))
            values = job.present(label)
            for value, (run_lengths, figures) in zip(values, _segments(label, values), strict=True):
                annotation_id += 1
                segmentation = {"size": list(label.shape), "counts": run_lengths}
                place = {"id": annotation_id, "image_id": image_id, "category_id": value}
                annotations.add(place | {"segmentation": segmentation} | figures)


def write_panoptic(job: Job) -> None:
    """Write a panoptic file and its PNGs: a segment for each class, and for the background (category C + 1).

    A segment's color, read as R + 256 G + 65536 B, is its id; ignored pixels are black, of no segment.
    """
    num_classes = len(job.classes)
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[: num_classes + 1] = job.palette[: num_classes + 1]
    colors[0] = PANOPTIC_BACKGROUND
    segment_ids = (colors.astype(np.int64) @ [1, 256, 65536]).tolist()
    # Not 0 for the background: readers take that for none.
    category_ids = [num_classes + 1, *range(1, num_classes + 1)]
    categories = [
        {"id": category_ids[value], "name": name, "supercategory": "", "isthing": 0, "color": colors[value].tolist()}
        for value, name in enumerate(("background", *job.classes))
    ]
    with _coco_file(job.place("annotations/panoptic_default.json"), categories[1:] + categories[:1]) as (
        images,
        annotations,
    ):
        for image_id, (item, label) in enumerate(job.masks, start=1):
            job.count_ignored(label)
            images.add(_image(image_id, item, label))
            picture = job.place(f"annotations/panoptic_default/{item.name}.png")
            Image.fromarray(colors[label]).save(picture, format="PNG")
            values = ([0] if (label == 0).any() else []) + job.present(label)
            segments = [
                {"id": segment_ids[value], "category_id": category_ids[value]} | figures
                for value, (_, figures) in zip(values, _segments(label, values), strict=True)
            ]
            annotations.add({"image_id": image_id, "file_name": f"{item.name}.png", "segments_info": segments})


@contextlib.contextmanager
def _coco_file(path: Path, categories: list[dict[str, Any]]) -> Iterator[tuple[JsonList, JsonList]]:
    """The images and annotations of a COCO file; the second list waits in a file of its own."""
    with path.open("wb") as file, tempfile.TemporaryFile(dir=path.parent) as spool:
        head = json.dumps({"info": {"description": "masks by afa"}, "licenses": [], "categories": categories})
        file.write(head.removesuffix("}").encode() + b', "images": [')
        yield JsonList(file), JsonList(spool)
        file.write(b'], "annotations": [')
        spool.seek(0)
        shutil.copyfileobj(spool, file)
        file.write(b"]}\n")


def _image(image_id: int, item: MaskItem, label: NDArray[np.uint8]) -> dict[str, Any]:
    height, width = label.shape
    return {"id": image_id, "file_name": item.file_name, "height": height, "width": width}


def _segments(label: NDArray[np.uint8], values: Sequence[int]) -> list[tuple[str, dict[str, Any]]]:
    """For each value of an (H, W) mask: compressed run lengths; and area, box (left, top, width, height), no crowd."""
    if not values:
        return []
    encoded = coco_mask.encode(np.asfortranarray(label[:, :, None] == np.array(values)).view(np.uint8))
    areas, boxes = coco_mask.area(encoded).tolist(), coco_mask.toBbox(encoded).astype(int).tolist()
    return [
        (each["counts"].decode("ascii"), {"area": area, "bbox": box, "iscrowd": 0})
        for each, area, box in zip(encoded, areas, boxes, strict=True)
    ]
