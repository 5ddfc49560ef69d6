"""Code that readers of files of tags share: the entry of an image, JSON and XML.

A reader is a function `read(path, content, classes)`: the file; its JSON if it is JSON; the class names if they are
known. It raises AfaError, of one line, where the file cannot be read or is malformed.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from afa.data.dataset import ABSENT, PRESENT, UNKNOWN
from afa.data.encoding import open_text
from afa.errors import AfaError, shown

_OUTLINES: Final = ("segmentation", "bbox", "rle", "points")


class TagEntry(NamedTuple):
    """Entry of one image in a file of tags.

    Attributes:
        where: File and line, for messages.
        image: The image as the file writes it.
        tags: Its tags as the file writes them.
        split: Where it belongs, as the file writes it; empty where it does not say.
        unknown: Classes of which the file says that it does not know them; None where it knows the tags at most. An
            image without tags and unknown classes holds none of the classes.
    """

    where: str
    image: str
    tags: tuple[str, ...]
    split: str = ""
    unknown: tuple[str, ...] | None = ()


class Contents(NamedTuple):
    """What a reader returns.

    Attributes:
        classes: The class names that the file declares, in its order; none where it declares none.
        entries: An entry for each image.
        notes: What users should know of how the file was understood, one line each.
    """

    classes: tuple[str, ...]
    entries: list[TagEntry]
    notes: tuple[str, ...] = ()


def load_json(path: Path, shrink: Callable[[dict[str, Any]], object]) -> Any:
    """Read a JSON file in UTF-8, or another encoding that its first bytes state, into a list or a dictionary.

    `shrink` removes from each object, while it is read, what is not needed: outlines, which are most of the file.

    Raises:
        AfaError: The file cannot be read, is not JSON in UTF-8, has another outermost value, or a key twice.
    """

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise AfaError(f"{path}: {shown(twice)} is there a second time; keep one entry of it")
        shrink(found)
        return found

    try:
        with open_text(path) as file:
            content = json.load(file, object_pairs_hook=to_dict)
    except AfaError:
        raise
    except UnicodeDecodeError as error:
        raise AfaError(f"{path}: not a text file in UTF-8 ({error.reason}); save it as JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise AfaError(f"{path}: not valid JSON near character {error.pos}: {error.msg}; save it anew") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deeply nested lists
        raise AfaError(f"{path}: not valid JSON: cannot be decoded ({error}); save it anew") from None
    except OSError as error:
        raise AfaError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(content, (list, dict)):
        raise AfaError(f"{path}: not valid JSON of tags: is neither a list nor an object; write one of them")
    return content


def drop_outlines(part: dict[str, Any]) -> None:
    """Remove from an annotation of COCO or Label Studio where the object is."""
    if "category_id" in part and isinstance(part.get("image_id"), (int, float, str)):
        kept = {"image_id": part["image_id"], "category_id": part["category_id"]}
        part.clear()  # which frees its memory, as taking out single keys does not
        part.update(kept)
    elif any(key.endswith("labels") for key in part):
        for key in _OUTLINES:
            if isinstance(part.get(key), (list, dict)):
                del part[key]


def elements(content: Any) -> Iterator[tuple[str, Any]]:
    """The parts of JSON: of a list the key "" and each element, of an object each key and value.

    A value that is a list of objects comes as its elements one by one, each with that key.
    """
    if isinstance(content, list):
        yield from (("", element) for element in content)
        return
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield from ((key, element) for element in value)
        else:
            yield key, value


class _TagTree(ET.TreeBuilder):
    """An element tree without the positions of objects; it refuses document types, whose entities may expand."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise AfaError(f"has a document type ({name}); remove the DOCTYPE")

    def start(self, tag: str, attributes: dict[str, str]) -> ET.Element:
        return super().start(tag, {key: attributes[key] for key in ("name", "label", "subset") if key in attributes})


def load_xml(path: Path, kind: str, remedy: str) -> ET.Element:
    """Read an XML file, of whose attributes only `name`, `label` and `subset` are kept.

    Raises:
        AfaError: It cannot be read, is not XML (but should be of `kind`: `remedy` says how), or has a document type.
    """
    try:
        return ET.parse(path, parser=ET.XMLParser(target=_TagTree())).getroot()
    except AfaError as error:
        raise AfaError(f"{path}: {error}") from None
    except OSError as error:
        raise AfaError(f"{path}: cannot be read ({error.strerror})") from None
    except (ET.ParseError, ValueError, LookupError) as error:
        raise AfaError(f"{path}: not {kind} ({error}); {remedy}") from None


def entry_rows(entries: Sequence[TagEntry], classes: Sequence[str]) -> NDArray[np.int8]:
    """(N, C) `PRESENT`, `ABSENT` or `UNKNOWN`: what N entries say of the classes."""
    rows = tag_rows([entry.tags for entry in entries], classes)
    for row, entry in enumerate(entries):
        if entry.unknown is None:
            rows[row, rows[row] != PRESENT] = UNKNOWN
        elif entry.unknown:
            lacking = set(entry.unknown).difference(entry.tags)
            rows[row, [place for place, name in enumerate(classes) if name in lacking]] = UNKNOWN
    return rows


def tag_rows(tags: Sequence[tuple[str, ...]], classes: Sequence[str]) -> NDArray[np.int8]:
    """(N, C) `PRESENT` where N images have a class among their tags, else `ABSENT`."""
    codes: dict[tuple[str, ...], int] = {}  # most images share their tags with others
    chosen = [codes.setdefault(names, len(codes)) for names in tags]
    index = {name: position for position, name in enumerate(classes)}
    rows = np.full((len(codes), len(classes)), ABSENT, dtype=np.int8)
    lengths = [len(names) for names in codes]
    rows[np.repeat(np.arange(len(codes)), lengths), [index[name] for names in codes for name in names]] = PRESENT
    return rows[np.array(chosen, dtype=np.int64)]
