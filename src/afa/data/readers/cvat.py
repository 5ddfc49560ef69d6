"""CVAT for images 1.1: tags of images, and labels of shapes; the points of the shapes are dropped."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afa.data.readers.base import TagEntry
from afa.errors import AfaError, shown


def read(path: Path, content: Any, classes: Sequence[str]) -> tuple[tuple[str, ...], list[TagEntry]]:
    """Read the tags of each image.

    Arguments as of `Reader.read`.

    Returns:
        The labels of the project in its order, none where the file does not say; and an entry for each image.

    Raises:
        AfaError: The file is no such XML, or has a document type.
    """
    target = _CvatTarget(path)
    parser = ET.XMLParser(target=target)
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                parser.feed(chunk)
        parser.close()
    except AfaError:
        raise
    except (ET.ParseError, ValueError, LookupError) as error:
        raise AfaError(f"{path}: not an XML file ({error}); export from CVAT as CVAT for images 1.1") from None
    except OSError as error:
        raise AfaError(f"{path}: cannot be read ({error.strerror})") from None
    return tuple(dict.fromkeys(target.labels)), target.entries


class _CvatTarget:
    """Collects the labels of a CVAT export while the XML is read; keeps nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.labels: list[str] = []
        self.entries: list[TagEntry] = []
        self._open: list[str] = []
        self._text = ""
        self._image: dict[str, str] | None = None
        self._tags: list[str] = []

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise AfaError(f"{self.path}: has a document type ({name}); remove the DOCTYPE")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if not self._open and tag != "annotations":
            raise AfaError(f"{self.path}: is <{shown(tag)[1:-1]}>, not <annotations>; export CVAT for images 1.1")
        self._open.append(tag)
        self._text = ""
        if self._open == ["annotations", "image"]:
            self._image, self._tags = attributes, []
        elif self._image is not None and len(self._open) == 3 and attributes.get("label", "").strip():
            self._tags.append(sys.intern(attributes["label"].strip()))

    def data(self, text: str) -> None:
        if self._open and self._open[-1] == "name":
            self._text += text

    def end(self, tag: str) -> None:
        if self._open[-3:] == ["labels", "label", "name"] and self._text.strip():
            self.labels.append(sys.intern(self._text.strip()))
        self._open.pop()
        if self._image is not None and len(self._open) == 1:
            name = self._image.get("name", "").strip()
            if not name:
                raise AfaError(f"{self.path}: image {len(self.entries) + 1} has no name; export from CVAT anew")
            tags = tuple(dict.fromkeys(self._tags))
            self.entries.append(TagEntry(f"{self.path}, image {len(self.entries) + 1}", name, tags,
                                         self._image.get("subset", "")))  # fmt: skip
            self._image = None

    def close(self) -> None:
        pass
