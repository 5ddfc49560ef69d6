"""Formats that keep masks as PNGs: PASCAL VOC, CVAT's archive, MMSegmentation's folders, and Hugging Face datasets."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile

import numpy as np

from afa.data.palette import index_png
from afa.errors import AfaError
from afa.formats.job import Job
from afa.types import IGNORE_INDEX


def write_voc(job: Job) -> None:
    """Write the folders of PASCAL VOC, which afa reads too, and labelmap.txt with the colors."""
    _check_labelmap(job.classes)
    has_ignored = False
    with job.place("ImageSets/Segmentation/default.txt").open("w", encoding="utf-8") as names:
        for item, label in job.masks:
            has_ignored |= bool((label == IGNORE_INDEX).any())
            job.add_image(item, f"JPEGImages/{item.file_name}")
            job.write(f"SegmentationClass/{item.name}.png", index_png(label, job.palette))
            names.write(f"{item.name}\n")
    # Readers by color refuse colors without a line; ignored pixels become a class of their own.
    job.write("labelmap.txt", _labelmap(job) + (_labelmap_line(job, "ignored", IGNORE_INDEX) if has_ignored else ""))
    job.write("classes.txt", "".join(f"{name}\n" for name in job.classes))


def write_cvat(job: Job) -> None:
    """Write an archive for CVAT's "Segmentation mask 1.1"; ignored pixels become background, as CVAT refuses 255.

    Class and object masks are the same: one object for each class in an image.
    """
    _check_labelmap(job.classes)
    with (
        zipfile.ZipFile(job.partial, "w") as archive,
        tempfile.TemporaryFile(dir=job.partial.parent) as names,
    ):
        archive.writestr(_entry("labelmap.txt"), _labelmap(job))
        for item, label in job.masks:
            job.count_ignored(label)
            encoded = index_png(np.where(label == IGNORE_INDEX, np.uint8(0), label), job.palette)
            for folder in ("SegmentationClass", "SegmentationObject"):
                archive.writestr(_entry(f"{folder}/{item.name}.png"), encoded)
            names.write(f"{item.name}\n".encode())
        names.seek(0)
        with archive.open(_entry("ImageSets/Segmentation/default.txt"), "w") as listing:
            shutil.copyfileobj(names, listing)


def write_mmseg(job: Job) -> None:
    """Write img_dir, ann_dir, and dataset.py, a piece of configuration for MMSegmentation.

    MMSegmentation looks for one image suffix at a time: there is one data set for each that occurs.
    """
    suffixes: set[str] = set()
    for item, label in job.masks:
        job.add_image(item, f"img_dir/{item.file_name}")
        job.write(f"ann_dir/{item.name}.png", index_png(label, job.palette))
        suffixes.add(item.file_name.removeprefix(item.name))
    palette = [list(job.color(value)) for value in range(1 + len(job.classes))]
    lines = [
        "# Mask values: 0 background, then the classes; 255 is ignored. Add data_root: the path of this folder.",
        f"metainfo = dict(classes={('background', *job.classes)!r}, palette={palette!r})",
        "datasets = [",
        *(
            "    dict(type='BaseSegDataset', data_prefix=dict(img_path='img_dir', seg_map_path='ann_dir'), "
            f"metainfo=metainfo, reduce_zero_label=False, ignore_index=255, img_suffix={suffix!r}, "
            "seg_map_suffix='.png'),"
            for suffix in sorted(suffixes)
        ),
        "]",
    ]
    job.write("dataset.py", "\n".join(lines) + "\n")


def write_hf(job: Job) -> None:
    """Write images, masks and metadata.jsonl, which `datasets.load_dataset("imagefolder", data_dir=...)` reads.

    Files are numbered, as that reader takes words such as "test" in paths for splits; `name` tells the image's.
    """
    with job.place("metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for number, (item, label) in enumerate(job.masks):
            image = f"images/{number:07d}{item.file_name.removeprefix(item.name).lower()}"
            mask = f"masks/{number:07d}.png"
            job.add_image(item, image)
            job.write(mask, index_png(label, job.palette))
            row = {
                "file_name": image,
                "mask_file_name": mask,
                "name": item.name,
                "classes": [job.classes[value - 1] for value in job.present(label)],
            }
            metadata.write(json.dumps(row) + "\n")
    job.write("classes.txt", "".join(f"{name}\n" for name in ("background", *job.classes)))


def _check_labelmap(classes: tuple[str, ...]) -> None:
    for name in classes:
        if ":" in name or name.startswith("#"):
            raise AfaError(f"class {name!r} cannot stand in labelmap.txt; rename it without ':' and leading '#'")


def _labelmap(job: Job) -> str:
    """The colors of the classes, in the order of their mask values."""
    lines = [_labelmap_line(job, name, value) for value, name in enumerate(("background", *job.classes))]
    return "".join(["# label:color_rgb:parts:actions\n", *lines])


def _labelmap_line(job: Job, name: str, value: int) -> str:
    return f"{name}:{','.join(map(str, job.color(value)))}::\n"


def _entry(name: str) -> zipfile.ZipInfo:
    """An entry of fixed date, so that the same masks give the same archive; PNGs are compressed already."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.external_attr = 0o644 << 16
    return entry
