"""Image-level tags from files: CSV, the historical one-hot `.npy` dictionary, or VOC's XML annotations.

Which images need tags, and which classes are kept, is left to `afa.data.voc`. The `.npy` format is a pickle,
which could run any code when loaded; it is read here with stand-ins that can only build arrays of numbers.
"""

from __future__ import annotations

import csv
import difflib
import pickle
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from afa.data.images import image_name
from afa.errors import AfaError


def read_tags(path: Path, classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read the tags of all images that a file or folder names.

    Args:
        path: A folder of VOC XML (each `object/name` is a tag), an `.npy` file with a dictionary from image
            name to a one-hot vector of length C, or else a CSV with the header `image,tags` and spaces
            between the tags.
        classes: The C class names in index order.

    Returns:
        Image name, without suffix, to its tags in the order of `classes`, each once; possibly none.

    Raises:
        AfaError: `path` is missing or malformed; it names an unknown class or an image twice; a vector has
            the wrong length or values other than 0 and 1; a pickle asks for anything but arrays of numbers.
    """
    if path.is_dir():
        return _read_xml_folder(path, classes)
    if not path.is_file():
        raise AfaError(f"{path}: no such tags file or folder; set data.tags")
    if path.suffix.lower() == ".npy":
        return _read_npy(path, classes)
    return _read_csv(path, classes)


def unknown_class(name: str, allowed: Sequence[str]) -> str:
    """What a message says after an unknown class name: the closest allowed one, then all.

    >>> unknown_class("hrose", ("cat", "horse"))
    'did you mean horse? allowed: cat, horse'
    """
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}allowed: {', '.join(allowed)}"


def _in_class_order(names: Iterable[str], classes: Sequence[str], origin: str) -> tuple[str, ...]:
    present = set(names)
    unknown = sorted(present.difference(classes))
    if unknown:
        raise AfaError(f"{origin}: unknown tag {unknown[0]!r}; {unknown_class(unknown[0], classes)}")
    return tuple(name for name in classes if name in present)


def _read_csv(path: Path, classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    spaced = [name for name in classes if len(name.split()) != 1]
    if spaced:
        raise AfaError(
            f"{path}: tags are separated by spaces, and class {spaced[0]!r} has one; "
            f"name it {'_'.join(spaced[0].split())} in the class list and here"
        )
    tags: dict[str, tuple[str, ...]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, skipinitialspace=True, strict=True)
            header = next(rows, [])
            if [cell.strip() for cell in header] != ["image", "tags"]:
                raise AfaError(f"{path}: the first line is {','.join(header)!r}; write the header image,tags")
            for row in rows:
                if not row:
                    continue
                origin = f"{path}, line {rows.line_num}"
                if len(row) != 2:
                    raise AfaError(f"{origin}: {len(row)} columns; write image,tags with spaces between the tags")
                name = image_name(row[0].strip())
                if not name:
                    raise AfaError(f"{origin}: no image name; write image,tags")
                if name in tags:
                    raise AfaError(f"{origin}: image {name!r} is there a second time; keep one line of it")
                tags[name] = _in_class_order(row[1].split(), classes, f"{origin}, image {name!r}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise AfaError(f"{path}: not a CSV in UTF-8 ({error}); save it as text with the header image,tags") from None
    return tags


class _TagTree(ET.TreeBuilder):
    """An element tree that refuses document types, and with them entities that expand without end."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise AfaError(f"has a document type ({name}); remove the DOCTYPE")


def _read_xml_folder(folder: Path, classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".xml" and file.name[0] != ".")
    if not files:
        raise AfaError(f"{folder}: no .xml file in this folder; set data.tags to the folder of the VOC annotations")
    tags: dict[str, tuple[str, ...]] = {}
    for file in files:
        if file.stem in tags:
            raise AfaError(f"{file}: image {file.stem!r} is there a second time; keep one annotation of it")
        try:
            root = ET.parse(file, parser=ET.XMLParser(target=_TagTree())).getroot()
        except AfaError as error:
            raise AfaError(f"{file}: {error}") from None
        except (ET.ParseError, OSError, ValueError, LookupError) as error:
            raise AfaError(f"{file}: not a VOC annotation ({error}); replace the file") from None
        # Parts of an object (head, hand) have names as well, deeper down: only direct children count.
        names = [(item.findtext("name") or "").strip() for item in root.findall("object")]
        tags[file.stem] = _in_class_order(names, classes, str(file))
    return tags


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
