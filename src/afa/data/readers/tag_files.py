"""Finds and reads the files of tags in a folder, and finds the images of their entries."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from afa.config import DataConfig
from afa.data.classes import check_classes, folded, is_plain, stated_classes, unknown_class
from afa.data.dataset import TagTable
from afa.data.files import ImageFiles, check_paths, image_folder, images_below, path_below, plain_path, subfolders
from afa.data.images import image_name
from afa.data.readers import coco, cvat, labelme, labelstudio, npy, table, voc_xml, yolo
from afa.data.readers.base import Contents, TagEntry, drop_outlines, elements, entry_rows, load_json
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

_SUFFIXES: Final = frozenset((".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".npy"))
_FOLDERS: Final = ("", "lists", "annotations")
_STEMS: Final = (
    r"tags", r"cls_labels_onehot", r"labels", r"metadata", r"_classes", r"_annotations(\.coco)?", r"annotations",
    r"instances.*", r"project-\d.*", r"(train|val|valid|validation|test)\w*",
)  # fmt: skip
"""Names of files of tags, the likeliest first; any other comes last."""
_NO_TAGS: Final = re.compile(
    r"classes|captions.*|person_keypoints.*|panoptic.*|stuff.*|image_info.*|shapes|dataset_infos?|package|config|README",
    re.IGNORECASE,
)
_COCO_KEYS: Final = frozenset(("info", "licenses", "license", "images", "annotations", "categories", "type"))
_MAX_IMAGE_NAME: Final = 4096  # characters


@dataclass(frozen=True)
class TagFile:
    """A file or folder of tags; the side of all its images, where its place says it; its kind, where that is known."""

    path: Path
    side: int = UNSTATED
    stated_kind: str = ""

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


class FoundTags(NamedTuple):
    """Contents of a file of tags.

    Attributes:
        classes: The class names: as given, as the file declares them in its order, or else sorted.
        declared: Whether they were given or declared, and not merely met.
        entries: Image name, without suffix, to its entry; the tags are among the classes and in their order.
        notes: As of `Contents`.
    """

    classes: tuple[str, ...]
    declared: bool
    entries: dict[str, TagEntry]
    notes: tuple[str, ...]


def words(kind: str) -> str:
    """What files of a kind or layout are, for messages."""
    return "metadata.jsonl or metadata.csv" if kind == "hf" else READERS[kind].words.removeprefix("a ")


def read_tags(path: Path, classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Image name, without suffix, to its tags in the order of `classes`, each once; possibly none.

    Of a name that begins elsewhere (as `plain_path` says) the last part is taken.

    Raises:
        AfaError: As `read_tag_file`; two names have the same last part.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, entry in read_tag_file(TagFile(path), classes).entries.items():
        inside, is_foreign = plain_path(entry.image)
        name = image_name(inside.rpartition("/")[2]) if is_foreign else name
        if name in found:
            raise AfaError(f"{entry.where}: image {shown(name)} is there a second time; keep one entry of it")
        found[name] = entry.tags
    return found


def read_tag_file(
    file: TagFile, classes: Sequence[str] = (), negatives: Sequence[str] = (), known: Container[str] = ()
) -> FoundTags:
    """Read a file of tags of any kind.

    Args:
        file: A table, an export of a tool, a folder of VOC XML, or an `.npy` of one-hot vectors.
        classes: The C class names in index order, or none: the file's own.
        negatives: Tags that say that an image holds none of the classes, as far as they are no classes themselves.
        known: Names of images: such a text is a name, even if it looks like a file, as `b.png` of `b.png.jpg`.

    Raises:
        AfaError: It is missing or malformed; it names an unknown class or an image twice; the classes that it declares
            or uses are no good as such (`check_classes`).
    """
    declared, found, notes = READERS[file.kind].read(file.path, file.content, classes)
    declared, found = _without(nothing_names(negatives, classes), declared, found)
    chosen = tuple(classes) or declared or tuple(sorted({tag for entry in found for tag in entry.tags}))
    if not classes:
        check_classes(chosen, str(file.path))
    return FoundTags(chosen, bool(classes or declared), _by_name(found, chosen, file.kind, known), notes)


def read(root: Path, data: DataConfig) -> TagTable | None:
    """Read the file of tags of a folder, or one for each side of a split, and find the images that they mean.

    Returns:
        A row for each image with an entry; None where nothing looks like a file of tags.

    Raises:
        AfaError: Several files may be the tags; as `read_tag_file`; an image is missing, there twice, or outside.
    """
    files = _find_files(root, data)
    if not files:
        return None
    listed = stated_classes(data, root)
    is_metadata = all(file.path.stem.lower() == "metadata" for file in files)
    layout = READERS[files[0].kind].layout
    in_splits = any(file.path.parent != root and file.path.parent.name.lower() in SIDES for file in files)
    folder = image_folder(root, data, at_root=in_splits)
    images = images_below(folder, root, data)
    known = {name for name in map(image_name, images.paths) if image_name(name) != name}
    contents = [read_tag_file(file, listed.names, data.negatives, known) for file in files]
    entries: dict[str, TagEntry] = {}
    sides: list[int] = []
    missing: list[str] = []
    for file, content in zip(files, contents, strict=True):
        found = content.entries.values()
        for path, entry in zip(_match(file, images, found, root, data), found, strict=True):
            if path is None:
                missing.append(entry.image)
                continue
            if path in entries:
                raise AfaError(
                    f"{entry.where}: image {shown(entry.image)} is {shown(path)}, which {entries[path].where} has too; "
                    "keep one entry of it"
                )
            entries[path] = entry
            sides.append(_entry_side(entry) if file.side == UNSTATED else file.side)
    is_hf = layout == "table" and is_metadata
    places = " and ".join(path_below(file.path, root) for file in files)
    kind = "Hugging Face metadata" if is_hf else words(files[0].kind)
    classes, notes = _merged_classes(files, contents)
    if missing:
        notes.append(f"{folder}: {len(missing):,} images of the tags missing and left out ({shown(missing[0])}, ...)")
    return TagTable(
        kind="hf" if is_hf else layout,
        origin=kind if files[0].path == root else f"{kind} in {places}",
        classes=classes,
        tags=entry_rows(list(entries.values()), classes),
        sides=np.array(sides, dtype=np.int8),
        folder=folder,
        paths=tuple(entries),
        names=check_paths(entries, folder),
        colors=listed.colors,
        words=listed.words,
        declared=any(content.declared for content in contents),
        every_path=images.paths,
        remarks=images.passed_over,
        notes=(*notes, *(note for content in contents for note in content.notes)),
    )


def _find_files(root: Path, data: DataConfig) -> list[TagFile]:
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
    if data.layout in ("yolo", "labelme") or (data.layout == "auto" and not _has_usual(found)):
        if data.layout != "yolo" and (place := labelme.find(root)):
            return [TagFile(place, stated_kind="labelme")]
        if data.layout != "labelme" and (place := yolo.find(root)):
            return [TagFile(place, stated_kind="yolo")]
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
    best = ranked[min(ranked)] if ranked else []
    sides = {file.side for file in best}
    if len(best) > 1 and (UNSTATED in sides or len(sides) < len(best)):
        raise AfaError(
            f"{folder}: {path_below(best[0].path, folder)} and {path_below(best[1].path, folder)} may both be the "
            "tags; set data.tags to one of them"
        )
    return best


def _rank(file: TagFile) -> int:
    """How likely the name is that of tags, 0 first; `len(_STEMS)` of names that say nothing."""
    return next((i for i, pattern in enumerate(_STEMS) if re.fullmatch(pattern, file.path.stem, re.I)), len(_STEMS))


def _has_usual(files: Iterable[TagFile]) -> bool:
    """Whether the name of a file says that these are tags; not of one image, as those of LabelMe."""
    usual = sorted((file.path.suffix.lower() == ".json", file.path) for file in files if _rank(file) < len(_STEMS))
    return any(not (is_json and labelme.fits(path)) for is_json, path in usual[:100])


def _folder_kind(path: Path) -> str:
    if _list_files(path, {".xml"}):
        return "voc_xml"
    return "labelme" if labelme.find(path) else "yolo" if yolo.find(path) else "voc_xml"


def _fits(file: TagFile, layout: str) -> bool:
    return file.path.stem.lower() == "metadata" if layout == "hf" else READERS[file.kind].layout == layout


def _merged_classes(files: Sequence[TagFile], contents: Sequence[FoundTags]) -> tuple[tuple[str, ...], list[str]]:
    """The classes of all files, joined by name: first those of the training images; and what only some files list."""
    order = sorted(range(len(files)), key=lambda place: (files[place].side == UNSTATED, files[place].side))
    lists = [contents[place].classes for place in order]
    if all(classes == lists[0] for classes in lists):
        return lists[0], []
    classes = tuple(dict.fromkeys(itertools.chain(*lists)))
    if not any(content.declared for content in contents):
        classes = tuple(sorted(classes))
    check_classes(classes, " and ".join(str(file.path) for file in files))
    declared = [place for place in order if contents[place].declared]
    notes = []
    for name in classes:
        having = [files[place].path for place in declared if name in contents[place].classes]
        if 0 < len(having) < len(declared):
            notes.append(
                f"{' and '.join(map(str, having))}: class {shown(name)} is only listed here; correct the list, or "
                "leave the class out by data.class_subset"
            )
    return classes, notes


def _match(
    file: TagFile, images: ImageFiles, entries: Iterable[TagEntry], root: Path, data: DataConfig
) -> list[str | None]:
    """The path of the image of each entry; None where it is missing, which `data` may allow."""
    folder, parent = images.folder, file.path.parent
    inside = parent.is_relative_to(folder) and parent != folder
    return images.find_all(
        [(entry.image, entry.where) for entry in entries],
        "add them, set data.image_dir, or leave them out by --skip-missing",
        skip=data.skip_missing,
        lacks=f"{parent.relative_to(folder).as_posix()}/" if inside else "",
        drop="" if folder == root else f"{folder.name}/",
        loose=file.kind in ("labelstudio", "labelme", "yolo"),
    )


def _entry_side(entry: TagEntry) -> int:
    """The side that an entry states: a word such as `val`, or nothing."""
    if not entry.split or entry.split.lower() == "default":  # what CVAT writes where there are no subsets
        return UNSTATED
    side = side_of(entry.split)
    if side == UNSTATED:
        raise AfaError(f"{entry.where}: the split is {shown(entry.split)}; write train, val or test")
    return side


def _by_name(
    found: Iterable[TagEntry], classes: Sequence[str], kind: str, known: Container[str]
) -> dict[str, TagEntry]:
    """The entries by image name, with their tags in class order."""
    places = {name: place for place, name in enumerate(classes)}
    entries: dict[str, TagEntry] = {}
    ordered: dict[tuple[str, ...], tuple[str, ...]] = {}
    for entry in found:
        name = entry.image if entry.image in known else image_name(entry.image)
        if not name:
            raise AfaError(f"{entry.where}: no image name; write image,tags")
        if len(name) > _MAX_IMAGE_NAME or not is_plain(name):
            raise AfaError(
                f"{entry.where}: the image name {shown(name)} has control characters or more than "
                f"{_MAX_IMAGE_NAME:,}; rename the image"
            )
        if name in entries:
            unit = READERS[kind].unit
            raise AfaError(f"{entry.where}: image {shown(name)} is there a second time; keep one {unit} of it")
        if entry.tags not in ordered:
            # The file of a VOC annotation names the image already.
            origin = entry.where if kind == "voc_xml" else f"{entry.where}, image {shown(name)}"
            ordered[entry.tags] = _in_class_order(entry.tags, places, origin)
        entries[name] = entry._replace(tags=ordered[entry.tags])
    return entries


def nothing_names(negatives: Sequence[str], classes: Sequence[str]) -> frozenset[str]:
    """The folded names that mean "nothing": `data.negatives` without what is a class."""
    return frozenset(map(folded, negatives)).difference(map(folded, classes))


def _without(
    nothing: frozenset[str], declared: tuple[str, ...], found: list[TagEntry]
) -> tuple[tuple[str, ...], list[TagEntry]]:
    """What a reader found, without the tags that mean "nothing"."""
    used = {tags for entry in found if (tags := entry.tags)}
    if not nothing.intersection(map(folded, {*declared, *(tag for tags in used for tag in tags)})):
        return declared, found

    def kept(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple([name for name in names if folded(name) not in nothing])

    return kept(declared), [entry._replace(tags=kept(entry.tags)) for entry in found]


def _in_class_order(names: Iterable[str], places: Mapping[str, int], origin: str) -> tuple[str, ...]:
    try:
        return tuple(sorted(set(names), key=places.__getitem__))
    except KeyError:
        unknown = min(set(names).difference(places))
        raise AfaError(
            f"{origin}: unknown tag {shown(unknown)}; {unknown_class(unknown[:100], list(places))}"
        ) from None
