"""COCO instances: the categories of each image are its tags. Positions of objects are dropped while the file is read.

`afa.data.coco` makes pixel masks from the same file, for evaluation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from afa.data.readers.base import Contents, TagEntry
from afa.errors import AfaError, shown


class CocoFile(NamedTuple):
    """Contents of a file of instances, with checked references.

    Attributes:
        names: Category id -> name, by ascending id.
        images: Image id -> image; each has a `file_name`.
        annotations: Image id -> its annotations, of the images that have any; each has a `category_id`.
    """

    names: dict[int, str]
    images: dict[int, dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]

    def tags(self, image: int) -> tuple[str, ...]:
        """Names of the categories of an image, by ascending id; crowds count, since the class is there."""
        present = {part["category_id"] for part in self.annotations.get(image, ())}
        return tuple([self.names[category] for category in sorted(present)])


def read(path: Path, content: Any, classes: Sequence[str]) -> Contents:
    """Read the names of the categories by ascending id, whatever gaps the ids have, and those of each image."""
    found = parse(path, content)
    entries = [TagEntry(str(path), image["file_name"], found.tags(number)) for number, image in found.images.items()]
    return tuple(found.names.values()), entries


def parse(path: Path, content: Any) -> CocoFile:
    """Check and sort the parts of a file of instances.

    Raises:
        AfaError: It has no images or no categories; an id is missing, is there twice or is unknown; an image has no
            file name, or a category no name.
    """
    names: dict[int, str] = {}
    images: dict[int, dict[str, Any]] = {}
    annotations: dict[int, list[dict[str, Any]]] = {}
    for part in _parts(content, "categories"):
        number, name = whole_number(part, "id", path), part.get("name")
        if not isinstance(name, str) or not name.strip():
            raise AfaError(f"{path}: category {number} has no name; give each category one")
        if number in names:
            raise AfaError(f"{path}: category id {number} is there twice; give each category its own")
        names[number] = sys.intern(name.strip())
    for part in _parts(content, "images"):
        number = whole_number(part, "id", path)
        if not isinstance(part.get("file_name"), str):
            raise AfaError(f"{path}: image {number} has no file_name; give each image one")
        if number in images:
            raise AfaError(f"{path}: image id {number} is there twice; give each image its own")
        images[number] = part
    if not images or not names:
        raise AfaError(f"{path}: no {'images' if not images else 'categories'}; give a COCO instances file")
    for part in _parts(content, "annotations"):
        number, category = whole_number(part, "image_id", path), whole_number(part, "category_id", path)
        if number not in images:
            raise AfaError(f"{path}: an annotation is of image id {number}, which is not in images; add the image")
        if category not in names:
            raise AfaError(f"{path}: an annotation has category id {category}, which is not in categories; add it")
        annotations.setdefault(number, []).append(part)
    return CocoFile(dict(sorted(names.items())), images, annotations)


def whole_number(part: Any, key: str, path: Path) -> int:
    """The whole number that an image, annotation or category has under `key`.

    Raises:
        AfaError: There is none.
    """
    number = part.get(key) if isinstance(part, dict) else None
    if not isinstance(number, int) or isinstance(number, bool) or abs(number) > 2**63:
        raise AfaError(f"{path}: {shown(part)} has no whole number as {key}; give a COCO instances file")
    return number


def _parts(content: Any, key: str) -> list[Any]:
    value = content.get(key, []) if isinstance(content, dict) else []
    return value if isinstance(value, list) else [value]
