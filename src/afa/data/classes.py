"""The list of classes: names in index order, each with a color if the file gives one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from afa.data.tags import check_classes
from afa.errors import AfaError

_COLOR: Final = re.compile(r"\s*#([0-9a-fA-F]{6})$|\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})$")


@dataclass(frozen=True)
class ClassList:
    """Classes in index order: the mask value of a class is its position + 1.

    Attributes:
        names: C names.
        colors: Name -> (red, green, blue), each 0 to 255, of the classes that have a color.
    """

    names: tuple[str, ...]
    colors: dict[str, tuple[int, int, int]]


def read_class_list(path: Path) -> ClassList:
    """Read a text file with one class a line: `NAME`, `NAME #RRGGBB` or `NAME,R,G,B`.

    Args:
        path: File in UTF-8; blank lines do not count.

    Raises:
        AfaError: The file is no text; a color has values above 255; the names are no good (`check_classes`).
    """
    names = []
    colors = {}
    for line in read_lines(path):
        match = _COLOR.search(line)
        name = line[: match.start()].strip() if match else line
        names.append(name)
        if match:
            digits, *values = match.groups()
            red, green, blue = bytes.fromhex(digits) if digits else map(int, values)
            if max(red, green, blue) > 255:
                raise AfaError(f"{path}: class {name!r} has the color {red},{green},{blue}; give values of 0 to 255")
            colors[name] = (red, green, blue)
    check_classes(names, str(path))
    return ClassList(tuple(names), colors)


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not blank, without surrounding space.

    Raises:
        AfaError: The file is no text in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise AfaError(f"{path}: not a text file in UTF-8; write one name a line") from None
    except OSError as error:
        raise AfaError(f"{path}: cannot be read ({error.strerror})") from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())
