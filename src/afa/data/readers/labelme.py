"""LabelMe: a JSON file for each image; the labels of its shapes and its flags are tags. Points are dropped."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

from afa.data.files import files_in, is_mask_folder, plain_path, subfolders, walk_files
from afa.data.readers.base import Contents, TagEntry, load_json
from afa.data.split import SIDES
from afa.errors import AfaError

_PLACES: Final = frozenset(("labels", "labelme", "annotations", "json", "jsons"))
_NO_CLASSES: Final = ("", "__ignore__", "_background_")


def fits(path: Path) -> bool:
    """Whether the start of a JSON file is that of LabelMe's."""
    with path.open("rb") as file:
        return b'"shapes"' in file.read(65536)


def find(root: Path) -> Path | None:
    """The folder, if it or one in it has a file of LabelMe."""
    places = (root, *subfolders(root, {"images", "jpegimages", *SIDES}), *subfolders(root, _PLACES))
    found = (files_in(folder, ".json", deep=folder.name.lower() in _PLACES and folder != root) for folder in places)
    return root if any(fits(first) for files in found for first in islice(files, 1)) else None


def read(path: Path, content: Any, classes: Sequence[str]) -> Contents:
    """Read the files of a folder, or one: no class names, and an entry for each; other JSON files are counted."""
    root = path if path.is_dir() else path.parent
    below = walk_files(root, {".json"}, skip=is_mask_folder)
    entries, others = [], []
    for name in below if path.is_dir() else [path.name]:
        file = root / name
        found = load_json(file, _drop_points)
        if not isinstance(found, dict) or not isinstance(found.get("shapes"), list):
            others.append(name)
            continue
        image = found.get("imagePath")
        image = image if isinstance(image, str) and image else f"{file.stem}.jpg"
        if not plain_path(image)[1] or image.startswith(".."):  # as LabelMe means it: seen from the file
            image = f"{name.rpartition('/')[0]}/{image}".removeprefix("/")
        entries.append(TagEntry(str(file), image, tuple(dict.fromkeys(_tags(found)))))
    if not entries:
        raise AfaError(f"{path}: no file of LabelMe, which has shapes and imagePath; set data.tags")
    note = f"{path}: {len(others):,} JSON files are none of LabelMe and left out ({others[:1]})"
    return Contents((), entries, (note,) if others else ())


def _drop_points(part: dict[str, Any]) -> None:
    for key in ("points", "mask", "imageData"):
        part.pop(key, None)


def _tags(found: dict[str, Any]) -> Iterator[str]:
    labels = [shape.get("label") for shape in found["shapes"] if isinstance(shape, dict)]
    flags = found.get("flags")
    chosen = [name for name, value in flags.items() if value is True] if isinstance(flags, dict) else []
    for label in (*labels, *chosen):
        text = str(label).strip() if isinstance(label, (str, int)) else ""
        if text not in _NO_CLASSES:
            yield sys.intern(text)
