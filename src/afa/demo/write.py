"""A data set of generated images, written as an ordinary VOC-style folder.

Each image depends on the seed, its split and its index alone, so the data set is the same whichever process draws it
and in whichever order. What reads the folder does not know that it was generated.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from afa.data.palette import write_index_png
from afa.demo.shapes import DEFAULT_STYLE, SHAPE_CLASSES, Scene, ShapesStyle, draw_shapes
from afa.errors import AfaError
from afa.runtime import image_progress

MARKER_NAME: Final = "shapes.json"
"""File in the data set's folder that holds the parameters it was made with."""

_FORMAT: Final = 1  # raise it when the same parameters give other images
_JPEG_QUALITY: Final = 95
_LEAST: Final = {"num_train": 1, "num_val": 1, "image_size": 32, "seed": 0}


def write_shapes(
    root: Path,
    *,
    num_train: int,
    num_val: int,
    image_size: int = 128,
    seed: int = 0,
    classes: Sequence[str] = SHAPE_CLASSES,
    style: ShapesStyle = DEFAULT_STYLE,
) -> None:
    """Write a generated data set, or keep the one that is there if it was made with the same parameters.

    The folder holds JPEGImages/ID.jpg, SegmentationClassAug/ID.png (class indices in the VOC palette, without
    ignored pixels), lists/train.txt, lists/val.txt, lists/tags.csv, classes.txt and shapes.json, the
    parameters. It appears only when it is complete. Equal parameters give equal files, byte for byte.

    Args:
        root: Folder to write; must be absent, empty, or hold a data set written with the same parameters.
        num_train: Training images, named train_00000 and on.
        num_val: Held-out images, named val_00000 and on.
        image_size: Pixels of both sides, at least 32.
        seed: Start of the random numbers, at least 0.
        classes: Names out of `SHAPE_CLASSES`, each once; their order is that of the mask values.
        style: How hard the images are.

    Raises:
        AfaError: A parameter is out of its range, the folder holds other files or another data
            set, or it cannot be written.
    """
    numbers = {"num_train": num_train, "num_val": num_val, "image_size": image_size, "seed": seed}
    for key, value in numbers.items():
        if value < _LEAST[key]:
            raise AfaError(f"{key} of the generated data set is {value}: it must be at least {_LEAST[key]}")
    if not classes or len(set(classes)) < len(classes) or not set(classes) <= set(SHAPE_CLASSES):
        raise AfaError(
            f"classes of the generated data set are {list(classes)}: choose from {', '.join(SHAPE_CLASSES)}, each once"
        )
    parameters = {"format": _FORMAT, **numbers, "classes": list(classes), "style": dataclasses.asdict(style)}
    marker = json.dumps(parameters, indent=1) + "\n"
    if _is_written(root, marker):
        return

    def draw(split: int, index: int) -> Scene:
        return draw_shapes(np.random.default_rng([seed, split, index]), image_size, classes=classes, style=style)

    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
            unfinished = Path(folder) / "data"
            _write_files(unfinished, {"train": num_train, "val": num_val}, classes, draw)
            (unfinished / MARKER_NAME).write_text(marker, encoding="utf-8")
            if root.exists():
                root.rmdir()
            unfinished.rename(root)
    except OSError as error:
        if not _is_written(root, marker):  # else another process was faster
            raise AfaError(f"{root}: cannot be written ({error}); free space or choose another folder") from None


def _write_files(root: Path, counts: dict[str, int], classes: Sequence[str], draw: Callable[[int, int], Scene]) -> None:
    """Write all files but the marker."""
    for name in ("JPEGImages", "SegmentationClassAug", "lists"):
        (root / name).mkdir(parents=True)
    tags = {}
    jobs = [(split, i) for split, count in enumerate(counts.values()) for i in range(count)]
    with image_progress("generating", total=len(jobs)) as advance:
        for split, i in jobs:
            name = f"{list(counts)[split]}_{i:05d}"
            scene = draw(split, i)
            image_path = root / "JPEGImages" / f"{name}.jpg"
            Image.fromarray(scene.image).save(image_path, quality=_JPEG_QUALITY, subsampling="4:4:4")
            write_index_png(root / "SegmentationClassAug" / f"{name}.png", scene.mask)
            tags[name] = " ".join(c for c in classes if c in scene.visible)
            advance(1)
    files = {
        "classes.txt": classes,
        "lists/tags.csv": ["image,tags", *(f"{name},{text}" for name, text in tags.items())],
        **{f"lists/{split}.txt": [name for name in tags if name.startswith(f"{split}_")] for split in counts},
    }
    for path, lines in files.items():
        (root / path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _is_written(root: Path, marker: str) -> bool:
    """Tell whether the folder holds the data set; refuse one that holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    path = root / MARKER_NAME
    if not path.is_file():
        raise AfaError(f"{root} exists and holds no generated data set: choose another folder for it")
    if path.read_text(encoding="utf-8") != marker:
        raise AfaError(f"{path}: this data set has other parameters: remove {root} or choose another folder")
    return True
