"""CVAT for images 1.1: tags of images, and labels of shapes; the points of the shapes are dropped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afa.data.readers.base import Contents, TagEntry, load_xml
from afa.errors import AfaError, shown

_REMEDY = "export from CVAT as CVAT for images 1.1"


def read(path: Path, content: Any, classes: Sequence[str]) -> Contents:
    """Read the labels of the project, none where the file does not list them; and an entry for each image."""
    root = load_xml(path, "an XML file", _REMEDY)
    if root.tag != "annotations":
        raise AfaError(f"{path}: is <{shown(root.tag)[1:-1]}>, not <annotations>; {_REMEDY}")
    labels = [(name.text or "").strip() for name in root.iterfind(".//labels/label/name")]
    entries = []
    for number, image in enumerate(root.iterfind("image"), start=1):
        name = image.get("name", "").strip()
        if not name:
            raise AfaError(f"{path}: image {number} has no name; export from CVAT anew")
        tags = dict.fromkeys(sys.intern(part.get("label", "").strip()) for part in image)
        tags.pop("", None)
        entries.append(TagEntry(f"{path}, image {number}", name, tuple(tags), image.get("subset", "")))
    if not entries and root.find("track") is not None:
        raise AfaError(f"{path}: has tracks of a video, which are not read; {_REMEDY}")
    return Contents(tuple(dict.fromkeys(filter(None, labels))), entries)
