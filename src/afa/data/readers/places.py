"""Finds the files of tags in a folder: the kinds of files that there are, and which of them are the likeliest."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from afa.config import DataConfig
from afa.data.files import path_below, subfolders
from afa.data.readers import coco, cvat, labelme, labelstudio, npy, table, voc_xml, yolo
from afa.data.readers.base import Contents, drop_outlines, elements, load_json
from afa.data.split import SIDES, UNSTATED, side_of
from afa.errors import AfaError, shown


class Reader(NamedTuple):
    """How one kind of file is called, read (as `afa.data.readers.base` says) and chosen by `data.layout`."""

    words: str
    read: Callable[[Path, Any, Sequence[str]], Contents]
    unit: str = "entry"
    layout: str = "table"


READERS: Final = {
    "table": Reader("a table of tags", table.read, "line"),
    "coco": Reader("COCO instances", coco.read, layout="coco"),
    "labelstudio": Reader("a Label Studio export", labelstudio.read, layout="labelstudio"),
    "cvat": Reader("a CVAT export", cvat.read, layout="cvat"),
    "labelme": Reader("LabelMe files", labelme.read, "file", "labelme"),
    "yolo": Reader("YOLO labels", yolo.read, "file", "yolo"),
    "voc_xml": Reader("a folder of VOC XML", voc_xml.read, "annotation"),
    "npy": Reader("a dictionary of one-hot vectors", npy.read),
}
"""Kinds of files of tags."""

_BY_IMAGE: Final[dict[str, Callable[[Path], Path | None]]] = {"labelme": labelme.find, "yolo": yolo.find}
"""Kinds that have a file for each image -> what finds them in a folder."""

_SUFFIXES: Final = frozenset((".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".npy"))
_UNREAD: Final = (".xlsx", ".xls", ".ods", ".numbers", ".mat", ".h5", ".hdf5", ".pkl", ".pickle", ".db", ".sqlite")
_FOLDERS: Final = ("", "lists", "annotations")
_STEMS: Final = (
    r"tags", r"cls_labels_onehot", r"labels", r"metadata", r"_classes", r"_annotations(\.coco)?", r"annotations",
    r"instances.*", r"project-\d.*", r"(train|val|valid|validation|test)\w*",
)  # fmt: skip
"""Names of files of tags, the likeliest first; any other comes last."""
_NO_TAGS: Final = re.compile(
    r"classes|captions.*|person_keypoints.*|panoptic.*|stuff.*|image_info.*|shapes|dataset_infos?|dataset_dict|state|package|config|README",
    re.IGNORECASE,
)
_COCO_KEYS: Final = frozenset(("info", "licenses", "license", "images", "annotations", "categories", "type"))


@dataclass(frozen=True)
class TagFile:
    """A file or folder of tags.

    Attributes:
        path: Where it is.
        side: Side of all its images, where its place says it.
        stated_kind: Its kind, where that is known.
        doubt: What else may be the tags.
    """

    path: Path
    side: int = UNSTATED
    stated_kind: str = ""
    doubt: str = ""

    @property
    def is_usual(self) -> bool:
        """Whether the name says that these may be tags."""
        return bool(self.stated_kind) or _rank(self) < len(_STEMS)

    @cached_property
    def content(self) -> Any:
        """Its contents if it is JSON, without the outlines of objects."""
        return load_json(self.path, drop_outlines) if self.path.suffix.lower() == ".json" else None

    @cached_property
    def kind(self) -> str:
        """Key in `READERS`, by its suffix and, of JSON, its first part; an `AfaError` if it is missing or no JSON."""
        if self.stated_kind:
            return self.stated_kind
        if self.path.is_dir():
            return _folder_kind(self.path)
        if not self.path.is_file():
            raise AfaError(f"{self.path}: no such tags file or folder; set data.tags")
        if self.content is None:
            kinds = {".npy": "npy", ".xml": "cvat", ".yaml": "yolo", ".yml": "yolo"}
            return kinds.get(self.path.suffix.lower(), "table")
        if isinstance(self.content, dict) and {"shapes", "imagePath"} <= self.content.keys():
            return "labelme"
        key, value = next(elements(self.content), ("", None))
        if key in _COCO_KEYS:
            return "coco"
        if not key and isinstance(value, dict):
            in_full = isinstance(value.get("data"), dict) and not labelstudio.TASK_KEYS.isdisjoint(value)
            if in_full or not labelstudio.SHORT_KEYS.isdisjoint(value):
                return "labelstudio"
        return "table"


def unread(root: Path) -> str:
    """What a message adds where the folder holds a file that may be tags, of a kind that is not read."""
    name = next((name for name in sorted(os.listdir(root)) if name.lower().endswith(_UNREAD)), None)
    return "" if name is None else f" ({shown(name)} is not read: save it as CSV in UTF-8)"


def words(kind: str) -> str:
    """What files of a kind or layout are, for messages."""
    return "metadata.jsonl or metadata.csv" if kind == "hf" else READERS[kind].words.removeprefix("a ")


def find_tag_files(root: Path, data: DataConfig) -> list[TagFile]:
    """The file or files of tags: one, or one for each side of a split; none where nothing looks like it."""
    if data.tags:
        path = root / data.tags
        if path.is_dir() and _folder_kind(path) == "voc_xml" and not _list_files(path, {".xml"}):
            return _best_files(data, _list_files(path, _SUFFIXES), path)
        file = TagFile(path)
        if data.layout not in ("auto", "hf", "table", file.kind):  # the kind says so where there is none
            is_other = f"is {READERS[file.kind].words}, not {words(data.layout)}"
            raise AfaError(f"{path}: {is_other}; correct data.layout or data.tags")
        return [file]
    found = [
        file
        for folder in (*(root / name for name in _FOLDERS), *subfolders(root, SIDES))
        for file in _list_files(
            folder, _SUFFIXES, SIDES.get(folder.name.lower(), UNSTATED) if folder != root else UNSTATED
        )
    ]
    if data.layout in _BY_IMAGE or (data.layout == "auto" and not _has_usual(found)):
        there = {kind: place for kind, find in _BY_IMAGE.items() if (place := find(root))}
        kind = next((kind for kind in there if data.layout in ("auto", kind)), "")
        if kind:
            doubt = ", ".join(words(other) for other in there if other != kind) if data.layout == "auto" else ""
            return [TagFile(there[kind], stated_kind=kind, doubt=doubt)]
    files = _best_files(data, found, root)
    if not files and data.layout in ("auto", "table") and _list_files(root / "Annotations", {".xml"}):
        return [TagFile(root / "Annotations")]
    return files


def _list_files(folder: Path, suffixes: Collection[str], side: int = UNSTATED) -> list[TagFile]:
    """The files that may be tags, on the given side or that which their names say; none without the folder."""
    if not folder.is_dir():
        return []
    names = [name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in suffixes and name[0] != "."]
    files = [folder / name for name in sorted(names) if not _NO_TAGS.fullmatch(os.path.splitext(name)[0])]
    return [TagFile(file, side_of(file.stem) if side == UNSTATED else side) for file in files if file.is_file()]


def _best_files(data: DataConfig, found: Sequence[TagFile], folder: Path) -> list[TagFile]:
    """The files with the likeliest name among those that may be tags."""
    ranked: dict[int, list[TagFile]] = {}
    for file in found:
        if data.layout == "auto" or _fits(file, data.layout):
            ranked.setdefault(_rank(file), []).append(file)
    best, *others = [ranked[rank] for rank in sorted(ranked)] or [[]]
    sides = {file.side for file in best}
    if len(best) > 1 and (UNSTATED in sides or len(sides) < len(best)):
        raise AfaError(
            f"{folder}: {path_below(best[0].path, folder)} and {path_below(best[1].path, folder)} may both be the "
            "tags; set data.tags to one of them"
        )
    doubt = next(
        (f"that in {path_below(file.path, folder)}" for files in others for file in files if file.is_usual), ""
    )
    return [replace(file, doubt=doubt) for file in best] if doubt and data.layout == "auto" else best


def _rank(file: TagFile) -> int:
    """How likely the name is that of tags, 0 first; `len(_STEMS)` of names that say nothing."""
    return next((i for i, pattern in enumerate(_STEMS) if re.fullmatch(pattern, file.path.stem, re.I)), len(_STEMS))


def _has_usual(files: Iterable[TagFile]) -> bool:
    """Whether the name of a file says that these are tags; not of one image, as those of LabelMe."""
    usual = sorted((file.path.suffix.lower() == ".json", file.path) for file in files if file.is_usual)
    return any(not (is_json and labelme.fits(path)) for is_json, path in usual[:100])


def _folder_kind(path: Path) -> str:
    if _list_files(path, {".xml"}):
        return "voc_xml"
    return "labelme" if labelme.find(path) else "yolo" if yolo.find(path) else "voc_xml"


def _fits(file: TagFile, layout: str) -> bool:
    return file.path.stem.lower() == "metadata" if layout == "hf" else READERS[file.kind].layout == layout
