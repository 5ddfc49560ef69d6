"""The historical `.npy` of weakly-supervised work: a dictionary from image name to a one-hot vector.

The file is a pickle, which could run any code when loaded; it is read here with stand-ins that can only build arrays of
numbers.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from afa.data.images import image_name
from afa.data.readers.base import Contents, TagEntry
from afa.errors import AfaError


def read(path: Path, content: Any, classes: Sequence[str]) -> Contents:
    """Read the vectors: the classes, which must be known, and an entry for each key."""
    if not classes:
        raise AfaError(f"{path}: has vectors without class names; write the names to classes.txt, one a line")
    try:
        with path.open("rb") as file:
            vectors = _load_object(file)
    except AfaError as error:
        raise AfaError(f"{path}: {error}") from None
    except Exception:  # A broken pickle raises nearly anything.
        vectors = None
    if not isinstance(vectors, dict):
        raise AfaError(f"{path}: not a dictionary saved by numpy.save; give image name -> one-hot vector, or a CSV")
    entries = []
    for key, vector in vectors.items():
        name = _name_of_key(key)
        if name is None:
            raise AfaError(f"{path}: key {key!r:.60} is not an image name; use names or VOC's whole numbers")
        one_hot = vector.value if isinstance(vector, _StandInArray) else None
        if not isinstance(one_hot, np.ndarray) or one_hot.shape != (len(classes),):
            length = one_hot.size if isinstance(one_hot, np.ndarray) else 0
            raise AfaError(
                f"{path}: image {name!r} has a vector of {length} values; "
                f"give one for each of the {len(classes)} classes"
            )
        if not ((one_hot == 0) | (one_hot == 1)).all():
            raise AfaError(f"{path}: image {name!r} has values other than 0 and 1; give a one-hot vector")
        tags = tuple([classes[index] for index in np.flatnonzero(one_hot).tolist()])
        entries.append(TagEntry(str(path), name, tags))
    return Contents(tuple(classes), entries)


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


_STAND_INS: Final[dict[tuple[str, str], Any]] = {
    ("numpy.multiarray", "_reconstruct"): lambda kind, shape, code: _StandInArray(),
    ("numpy.multiarray", "scalar"): lambda kind, data: kind.numbers(data)[0],
    ("numpy", "ndarray"): _StandInArray,
    ("numpy", "dtype"): _StandInType,
    ("_codecs", "encode"): lambda text, encoding="latin1": text.encode("latin1"),
}
"""Module and name in a pickle -> what is built in its place."""


class _TagUnpickler(pickle.Unpickler):
    """Builds the stand-ins above and plain Python values; refuses every other class or function.

    NumPy's own constructors are not used either: with a forged type they reinterpret bytes as pointers.
    """

    def find_class(self, module: str, name: str) -> Any:
        # numpy 1 has numpy.core, numpy 2 numpy._core.
        found = _STAND_INS.get((re.sub(r"^numpy\._?core\.", "numpy.", module), name))
        if found is None:
            raise AfaError(f"the pickle asks for {module}.{name}, which no tags need: refused; give the tags as CSV")
        return found
