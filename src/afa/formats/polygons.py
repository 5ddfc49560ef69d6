"""Formats of polygons: LabelMe's JSON files, and YOLO's text files for segmentation."""

from __future__ import annotations

import json
import os

import numpy as np
from numpy.typing import NDArray

from afa.formats.contours import outline
from afa.formats.job import Job


def write_labelme(job: Job) -> None:
    """Write NAME.json for each image, larger regions first; the images stay where they are."""
    for item, label in job.masks:
        path = job.target / f"{item.name}.json"
        annotation = {
            "version": "5.5.0",
            "flags": {},
            "shapes": [
                {
                    "label": job.classes[value - 1],
                    "points": np.round(polygon, 3).tolist(),
                    "group_id": None,
                    "description": "",
                    "shape_type": "polygon",
                    "flags": {},
                    "mask": None,
                }
                for value, polygon in _polygons(job, label)
            ],
            "imagePath": os.path.relpath(item.image_path.resolve(), path.parent.resolve()),
            "imageData": None,
            "imageHeight": label.shape[0],
            "imageWidth": label.shape[1],
        }
        job.write(f"{item.name}.json", json.dumps(annotation, indent=2) + "\n")


def write_yolo(job: Job) -> None:
    """Write images, labels with one polygon a line, its class (from 0) before it, and data.yaml."""
    for item, label in job.masks:
        job.add_image(item, f"images/{item.file_name}")
        size = np.array([label.shape[1], label.shape[0]])
        lines = [
            f"{value - 1} {' '.join(f'{coordinate:.6f}' for coordinate in (polygon / size).ravel())}\n"
            for value, polygon in _polygons(job, label)
        ]
        # As YOLO finds it: the last folder called images gives way to labels, and the suffix to txt.
        place = "/labels/".join(f"/images/{item.file_name}".rsplit("/images/", 1)).removeprefix("/")
        job.write(f"{place.rpartition('.')[0] or place}.txt", "".join(lines))
    names = [f"  {index}: {json.dumps(name, ensure_ascii=False)}" for index, name in enumerate(job.classes)]
    job.write("data.yaml", "\n".join(["train: images", "val: images", "names:", *names]) + "\n")


def _polygons(job: Job, label: NDArray[np.uint8]) -> list[tuple[int, NDArray[np.float64]]]:
    """Mask value and polygon of each region, the largest first: what lies in a hole is painted over it."""
    job.count_ignored(label)
    found = []
    for value in job.present(label):
        outlines = outline(label == value)
        found += [(area, value, ring) for area, ring in zip(outlines.areas, outlines.polygons, strict=True)]
        job.tally.filled_holes += outlines.filled_holes
        job.tally.dropped_regions += outlines.dropped
    found.sort(key=lambda region: -region[0])
    return [(value, ring) for _, value, ring in found]
