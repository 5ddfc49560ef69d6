"""Small data sets, one of each layout: for tests of what is found in them, and of what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from afa.data.palette import write_index_png

CLASSES = ("bird", "cat", "dog")


def touch(root: Path, *paths: str) -> None:
    """Small real images."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), "red").save(root / path, format="PNG")


def write(root: Path, path: str, content: Any) -> Path:
    """A text as it is, or anything else as JSON."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / path).write_text(text, encoding="utf-8", newline="")
    return root / path


COCO: dict[str, Any] = {
    "images": [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("abcd")],
    "annotations": [{"image_id": i, "category_id": c} for i, c in ((0, 5), (1, 9), (2, 9), (2, 5))],
    "categories": [{"id": 9, "name": "dog"}, {"id": 5, "name": "cat"}],
}
EXPECTED = {"a": ("cat",), "b": ("dog",), "c": ("cat", "dog")}
JSONL = "\n".join(json.dumps({"file_name": f"{name}.jpg", "labels": tags}) for name, tags in EXPECTED.items())
LABEL_STUDIO = [
    {"id": 1, "data": {"image": f"/data/upload/1/01234567-{n}.jpg"}, "annotations": [{"result": [
        {"value": {"choices": list(tags)}}]}]} for n, tags in EXPECTED.items()
]  # fmt: skip
CVAT = "".join(
    f'<image name="{n}.jpg">{"".join(f"<tag label={t!r}/>" for t in tags)}</image>' for n, tags in EXPECTED.items()
)
TAG_FILES: list[tuple[str, str, Any]] = [
    ("table", "tags.csv", "file,tags\na.jpg,cat\nb.jpg,dog\nc.jpg,cat dog\n"),
    ("table", "labels.tsv", "image\tlabel\na\tcat\nb\tdog\nc\tcat\nc\tdog\n"),
    ("table", "lists/tags.csv", "file,cat,dog\nimages/a.jpg,1,0\nimages/b.jpg,0,1\nimages/c.jpg,1,1\n"),
    ("table", "tags.json", {f"{name}.jpg": tags for name, tags in EXPECTED.items()}),
    ("table", "my notes.json", [{"file": f"{name}.JPG", "tags": tags} for name, tags in EXPECTED.items()]),
    ("table", "tags.jsonl", JSONL),
    ("hf", "metadata.jsonl", JSONL),
    ("hf", "metadata.csv", "file_name,tags\nimages/a.jpg,cat\nimages/b.jpg,dog\nimages/c.jpg,cat dog\n"),
    ("coco", "annotations/instances_all.json", COCO),
    ("coco", "_annotations.coco.json", COCO),
    ("labelstudio", "project-1-at-2026-01-01.json", LABEL_STUDIO),
    ("cvat", "annotations.xml", f"<annotations>{CVAT}</annotations>"),
]
"""Layout, place and content of files that state the tags `EXPECTED` of a.jpg to d.jpg in `images`."""


def tag_file(root: Path, place: str, content: Any) -> None:
    """Four images, three of which the file gives tags."""
    touch(root, *(f"images/{name}.jpg" for name in "abcd"))
    write(root, place, content)


def class_folders(root: Path, prefix: str = "") -> None:
    touch(root, *(f"{prefix}{tag}/{i}.png" for tag in CLASSES for i in range(10)))


def table(root: Path, num_images: int = 30) -> Path:
    """Images in a folder and a table of their tags."""
    touch(root, *(f"images/{i:02d}.png" for i in range(num_images)))
    rows = [f"{i:02d}.png,{CLASSES[i % 3]}" for i in range(num_images)]
    write(root, "tags.csv", "\n".join(["file,tags", *rows]))
    return root


def with_masks(root: Path, folder: str = "masks") -> Path:
    table(root)
    for i in range(30):
        write_index_png(root / folder / f"{i:02d}.png", np.array([[0, 1, 2, 3, 255, 0]] * 4, dtype=np.uint8))
    return root


def voc(root: Path) -> None:
    """The layout of PASCAL VOC with lists, and a table of tags beside."""
    with_masks(root, "SegmentationClassAug")
    (root / "images").rename(root / "JPEGImages")
    write(root, "classes.txt", "\n".join(CLASSES))
    write(root, "tags.csv", (root / "tags.csv").read_text().replace("file,", "image,"))
    write(root, "lists/train.txt", "00\n01\n02\n")
    write(root, "lists/val.txt", "03\n")


def voc_xml(root: Path) -> None:
    touch(root, "JPEGImages/a.jpg", "JPEGImages/b.jpg")
    for name, tag in (("a", "cat"), ("b", "dog")):
        write(root, f"Annotations/{name}.xml", f"<annotation><object><name>{tag}</name></object></annotation>")


def voc_one_hot(root: Path) -> None:
    """The historical file of vectors, with lists."""
    voc(root)
    (root / "tags.csv").unlink()
    vectors = {f"{i:02d}": np.eye(3)[i % 3] for i in range(30)}
    np.save(root / "lists" / "cls_labels_onehot.npy", vectors)  # type: ignore[arg-type]


def one_hot(root: Path) -> None:
    """The same without lists."""
    touch(root, "images/a.jpg", "images/b.jpg")
    np.save(root / "cls_labels_onehot.npy", {"a": np.array([1, 0]), "b": np.array([1, 1])})  # type: ignore[arg-type]
    write(root, "classes.txt", "dog #ff8000\ncat\n")


def class_folders_of_sides(root: Path) -> None:
    for side in ("train", "Valid", "test"):
        class_folders(root, f"{side}/")


def metadata_sides(root: Path) -> None:
    for side in ("train", "validation"):
        touch(root, f"{side}/a.jpg", f"{side}/b.jpg")
        rows = '{"file_name":"a.jpg","label":"cat"}\n{"file_name":"b.jpg","tags":[]}'
        write(root, f"{side}/metadata.jsonl", rows)


def coco_sides(root: Path) -> None:
    """One file of instances for each side, beside files that are none."""
    for side in ("train", "val"):
        touch(root, *(f"images/{side}/{i}.jpg" for i in range(3)))
        coco = {
            "images": [{"id": i, "file_name": f"{side}/{i}.jpg"} for i in range(3)],
            "annotations": [{"image_id": i, "category_id": 4} for i in range(3)],
            "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}],
        }
        write(root, f"annotations/instances_{side}2014.json", coco)
        write(root, f"annotations/captions_{side}2014.json", {})


LAYOUTS: dict[str, Callable[[Path], Any]] = {
    "voc": voc,
    "voc xml": voc_xml,
    "voc one-hot": voc_one_hot,
    "one-hot": one_hot,
    "table": table,
    "table with masks": with_masks,
    "imagefolder": class_folders,
    "imagefolder in images": lambda root: class_folders(root, "images/"),
    "imagefolder with sides": class_folders_of_sides,
    "hf with sides": metadata_sides,
    "coco with sides": coco_sides,
    **{
        f"{kind}: {place}": lambda root, place=place, content=content: tag_file(root, place, content)
        for kind, place, content in TAG_FILES
    },
}
"""What writes a data set of each layout into an empty folder."""
