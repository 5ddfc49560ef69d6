"""Names: the classes in index order, each with a color if its file gives one, and the lists of images."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from afa.config import DataConfig
from afa.data.encoding import open_text
from afa.data.images import image_name
from afa.errors import AfaError, shown
from afa.types import IGNORE_INDEX

# fmt: off
VOC_CLASSES: Final[tuple[str, ...]] = (
    "aeroplane", "bicycle", "bird", "boat", "bottle",
    "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
"""The 20 classes of PASCAL VOC in index order: mask value = position + 1."""

MAX_CLASSES: Final = IGNORE_INDEX - 1
"""Largest number of classes that a network learns: masks have values of 8 bits."""

NO_TAG: Final = (
    "each image is without a tag, or its tags and folder are in data.negatives and mean none of the classes; tag "
    "at least one image"
)
"""What `check_classes` says where the classes are the tags that occur."""

_COLOR: Final = re.compile(r"\s*#([0-9a-fA-F]{6})$|\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})$")
_MAX_CLASS_NAME: Final = 200  # characters
_SHOWN: Final = 100  # names in a message


@dataclass(frozen=True)
class ClassList:
    """Classes in index order: the mask value of a class is its position + 1.

    Attributes:
        names: C names.
        colors: Name -> (red, green, blue), each 0 to 255, of the classes that have a color.
        words: Name -> words, of the classes that state some: what a text encoder is asked instead of the name.
    """

    names: tuple[str, ...]
    colors: dict[str, tuple[int, int, int]]
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)


def stated_classes(data: DataConfig, root: Path, *, default: tuple[str, ...] = ()) -> ClassList:
    """The classes that are stated: those of `data.classes`, else of classes.txt in the root, else `default`.

    Raises:
        AfaError: As `read_class_list`.
    """
    if data.classes:
        words = dict(map(split_words, data.classes))
        check_classes(tuple(name for name, _ in map(split_words, data.classes)), "data.classes")
        return ClassList(tuple(words), {}, {name: each for name, each in words.items() if each})
    path = root / "classes.txt"
    return read_class_list(path) if path.is_file() else ClassList(default, {})


def read_class_list(path: Path) -> ClassList:
    """Read a text file with one class a line: `NAME`, `NAME: WORD | WORD`, and behind either ` #RRGGBB` or `,R,G,B`.

    Args:
        path: File in UTF-8; blank lines do not count.

    Raises:
        AfaError: The file is no text; a color has values above 255; the names are no good (`check_classes`).
    """
    names = []
    colors = {}
    words = {}
    for line in read_lines(path):
        match = _COLOR.search(line)
        name, stated = split_words(line[: match.start()].strip() if match else line)
        names.append(name)
        if stated:
            words[name] = stated
        if match:
            digits, *values = match.groups()
            red, green, blue = bytes.fromhex(digits) if digits else map(int, values)
            if max(red, green, blue) > 255:
                raise AfaError(f"{path}: class {name!r} has the color {red},{green},{blue}; give values of 0 to 255")
            colors[name] = (red, green, blue)
    check_classes(names, str(path))
    return ClassList(tuple(names), colors, words)


def split_words(text: str) -> tuple[str, tuple[str, ...]]:
    """Name and words of a class; no words unless a colon and a space follow the name.

    >>> split_words("cat: cat | kitten"), split_words("a:b")
    (('cat', ('cat', 'kitten')), ('a:b', ()))
    """
    name, colon, words = text.partition(": ")
    return (name.strip(), tuple(word.strip() for word in words.split("|"))) if colon else (text, ())


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not blank, without surrounding space.

    Raises:
        AfaError: The file is no text in UTF-8.
    """
    try:
        with open_text(path) as file:
            text = file.read()
    except UnicodeDecodeError:
        raise AfaError(f"{path}: not a text file in UTF-8; write one name a line") from None
    except OSError as error:
        raise AfaError(f"{path}: cannot be read ({error.strerror})") from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def read_list(root: Path, list_file: str, *, key: str, known: Container[str] = ()) -> tuple[str, ...]:
    """Read a list of image names.

    Args:
        root: Folder that a relative path begins in.
        list_file: Text file with one image name a line; suffixes of images do not count.
        key: Setting that names the file, for messages.
        known: Names of images: such a line is a name, even if it looks like a file, as `b.png` of `b.png.jpg`.

    Raises:
        AfaError: The file is missing, empty or no text, or names an image twice.
    """
    if not list_file:
        raise AfaError(f"{key} is empty; name a text file with one image name a line")
    path = root / list_file
    if not path.is_file():
        raise AfaError(f"{path}: no such list; set {key} to a text file with one image name a line")
    names = tuple(line if line in known else image_name(line) for line in read_lines(path))
    if not names:
        raise AfaError(f"{path}: the list is empty; write one image name a line")
    if len(set(names)) != len(names):
        raise AfaError(
            f"{path}: image {first_twice(names)!r} is there twice ({len(names) - len(set(names))} lines "
            "too many); keep one line of each"
        )
    return names


def check_classes(classes: Sequence[str], origin: str, *, none: str = "write one a line") -> None:
    """Check that names can be the foreground classes of a network.

    Args:
        classes: Names in index order.
        origin: Where they come from, for messages.
        none: What to say and do where there are none.

    Raises:
        AfaError: There are none; one is there twice or in two ways of writing it, is the
            background, is empty, longer than 200 characters, or has control characters.
    """
    if len(set(classes)) != len(classes):
        raise AfaError(f"{origin}: class {shown(first_twice(classes))} is there twice; keep one")
    if not classes:
        raise AfaError(f"{origin}: 0 classes; {none}")
    if "background" in classes:
        raise AfaError(f"{origin}: leave 'background' out of the classes; it always has mask value 0")
    seen: dict[str, str] = {}
    for name in classes:
        if not name.strip() or len(name) > _MAX_CLASS_NAME or not is_plain(name):
            raise AfaError(
                f"{origin}: the class name {shown(name)} is empty, has control characters, or has more than "
                f"{_MAX_CLASS_NAME}; rename it"
            )
        alike = seen.setdefault(folded(name), name)
        if alike != name:
            raise AfaError(f"{origin}: classes {alike!r} and {name!r} differ in case or accents only; write one")


def check_count(classes: Sequence[str], origin: str) -> None:
    """Check that masks, whose values have 8 bits, can tell the classes apart; an `AfaError` if they are too many."""
    if len(classes) > MAX_CLASSES:
        raise AfaError(
            f"{origin}: {len(classes)} classes, and {MAX_CLASSES} is the limit, because masks have 8 bits; choose some "
            "with data.class_subset"
        )


def kept_classes(data: DataConfig, classes: Sequence[str]) -> list[int]:
    """The indices that `data.class_subset` keeps of the classes, in its order.

    Raises:
        AfaError: It names an unknown class, or one twice; more classes are left than `MAX_CLASSES`.
    """
    if len(set(data.class_subset)) != len(data.class_subset):
        raise AfaError(f"data.class_subset: class {first_twice(data.class_subset)!r} is there twice; keep one")
    for name in data.class_subset:
        if name not in classes:
            raise AfaError(f"data.class_subset: unknown class {name!r}; {unknown_class(name, classes)}")
    check_count(data.class_subset or classes, data.root)
    index = {name: place for place, name in enumerate(classes)}
    return [index[name] for name in data.class_subset or classes]


def unknown_class(name: str, allowed: Sequence[str]) -> str:
    """What a message says after an unknown class name: the closest allowed one, then all, or the first hundred.

    >>> unknown_class("hrose", ("cat", "horse"))
    'did you mean horse? allowed: cat, horse'
    """
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    more = ", ..." if len(allowed) > _SHOWN else ""
    return f"{hint}allowed: {', '.join(allowed[:_SHOWN])}{more}"


def is_plain(text: str) -> bool:
    """Tell whether a text can stand in a line of a file: valid Unicode without control characters.

    >>> is_plain("größe 1"), is_plain("a\\nb")
    (True, False)
    """
    odd = ("Cc", "Cs", "Zl", "Zp")
    return text.isprintable() or not any(unicodedata.category(character) in odd for character in text)


def folded(text: str) -> str:
    """What texts have in common that differ in case or Unicode form only."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFC", text).casefold()


def first_twice(names: Sequence[str]) -> str:
    """The first of the names that is there a second time."""
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
