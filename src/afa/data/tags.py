"""Image-level tags from files of any kind: tables, exports of annotation tools, VOC's XML, the historical `.npy`.

Which images need tags is left to `afa.data.voc` and `afa.data.layout`. The `.npy` format is a pickle,
which could run any code when loaded; it is read here with stand-ins that can only build arrays of numbers.
"""

from __future__ import annotations

import difflib
import pickle
import re
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from afa.data.exports import json_kind, read_coco, read_cvat, read_label_studio
from afa.data.images import image_name
from afa.data.tables import TagEntry, read_table, shown
from afa.errors import AfaError
from afa.types import IGNORE_INDEX

KINDS: Final = {
    "table": "a table of tags",
    "coco": "COCO instances",
    "labelstudio": "a Label Studio export",
    "cvat": "a CVAT export",
    "voc_xml": "a folder of VOC XML",
    "npy": "a dictionary of one-hot vectors",
}
"""What a file of tags may be, in words."""

_MAX_CLASS_NAME: Final = 200  # characters
_MAX_IMAGE_NAME: Final = 4096  # characters


@dataclass(frozen=True)
class TagFile:
    """What a file of tags holds.

    Attributes:
        path: The file or folder.
        kind: One of `KINDS`.
        classes: The class names: as given, as the file declares them in its order, or else sorted.
        declared: Whether they were given or declared, and not merely met.
        entries: Image name, without suffix, to its entry; the tags are among the classes and in their order.
    """

    path: Path
    kind: str
    classes: tuple[str, ...]
    declared: bool
    entries: dict[str, TagEntry]


def read_tags(path: Path, classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read the tags of all images that a file or folder names.

    Args:
        path: As `read_tag_file`.
        classes: The C class names in index order.

    Returns:
        Image name, without suffix, to its tags in the order of `classes`, each once; possibly none.

    Raises:
        AfaError: As `read_tag_file`.
    """
    return {name: entry.tags for name, entry in read_tag_file(path, classes).entries.items()}


def read_tag_file(path: Path, classes: Sequence[str] = ()) -> TagFile:
    """Read a file of tags of any kind.

    Args:
        path: A folder of VOC XML (each `object/name` is a tag); an `.npy` file with a dictionary from image
            name to a one-hot vector of length C; the `.xml` of CVAT; a `.json` of COCO instances or Label Studio; or
            else a table as `afa.data.tables` reads it, such as a CSV with the header `image,tags` and spaces
            between the tags.
        classes: The C class names in index order, or none: the file's own.

    Returns:
        Its entries and classes.

    Raises:
        AfaError: `path` is missing or malformed; it names an unknown class or an image twice; a vector has
            the wrong length or values other than 0 and 1; a pickle asks for anything but arrays of numbers; the
            classes that it declares or uses are no good as such (`check_classes`).
    """
    kind = tag_file_kind(path)
    declared: tuple[str, ...] = ()
    if kind == "voc_xml":
        found = _read_xml_folder(path)
    elif kind == "npy":
        if not classes:
            raise AfaError(f"{path}: has vectors without class names; write the names to classes.txt, one a line")
        tags = _read_npy(path, classes)
        return TagFile(
            path, kind, tuple(classes), True, {name: TagEntry(str(path), name, row) for name, row in tags.items()}
        )
    elif kind == "table":
        declared, found = read_table(path, classes)
    else:
        declared, found = {"coco": read_coco, "labelstudio": read_label_studio, "cvat": read_cvat}[kind](path)
    chosen = tuple(classes) or declared
    if not chosen:
        chosen = tuple(sorted({tag for entry in found for tag in entry.tags}))
    if not classes:
        check_classes(chosen, str(path))
    return TagFile(path, kind, chosen, bool(classes or declared), _by_name(found, chosen, kind))


def tag_file_kind(path: Path) -> str:
    """Tell of which kind a file of tags is, by its suffix and, of JSON, its first part.

    Returns:
        A key of `KINDS`.

    Raises:
        AfaError: It is missing, or no JSON.
    """
    if path.is_dir():
        return "voc_xml"
    if not path.is_file():
        raise AfaError(f"{path}: no such tags file or folder; set data.tags")
    kinds = {".npy": "npy", ".xml": "cvat"}
    suffix = path.suffix.lower()
    return json_kind(path) if suffix == ".json" else kinds.get(suffix, "table")


def check_classes(classes: Sequence[str], origin: str) -> None:
    """Check that names can be the foreground classes of a network.

    Args:
        classes: Names in index order.
        origin: Where they come from, for messages.

    Raises:
        AfaError: There are none or more than 254; one is there twice or in two ways of writing it, is the
            background, is empty, longer than 200 characters, or has control characters.
    """
    if len(set(classes)) != len(classes):
        raise AfaError(f"{origin}: class {shown(_first_twice(classes))} is there twice; keep one")
    if not 1 <= len(classes) < IGNORE_INDEX:
        raise AfaError(f"{origin}: {len(classes)} classes; give 1 to {IGNORE_INDEX - 1}")
    if "background" in classes:
        raise AfaError(f"{origin}: leave 'background' out of the classes; it always has mask value 0")
    seen: dict[str, str] = {}
    for name in classes:
        if not name.strip() or len(name) > _MAX_CLASS_NAME or not is_plain(name):
            raise AfaError(
                f"{origin}: the class name {shown(name)} is empty, has control characters, or has more than "
                f"{_MAX_CLASS_NAME}; rename it"
            )
        alike = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if alike != name:
            raise AfaError(f"{origin}: classes {alike!r} and {name!r} differ in case or accents only; write one")


def is_plain(text: str) -> bool:
    """Tell whether a text can stand in a line of a file: valid Unicode without control characters.

    >>> is_plain("größe 1"), is_plain("a\\nb")
    (True, False)
    """
    odd = ("Cc", "Cs", "Zl", "Zp")
    return text.isprintable() or not any(unicodedata.category(character) in odd for character in text)


def unknown_class(name: str, allowed: Sequence[str]) -> str:
    """What a message says after an unknown class name: the closest allowed one, then all.

    >>> unknown_class("hrose", ("cat", "horse"))
    'did you mean horse? allowed: cat, horse'
    """
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}allowed: {', '.join(allowed)}"


def _by_name(found: Iterable[TagEntry], classes: Sequence[str], kind: str) -> dict[str, TagEntry]:
    """The entries by image name, with their tags in class order."""
    unit = {"voc_xml": "annotation", "table": "line"}.get(kind, "entry")
    entries: dict[str, TagEntry] = {}
    ordered: dict[tuple[str, ...], tuple[str, ...]] = {}
    for entry in found:
        name = image_name(entry.image)
        if not name:
            raise AfaError(f"{entry.where}: no image name; write image,tags")
        if not is_plain(name) or len(name) > _MAX_IMAGE_NAME:
            raise AfaError(
                f"{entry.where}: the image name {shown(name)} has control characters or more than "
                f"{_MAX_IMAGE_NAME:,}; rename the image"
            )
        if name in entries:
            raise AfaError(f"{entry.where}: image {shown(name)} is there a second time; keep one {unit} of it")
        if entry.tags not in ordered:
            # The file of a VOC annotation names the image already.
            origin = entry.where if kind == "voc_xml" else f"{entry.where}, image {shown(name)}"
            ordered[entry.tags] = _in_class_order(entry.tags, classes, origin)
        entries[name] = entry._replace(tags=ordered[entry.tags])
    return entries


def _in_class_order(names: Iterable[str], classes: Sequence[str], origin: str) -> tuple[str, ...]:
    present = set(names)
    unknown = sorted(present.difference(classes))
    if unknown:
        raise AfaError(f"{origin}: unknown tag {shown(unknown[0])}; {unknown_class(unknown[0][:100], classes)}")
    return tuple(name for name in classes if name in present)


def _first_twice(names: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


class _TagTree(ET.TreeBuilder):
    """An element tree that refuses document types, and with them entities that expand without end."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise AfaError(f"has a document type ({name}); remove the DOCTYPE")


def _read_xml_folder(folder: Path) -> list[TagEntry]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".xml" and file.name[0] != ".")
    if not files:
        raise AfaError(f"{folder}: no .xml file in this folder; set data.tags to the folder of the VOC annotations")
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
    return entries


def _read_npy(path: Path, classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    try:
        with path.open("rb") as file:
            content = _load_object(file)
    except AfaError as error:
        raise AfaError(f"{path}: {error}") from None
    except Exception:  # A broken pickle raises nearly anything.
        content = None
    if not isinstance(content, dict):
        raise AfaError(f"{path}: not a dictionary saved by numpy.save; give image name -> one-hot vector, or a CSV")
    tags: dict[str, tuple[str, ...]] = {}
    for key, vector in content.items():
        name = _name_of_key(key)
        if name is None:
            raise AfaError(f"{path}: key {key!r:.60} is not an image name; use names or VOC's whole numbers")
        if name in tags:
            raise AfaError(f"{path}: image {name!r} is there a second time; keep one entry of it")
        one_hot = vector.value if isinstance(vector, _StandInArray) else None
        if not isinstance(one_hot, np.ndarray) or one_hot.shape != (len(classes),):
            length = one_hot.size if isinstance(one_hot, np.ndarray) else 0
            raise AfaError(
                f"{path}: image {name!r} has a vector of {length} values; "
                f"give one for each of the {len(classes)} classes"
            )
        if not np.isin(one_hot, (0, 1)).all():
            raise AfaError(f"{path}: image {name!r} has values other than 0 and 1; give a one-hot vector")
        tags[name] = tuple(classes[index] for index in np.flatnonzero(one_hot).tolist())
    return tags


def _name_of_key(key: object) -> str | None:
    """Image name of a dictionary key: a text, or a number such as 2007000032 for VOC's 2007_000032."""
    if isinstance(key, str):
        return image_name(key)
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        digits = str(key)
        return f"{digits[:4]}_{digits[4:]}" if len(digits) == 10 else digits
    return None


def _load_object(file: BinaryIO) -> Any:
    """The one object of an `.npy` file of shape (), without ever running what its pickle asks for."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if shape != () or not dtype.hasobject:
        return None
    array = _TagUnpickler(file, encoding="latin1").load()
    return array.value[0] if isinstance(array, _StandInArray) else None


class _StandInType:
    """Stands for a `numpy.dtype` in a pickle: plain numbers of native layout, or objects."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|O8?", code):
            raise AfaError(f"holds values of type {str(code)!r:.20}; use numbers")
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.order, *_ = state
        if self.order not in ("<", ">", "=", "|"):
            raise AfaError("holds values of a malformed type; use numbers")

    def numbers(self, data: bytes) -> NDArray[Any]:
        return np.frombuffer(data, dtype=np.dtype(self.order + self.code))


class _StandInArray:
    """Stands for a `numpy.ndarray` in a pickle; `value` is a list if it holds objects, else a real array."""

    value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, _, data = state
        self.value = list(data) if kind.code.startswith("O") else kind.numbers(data).reshape(shape)


def _stand_in_reconstruct(kind: type, shape: tuple[int, ...], code: bytes) -> _StandInArray:
    return _StandInArray()


def _stand_in_scalar(kind: _StandInType, data: bytes) -> Any:
    return kind.numbers(data)[0]


def _stand_in_encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


class _TagUnpickler(pickle.Unpickler):
    """Builds the stand-ins above and plain Python values; refuses every other class or function.

    NumPy's own constructors are not used either: with a forged type they reinterpret bytes as pointers.
    """

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("numpy.multiarray", "_reconstruct"): _stand_in_reconstruct,
            ("numpy.multiarray", "scalar"): _stand_in_scalar,
            ("numpy", "ndarray"): _StandInArray,
            ("numpy", "dtype"): _StandInType,
            ("_codecs", "encode"): _stand_in_encode,
        }
        # numpy 1 has numpy.core, numpy 2 numpy._core.
        found = known.get((re.sub(r"^numpy\._?core\.", "numpy.", module), name))
        if found is None:
            raise AfaError(f"the pickle asks for {module}.{name}, which no tags need: refused; give the tags as CSV")
        return found
