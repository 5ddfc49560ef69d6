"""YOLO: a text file of objects for each image, each line of which begins with the number of a class.

The names of the classes are in data.yaml, or in a list such as classes.txt. Positions of objects are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, Final

import yaml

from afa.data.classes import read_lines, split_words
from afa.data.encoding import decoded
from afa.data.files import files_in, is_mask_folder, plain_path, subfolders, walk_files
from afa.data.images import image_name
from afa.data.readers.base import Contents, TagEntry
from afa.data.split import SIDES
from afa.errors import AfaError, first_line, shown

_NAME_FILES: Final = ("classes.txt", "obj.names", "labels/classes.txt", "images/classes.txt", "../classes.txt")
_NO_LABELS: Final = r"(.*[-_])?(classes|labels|train|val|valid|test|readme.*|notes|license)\.txt"
_BESIDE_LABELS: Final = r"(.*[-_])?(classes|readme.*|notes|license)\.txt"
_OBJECT: Final = r"\d+(\.0*)?(\s+-?[\d.]+(e-?\d+)?){4,}"
_PLACES: Final = frozenset(("images", "jpegimages", "obj_train_data", "data", *SIDES))
_LOOKED_AT: Final = 100  # files that tell whether these are labels
_MAX_SETTINGS: Final = 1_000_000  # bytes


def find(root: Path) -> Path | None:
    """What `read` takes, where the folder looks like a data set for YOLO: its data.yaml, or else the folder."""
    if not root.is_dir():
        return None
    for path in sorted(chain(root.glob("*.yaml"), root.glob("*.yml"))):
        if path.is_file() and re.search(rb"^names\s*:", path.read_bytes()[:_MAX_SETTINGS], re.M):
            return path
    found = [files_in(folder, ".txt", but=_NO_LABELS, deep=True) for folder in _label_folders(root)]
    first = list(islice(chain(*found), _LOOKED_AT))
    if not first and any((root / name).is_file() for name in _NAME_FILES):
        found = [files_in(folder, ".txt", but=_NO_LABELS) for folder in (root, *subfolders(root, _PLACES))]
        first = list(islice(chain(*found), _LOOKED_AT))
    fitting = {_has_objects(path) for path in first}  # a broken one does not deny the others
    return root if True in fitting or fitting == {None} else None


def _has_objects(path: Path) -> bool | None:
    """Whether a text begins with an object of YOLO; None if it is empty."""
    with path.open("rb") as file:
        start = decoded(file.read(1000)).strip()
    return re.fullmatch(_OBJECT, start.splitlines()[0], re.I) is not None if start else None


def read(path: Path, content: Any, classes: Sequence[str]) -> Contents:
    """Read the names of the classes in the order of their numbers, and an entry for each file of labels.

    Args:
        path: data.yaml, or the folder that it would be in, or one of labels.
        content: Nothing.
        classes: The names by number, where no file has them.
    """
    root = path if path.is_dir() else path.parent
    settings = {} if path.is_dir() else _settings(path)
    names = _names(path, settings) or dict(enumerate(classes))
    if not names:
        raise AfaError(f"{path}: numbers of classes without names; write the names to classes.txt, one a line")
    labels = sorted(_labels(root))
    if not labels:
        raise AfaError(f"{path}: no files of labels beside it; put them into labels/, named as the images, as .txt")
    sides = _Sides(settings, root, [image for _, image in labels])
    entries = [
        TagEntry(str(label), image, tuple([names[number] for number in _numbers(label, names)]), sides.of(image))
        for label, image in labels
    ]
    return Contents(tuple(names.values()), entries)


def _settings(path: Path) -> dict[str, Any]:
    try:
        # All values are texts, which hold no objects and no dates.
        with path.open("rb") as file:
            found = yaml.load(file.read(_MAX_SETTINGS), Loader=yaml.BaseLoader)
    except OSError as error:
        raise AfaError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # the parser raises nearly anything on a broken file
        raise AfaError(f"{path}: not valid YAML ({first_line(error)}); save it anew") from None
    if not isinstance(found, dict):
        raise AfaError(f"{path}: no settings of YOLO; write at least names: and the names")
    return found


def _names(path: Path, settings: dict[str, Any]) -> dict[int, str]:
    """Number of a class -> its name, by ascending number; none where no file says it."""
    if path.is_dir():
        found = next((path / name for name in _NAME_FILES if (path / name).is_file()), None)
        listed = () if found is None else read_lines(found)
        return dict(enumerate(re.sub(r"\s*#[0-9a-fA-F]{6}$|(,\d+){3}$", "", split_words(line)[0]) for line in listed))
    value = settings.get("names")
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    names = {}
    for number, name in pairs:
        if not re.fullmatch(r"\d{1,6}", str(number) if isinstance(number, (int, str)) else "") or not name:
            raise AfaError(f"{path}: names has no list of names by number; write names: and a line N: NAME for each")
        if not isinstance(name, str):
            raise AfaError(f"{path}: name {number} is no text; write one name for each number")
        names[int(number)] = name.strip()
    return dict(sorted(names.items()))


def _label_folders(root: Path) -> list[Path]:
    """Folders named labels, in the root or in that of a side of the split."""
    return [inner for folder in (root, *subfolders(root, SIDES)) for inner in subfolders(folder, {"labels"})]


def _labels(root: Path) -> Iterator[tuple[Path, str]]:
    """Each file of labels, and its image as a path below the root, with some suffix."""
    folders = _label_folders(root)
    for folder in folders or [root]:
        for path in walk_files(folder, {".txt"}, skip=None if folders else is_mask_folder):
            passed_over = re.fullmatch(_BESIDE_LABELS if folders else _NO_LABELS, path.rpartition("/")[2], re.I)
            if not passed_over or (folders and _has_objects(folder / path) is not False):
                place = folder.relative_to(root).as_posix()
                image = f"{place[:-6]}images/{path}" if folders else path
                yield folder / path, f"{image[:-4]}.jpg"


def _numbers(label: Path, names: dict[int, str]) -> list[int]:
    """The numbers of the classes of a file of labels, each once, ascending."""
    numbers = set()
    try:
        lines = decoded(label.read_bytes()).splitlines()
    except OSError as error:
        raise AfaError(f"{label}: cannot be read ({error.strerror})") from None
    for place, line in enumerate(lines, start=1):
        if line.strip():
            first, *others = line.split(maxsplit=5)
            if len(others) < 4 or not re.fullmatch(r"[0-9]{1,6}(\.0*)?", first):
                raise AfaError(f"{label}, line {place}: is {shown(line)}; write class x y width height, or a polygon")
            numbers.add(int(first.partition(".")[0]))
    if beyond := numbers - names.keys():
        raise AfaError(
            f"{label}: class number {min(beyond)}, of {len(names)} names by number; correct the list of names"
        )
    return sorted(numbers)


class _Sides:
    """Which images train and which are for validation: as the settings say, else as the folders do."""

    def __init__(self, settings: dict[str, Any], root: Path, images: Sequence[str]) -> None:
        self._places: dict[str, set[str]] = {}  # folder, or image -> sides
        known = set(map(image_name, images))
        folders = {image.rpartition("/")[0] for image in images}
        for side in ("train", "val", "test"):
            value = settings.get(side)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and text:
                    place = plain_path(text)[0]
                    listed = root / place
                    if place.endswith(".txt") and listed.is_file():
                        covered = [_cut(image_name(plain_path(line)[0]), known) for line in read_lines(listed)]
                    else:
                        covered = [folder for folder in folders if _covers(place, folder)]
                    for each in covered:
                        self._places.setdefault(each, set()).add(side)

    def of(self, image: str) -> str:
        """The side of an image; empty where none is stated, or several are."""
        folder = image.rpartition("/")[0]
        stated = self._places.get(image_name(image), self._places.get(folder))
        if stated is not None:
            return next(iter(stated)) if len(stated) == 1 else ""
        return next((part for part in PurePosixPath(folder).parts if part.lower() in SIDES), "")


def _covers(place: str, folder: str) -> bool:
    """Whether a folder of the settings, which may be a path of another machine, is this one or above it."""
    return f"/{folder}/".startswith(f"/{place}/".replace("//", "/")) or f"/{place}".endswith(f"/{folder}")


def _cut(text: str, known: set[str]) -> str:
    """The text without as many leading parts as make it known; else as it is."""
    parts = text.split("/")
    return next((each for cut in range(len(parts)) if (each := "/".join(parts[cut:])) in known), text)
