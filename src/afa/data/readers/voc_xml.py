"""A folder of VOC annotations, one XML file an image: the name of each object is a tag."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afa.data.readers.base import TagEntry
from afa.errors import AfaError


class _TagTree(ET.TreeBuilder):
    """An element tree that refuses document types, and with them entities that expand without end."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise AfaError(f"has a document type ({name}); remove the DOCTYPE")


def read(path: Path, content: Any, classes: Sequence[str]) -> tuple[tuple[str, ...], list[TagEntry]]:
    """Read the names of the objects of each annotation.

    Arguments as of `Reader.read`.

    Returns:
        No class names, and an entry for each file.

    Raises:
        AfaError: There is no XML; a file is no XML, or has a document type.
    """
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".xml" and file.name[0] != ".")
    if not files:
        raise AfaError(f"{path}: no .xml file in this folder; set data.tags to the folder of the VOC annotations")
    entries = []
    for file in files:
        try:
            root = ET.parse(file, parser=ET.XMLParser(target=_TagTree())).getroot()
        except AfaError as error:
            raise AfaError(f"{file}: {error}") from None
        except (ET.ParseError, OSError, ValueError, LookupError) as error:
            raise AfaError(f"{file}: not a VOC annotation ({error}); replace the file") from None
        # Parts of an object (head, hand) have names as well, deeper down: only direct children count.
        names = [(item.findtext("name") or "").strip() for item in root.findall("object")]
        entries.append(TagEntry(str(file), file.stem, tuple(names)))
    return (), entries
