"""A folder of VOC annotations, one XML file an image: the name of each object is a tag."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afa.data.readers.base import Contents, TagEntry, load_xml
from afa.errors import AfaError


def read(path: Path, content: Any, classes: Sequence[str]) -> Contents:
    """Read the names of the objects of each annotation: no class names, and an entry for each file."""
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".xml" and file.name[0] != ".")
    if not files:
        raise AfaError(f"{path}: no .xml file in this folder; set data.tags to the folder of the VOC annotations")
    entries = []
    for file in files:
        root = load_xml(file, "a VOC annotation", "replace the file")
        # Parts of an object (head, hand) have names as well, deeper down: only direct children count.
        names = [(item.findtext("name") or "").strip() for item in root.findall("object")]
        entries.append(TagEntry(str(file), file.stem, tuple(names)))
    return Contents((), entries)
