"""COCO instances: the categories of each image are its tags. Positions of objects are dropped while the file is read.

`afa.data.coco` makes pixel masks from the same file, for evaluation.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from afa.data.readers.base import Contents, TagEntry
from afa.errors import AfaError, shown

_MAX_ID: Final = 2**63


Id = int | str
"""Id of an image or a category; whole numbers that are written as texts or with a point are numbers."""


class CocoFile(NamedTuple):
    """Contents of a file of instances, with checked references.

    Attributes:
        names: Category id -> name, by ascending id.
        images: Image id -> image; each has a `file_name`.
        annotations: Image id -> its annotations, of the images that have any; each has a `category_id`.
        parents: Names of categories that are the parents of others.
    """

    names: dict[Id, str]
    images: dict[Id, dict[str, Any]]
    annotations: dict[Id, list[dict[str, Any]]]
    parents: frozenset[str]

    def tags(self, image: Id) -> tuple[str, ...]:
        """Names of the categories of an image, by ascending id; crowds count, since the class is there."""
        present = {part["category_id"] for part in self.annotations.get(image, ())}
        return tuple([self.names[category] for category in sorted(present, key=id_order)])


def read(path: Path, content: Any, classes: Sequence[str]) -> Contents:
    """Read the names of the categories by ascending id, whatever gaps the ids have, and those of each image.

    A category that no object has, and that is the parent of others, is no class.
    """
    found = parse(path, content)
    entries = [TagEntry(str(path), image["file_name"], found.tags(number)) for number, image in found.images.items()]
    names = tuple(found.names.values())
    if not found.parents or classes:
        return Contents(names, entries)
    used = {tag for entry in entries for tag in entry.tags}
    empty = [name for name in names if name in found.parents and name not in used]
    notes = (
        f"{path}: category {shown(name)} is only the parent of others, and no object has it, so it is no class; to "
        "keep it, list the classes in classes.txt"
        for name in empty
    )
    return Contents(tuple(name for name in names if name not in empty), entries, tuple(notes))


def parse(path: Path, content: Any) -> CocoFile:
    """Check and sort the parts of a file of instances.

    Raises:
        AfaError: It has no images or no categories; an id is missing, is there twice or is unknown; an image has no
            file name, or a category no name.
    """
    names: dict[Id, str] = {}
    images: dict[Id, dict[str, Any]] = {}
    annotations: dict[Id, list[dict[str, Any]]] = {}
    parents: dict[str, set[str]] = {}
    for part in _parts(content, "categories"):
        number, name = _id(part, "id", path), part.get("name")
        if not isinstance(name, str) or not name.strip():
            raise AfaError(f"{path}: category {shown(number)} has no name; give each category one")
        if number in names:
            raise AfaError(f"{path}: category id {shown(number)} is there twice; give each category its own")
        names[number] = sys.intern(name.strip())
        parents.setdefault(str(part.get("supercategory")).strip(), set()).add(names[number])
    for part in _parts(content, "images"):
        number = _id(part, "id", path)
        if not isinstance(part.get("file_name"), str):
            raise AfaError(f"{path}: image {shown(number)} has no file_name; give each image one")
        if number in images:
            raise AfaError(f"{path}: image id {shown(number)} is there twice; give each image its own")
        images[number] = part
    if not images or not names:
        raise AfaError(f"{path}: no {'images' if not images else 'categories'}; give a COCO instances file")
    for part in _parts(content, "annotations"):
        number, category = _id(part, "image_id", path), _id(part, "category_id", path)
        if number not in images:
            raise AfaError(
                f"{path}: an annotation is of image id {shown(number)}, which is not in images; add the image"
            )
        if category not in names:
            raise AfaError(
                f"{path}: an annotation has category id {shown(category)}, which is not in categories; add it"
            )
        part["category_id"] = category
        annotations.setdefault(number, []).append(part)
    above = frozenset(name for name in names.values() if parents.get(name, set()) - {name})
    return CocoFile(dict(sorted(names.items(), key=lambda item: id_order(item[0]))), images, annotations, above)


def id_order(number: Id) -> tuple[bool, int, str]:
    """What ids are sorted by: numbers first."""
    return (True, 0, number) if isinstance(number, str) else (False, number, "")


def _id(part: Any, key: str, path: Path) -> Id:
    number = part.get(key) if isinstance(part, dict) else None
    if type(number) is int and abs(number) <= _MAX_ID:
        return number
    if isinstance(number, float) and number.is_integer() and abs(number) <= _MAX_ID:
        return int(number)
    if isinstance(number, str) and number:
        # Zeros in front are part of the id.
        return int(number) if re.fullmatch(r"0|[1-9][0-9]{0,18}", number) else number
    raise AfaError(f"{path}: {shown(part)} has no number or text as {key}; give a COCO instances file")


def _parts(content: Any, key: str) -> list[Any]:
    value = content.get(key, []) if isinstance(content, dict) else []
    return value if isinstance(value, list) else [value]
