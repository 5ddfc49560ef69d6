"""Folders of classes: one for each class, perhaps below folders for the sides of a split."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from afa.config import DataConfig
from afa.data.classes import NO_TAG, check_classes, folded, stated_classes
from afa.data.dataset import TagTable
from afa.data.files import check_paths, image_folder, images_below
from afa.data.readers.base import tag_rows
from afa.data.readers.places import unread
from afa.data.readers.tag_files import nothing_names
from afa.data.split import SIDES, UNSTATED
from afa.errors import AfaError, shown

_NO_CLASS: Final = (
    r"(train|training|val|valid|validation|dev|test|testing)[-_]?\d*|images?|imgs?|jpe?gimages|photos?|pictures?|frames|"
    r"data|dataset|labels?|annotations?|tags|raw|masks?|output"
)
"""Names of folders that hold other things than a class more often than not."""


def read(root: Path, data: DataConfig) -> TagTable | None:
    """Read the class of each image from the name of its folder.

    Returns:
        A row for each image in the folder of a class; None where there are none.

    Raises:
        AfaError: A folder is none of the classes that are stated; the names of classes or images are no good.
    """
    folder = image_folder(root, data, at_root=True)
    images = images_below(folder, root, data)
    every_path, entered = list(images.paths), list(images.passed)
    first = {path.partition("/")[0] for path in every_path if "/" in path}
    if folder == root and first and first <= {"images", data.image_dir}:
        inside = f"{min(first)}/"
        folder = root / inside
        every_path, entered = (
            [path.removeprefix(inside) for path in paths if path.startswith(inside)] for paths in (every_path, entered)
        )
        first = {path.partition("/")[0] for path in every_path if "/" in path}
    # A class may be named train: folders are the sides of a split only when all are named so and hold folders.
    has_sides = bool(first) and all(name.lower() in SIDES for name in first)
    place = int(has_sides and any(path.count("/") >= 2 for path in every_path))
    split = [(path, parts) for path in every_path if len(parts := path.split("/")) > place + 1]
    if not split:
        return None
    seen = {tuple(parts[: place + 1]) for _, parts in split}
    empty = [path for path in entered if path and path.count("/") == place and tuple(path.split("/")) not in seen]
    listed = stated_classes(data, root)
    nothing = nothing_names(data.negatives, listed.names)
    tags = [() if folded(parts[place]) in nothing else (parts[place],) for _, parts in split]
    met = tuple(sorted({name for names in tags for name in names}))
    if listed.names and (unknown := [name for name in met if name not in listed.names]):
        raise AfaError(
            f"{folder}: the folder {shown(unknown[0])} is none of the classes; name it as one of "
            f"{', '.join(listed.names)}, or add the class"
        )
    if not listed.names:
        check_classes(met, str(folder), none=NO_TAG)
    classes = listed.names or met
    paths = tuple([path for path, _ in split])
    return TagTable(
        kind="imagefolder",
        origin="folders of classes",
        classes=classes,
        tags=tag_rows(tags, classes),
        sides=np.array([SIDES[parts[0].lower()] if place else UNSTATED for _, parts in split], dtype=np.int8),
        folder=folder,
        paths=paths,
        names=check_paths(paths, folder),
        colors=listed.colors,
        words=listed.words,
        declared=bool(listed.names),
        every_path=tuple(every_path),
        remarks=(*images.passed_over, *(f"no image in the folder {shown(path)}" for path in empty)),
        notes=tuple(_doubts(root, met)),
    )


def _doubts(root: Path, met: Sequence[str]) -> Iterator[str]:
    """What else the folders may be, as far as their names tell."""
    usual = [name for name in met if re.fullmatch(_NO_CLASS, name, re.I)]
    if usual or unread(root):
        names = f"({', '.join(met[:4])})" if not usual else f"of which one is named {shown(usual[0])}"
        yield (
            f"{root}: taken for folders of classes {names}, and could also be images whose tags are elsewhere"
            f"{unread(root)}; if so, set data.tags"
        )
