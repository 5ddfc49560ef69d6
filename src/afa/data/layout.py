"""Which layout a data set has, said in one line, and opening it: lists, tables of tags, folders of classes, exports.

`find_layout` looks at names only and reads the tags; no image and no mask is opened. What trains gets `TaggedImages`;
masks are looked for by `Layout.scored` alone.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from afa.config import DataConfig
from afa.data import voc
from afa.data.files import ImageFiles, check_paths, stem_of, walk_files
from afa.data.split import split_by_tags
from afa.data.tables import TagEntry, shown
from afa.data.tags import KINDS, TagFile, check_classes, read_tag_file, tag_file_kind
from afa.data.voc import ScoredImages, TaggedImages, class_list, data_root, kept_classes, kept_values, read_list
from afa.errors import AfaError

_SPLITS: Final = {
    "train": 0, "training": 0,
    "val": 1, "valid": 1, "validation": 1, "dev": 1,
    "test": 2, "testing": 2,
}  # fmt: skip
"""Names of the sides of a split: 0 trains, 1 is for validation, 2 for neither."""

_TAG_SUFFIXES: Final = frozenset((".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".npy"))
_TAG_FOLDERS: Final = ("", "lists", "annotations")
_TAG_STEMS: Final = (
    r"tags", r"cls_labels_onehot", r"labels", r"metadata", r"_classes", r"_annotations(\.coco)?", r"annotations",
    r"instances.*", r"project-\d.*", r"(train|val|valid|validation|test)\w*",
)  # fmt: skip
"""Names of files of tags, the likeliest first; any other comes last."""
_NO_TAGS: Final = re.compile(
    r"classes|captions.*|person_keypoints.*|panoptic.*|stuff.*|image_info.*|shapes|dataset_infos?|package|config|README",
    re.IGNORECASE,
)
_MASK_FOLDER: Final = re.compile(r"masks|Segmentation(Class|Object)\w*")


class Layout(ABC):
    """A data set that was found. Built by `find_layout`.

    Attributes:
        kind: `voc`, `table`, `imagefolder`, `hf`, `coco`, `labelstudio` or `cvat`.
        root: Folder of the data set.
        classes: The class names of the images that it hands out, in index order.
        colors: Class name -> (red, green, blue), where the class list has colors.
        untagged: Names of images without tags that are left out of training; the VOC layout has none, it refuses them.
    """

    kind: str
    root: Path
    classes: tuple[str, ...]
    colors: dict[str, tuple[int, int, int]]
    untagged: tuple[str, ...]

    @abstractmethod
    def describe(self) -> str:
        """What was found, in one line."""

    @property
    @abstractmethod
    def has_validation(self) -> bool:
        """Whether there is a list or a side of images for validation."""

    @property
    @abstractmethod
    def has_masks(self) -> bool:
        """Whether there is a folder of masks; what is in it is not looked at."""

    @abstractmethod
    def training(self, *, list_file: str | None = None) -> TaggedImages:
        """Images to train on.

        Args:
            list_file: List of names to take instead; relative to the root unless absolute.

        Returns:
            The images, each with at least one tag.

        Raises:
            AfaError: There are none; the list is missing or names an unknown image.
        """

    @abstractmethod
    def validation(self, *, list_file: str | None = None) -> TaggedImages:
        """Images set aside, by their tags alone: for scores that need no mask. Arguments as `training`."""

    @abstractmethod
    def scored(self, *, list_file: str | None = None) -> ScoredImages:
        """Images set aside that have masks. Arguments as `training`."""


def open_tagged(data: DataConfig, *, list_file: str | None = None) -> TaggedImages:
    """Open images and tags for training, whatever the layout. No folder of masks is touched.

    Args:
        data: Where things lie.
        list_file: Names of the images to take instead of those that train; relative to the root unless absolute.

    Returns:
        Images with at least one tag each.

    Raises:
        AfaError: As `find_layout` and `Layout.training`.
    """
    return find_layout(data).training(list_file=list_file)


def open_scored(data: DataConfig, *, list_file: str | None = None) -> ScoredImages:
    """Open images with masks, and with tags where there are any, for evaluation, whatever the layout.

    Args:
        data: Where things lie.
        list_file: Names of the images to take instead of those for validation; relative to the root unless absolute.

    Returns:
        Images with a mask each.

    Raises:
        AfaError: As `find_layout` and `Layout.scored`.
    """
    return find_layout(data).scored(list_file=list_file)


def find_layout(data: DataConfig) -> Layout:
    """Find out how images and tags lie in a folder, and read the tags.

    Args:
        data: Its root, and what is known of the rest; `layout` names the layout, or is `auto`.

    Returns:
        The layout.

    Raises:
        AfaError: No layout fits; several files may be the tags; a file of tags is malformed, names a missing image,
            one twice, or one outside of the folder; names or classes are no good.
    """
    root = data_root(data)
    if data.layout == "voc" or (data.layout == "auto" and _has_lists(data, root)):
        return _VocLayout(data, root)
    if data.layout != "imagefolder":
        sources = _find_tag_files(data, root)
        if sources:
            return _read_tag_files(data, root, sources)
        if data.layout != "auto":
            raise AfaError(
                f"{root}: no {_words(data.layout)} here; set data.tags to the file, or data.layout to what it is"
            )
    layout = _read_class_folders(data, root)
    if layout is not None:
        return layout
    if data.layout == "auto" and (root / data.image_dir).is_dir() and data.image_dir == DataConfig().image_dir:
        return _VocLayout(data, root)
    what = "images" if data.layout == "imagefolder" else "tags"
    raise AfaError(
        f"{root}: no {what} found; put a tags.csv with the header file,tags there, sort the images into one folder for "
        "each class, or set data.tags"
    )


def _words(kind: str) -> str:
    return KINDS.get(kind, "metadata.jsonl or metadata.csv").removeprefix("a ")


def _has_lists(data: DataConfig, root: Path) -> bool:
    """Whether the lists of the VOC layout are there, or asked for."""
    lists = (data.train_list, data.val_list)
    return data.train_list != DataConfig().train_list or any(name and (root / name).is_file() for name in lists)


class _VocLayout(Layout):
    """The layout of `afa.data.voc`."""

    kind = "voc"
    untagged = ()

    def __init__(self, data: DataConfig, root: Path) -> None:
        self.root = root
        listed = class_list(data, root)
        self.colors = listed.colors
        self.classes = tuple(listed.names[index] for index in kept_classes(data, listed.names))
        self._data = data

    @property
    def has_validation(self) -> bool:
        return bool(self._data.val_list) and (self.root / self._data.val_list).is_file()

    @property
    def has_masks(self) -> bool:
        return (self.root / self._data.mask_dir).is_dir()

    def describe(self) -> str:
        data, parts = self._data, []
        for name, purpose in ((data.train_list, "to train on"), (data.val_list, "for validation")):
            if name and (self.root / name).is_file():
                _, names = read_list(self.root, name, key="data.train_list")
                parts.append(f"{_count(len(names), 'image')} {purpose} ({name})")
        tags = voc.find_tags(data, self.root)
        parts.append("no tags" if tags is None else f"tags from {_below(tags, self.root)}")
        parts.append(f"masks in {data.mask_dir}" if self.has_masks else "no masks")
        return f"{self.root}: VOC layout, {_class_words(self.classes)}; {', '.join(parts)}"

    def training(self, *, list_file: str | None = None) -> TaggedImages:
        return voc.open_tagged(self._data, list_file=list_file)

    def validation(self, *, list_file: str | None = None) -> TaggedImages:
        return voc.open_tagged(self._data, list_file=self._data.val_list if list_file is None else list_file)

    def scored(self, *, list_file: str | None = None) -> ScoredImages:
        return voc.open_scored(self._data, list_file=list_file)


@dataclass(frozen=True)
class _FoundLayout(Layout):
    """Images below a folder with an entry of tags for some, and a side for each.

    Attributes:
        folder: Folder that the paths are below.
        origin: Where the tags are from, in a few words.
        paths: N paths of the images with an entry.
        names: N names.
        tags: (N, C) over `classes`.
        sides: (N,) 0 train, 1 validation, 2 neither.
        split_words: How the sides came about.
        every_class: The classes that masks have, of which `classes` are kept.
        declared: Whether the classes were stated and not merely met.
    """

    kind: str
    root: Path
    classes: tuple[str, ...]
    colors: dict[str, tuple[int, int, int]]
    untagged: tuple[str, ...]
    folder: Path
    origin: str
    paths: tuple[str, ...]
    names: tuple[str, ...]
    tags: NDArray[np.bool_]
    sides: NDArray[np.int8]
    split_words: str
    every_class: tuple[str, ...]
    declared: bool
    mask_folder: Path | None = field(repr=False)

    @property
    def has_validation(self) -> bool:
        return bool((self.sides == 1).any())

    @property
    def has_masks(self) -> bool:
        return self.mask_folder is not None

    def describe(self) -> str:
        usable = self.tags.any(axis=1)
        train, val = (int((usable & (self.sides == side)).sum()) for side in (0, 1))
        parts = [f"{_count(train, 'image')} to train on", f"{val} for validation ({self.split_words})"]
        if neither := int((self.sides == 2).sum()):
            parts.append(f"{neither} in a test split left out")
        if self.untagged:
            parts.append(f"{len(self.untagged)} without tags left out")
        masks = "no masks" if self.mask_folder is None else f"masks in {_below(self.mask_folder, self.root)}"
        return f"{self.root}: {self.origin}, {_class_words(self.classes)}; {', '.join([*parts, masks])}"

    def training(self, *, list_file: str | None = None) -> TaggedImages:
        return self._tagged(0, list_file, "to train on")

    def validation(self, *, list_file: str | None = None) -> TaggedImages:
        return self._tagged(1, list_file, "for validation")

    def _tagged(self, side: int, list_file: str | None, purpose: str) -> TaggedImages:
        chosen = self._chosen(side, list_file)
        chosen = chosen[self.tags[chosen].any(axis=1)]
        if not chosen.size:
            raise AfaError(f"{self.root}: no image with a tag {purpose} ({self.origin}; {self.split_words}); add some")
        return TaggedImages(
            classes=self.classes,
            names=tuple(self.names[i] for i in chosen),
            paths=[self.folder / self.paths[i] for i in chosen],
            tags=self.tags[chosen],
        )

    def scored(self, *, list_file: str | None = None) -> ScoredImages:
        if self.mask_folder is None:
            raise AfaError(
                f"{self.root}: no folder of masks; put index PNGs into {self.root / 'masks'}, named as the images, or "
                "set data.mask_dir"
            )
        if not self.declared and (new := [name for name in self.classes if name not in self.every_class]):
            raise AfaError(
                f"{self.root}: the tags never have class {new[0]!r}, so what the mask values mean is not known; "
                "write the classes to classes.txt in the order of the mask values"
            )
        chosen = self._chosen(1, list_file)
        if not chosen.size:
            raise AfaError(f"{self.root}: no images for validation ({self.split_words}); raise data.split_fraction")
        masks = _find_masks([self.names[i] for i in chosen], self.mask_folder)
        with_mask = [i for i in chosen.tolist() if self.names[i] in masks]
        if not with_mask or (list_file is not None and len(with_mask) < chosen.size):
            missing = next(self.names[i] for i in chosen if self.names[i] not in masks)
            raise AfaError(
                f"{self.mask_folder}: no {missing}.png ({chosen.size - len(with_mask)} of {chosen.size} images for "
                "validation have no mask); add the masks, or set data.mask_dir"
            )
        kept = [self.every_class.index(name) for name in self.classes]
        return ScoredImages(
            classes=self.classes,
            names=tuple(self.names[i] for i in with_mask),
            paths=[self.folder / self.paths[i] for i in with_mask],
            tags=self.tags[with_mask],
            tagged=np.ones(len(with_mask), dtype=bool),
            mask_paths=[self.mask_folder / masks[self.names[i]] for i in with_mask],
            mask_values=kept_values(kept, len(self.every_class)),
            origin=self.origin,
        )

    def _chosen(self, side: int, list_file: str | None) -> NDArray[np.int64]:
        if list_file is None:
            return np.flatnonzero(self.sides == side)
        path, names = read_list(self.root, list_file, key="--list")
        index = {name: i for i, name in enumerate(self.names)}
        if missing := [name for name in names if name not in index]:
            raise AfaError(
                f"{path}: {self.origin} has no image {shown(missing[0])} ({len(missing)} of {len(names)} names "
                "missing); correct the list"
            )
        return np.array([index[name] for name in names], dtype=np.int64)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _class_words(classes: Sequence[str]) -> str:
    first = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
    return f"{len(classes)} class{'' if len(classes) == 1 else 'es'} ({first})"


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


# -- Files of tags


@dataclass(frozen=True)
class _Source:
    """A file of tags, and the side of its images where its name or folder says it."""

    path: Path
    side: int | None


def _find_tag_files(data: DataConfig, root: Path) -> list[_Source]:
    """The file or files of tags: one, or one for each side of a split; none where nothing looks like it."""
    if data.tags:
        path = root / data.tags
        if path.is_dir() and not _list_files(path, {".xml"}):
            return _best_files(data, [(path / name, None) for name in _list_files(path, _TAG_SUFFIXES)], path)
        kind = tag_file_kind(path)  # says so where there is none
        if data.layout not in ("auto", "hf", "table", kind):
            raise AfaError(f"{path}: is {KINDS[kind]}, not {_words(data.layout)}; correct data.layout or data.tags")
        return [_Source(path, None)]
    found: list[tuple[Path, int | None]] = []
    with os.scandir(root) as entries:
        splits = sorted(entry.name for entry in entries if entry.name.lower() in _SPLITS and entry.is_dir())
    for folder in (*_TAG_FOLDERS, *splits):
        if (root / folder).is_dir():
            side = _SPLITS.get(folder.lower())
            found += [(root / folder / name, side) for name in _list_files(root / folder, _TAG_SUFFIXES)]
    sources = _best_files(data, found, root)
    if not sources and data.layout in ("auto", "table") and (root / "Annotations").is_dir():
        sources = [_Source(root / "Annotations", None)] if _list_files(root / "Annotations", {".xml"}) else []
    return sources


def _list_files(folder: Path, suffixes: Iterable[str]) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and os.path.splitext(entry.name)[1].lower() in suffixes
            and not _NO_TAGS.fullmatch(stem_of(entry.name))
            and entry.is_file()
        )


def _best_files(data: DataConfig, found: Sequence[tuple[Path, int | None]], folder: Path) -> list[_Source]:
    """Of the files that may be tags, those of the likeliest name."""
    ranked: dict[int, list[_Source]] = {}
    for path, side in found:
        rank = next((i for i, stem in enumerate(_TAG_STEMS) if re.fullmatch(stem, path.stem, re.I)), len(_TAG_STEMS))
        if data.layout == "hf" and path.stem.lower() != "metadata":
            continue
        if data.layout not in ("auto", "hf", "table") and tag_file_kind(path) != data.layout:
            continue
        if data.layout == "table" and tag_file_kind(path) not in ("table", "npy"):
            continue
        ranked.setdefault(rank, []).append(_Source(path, _side_of(path.stem) if side is None else side))
    if not ranked:
        return []
    best = ranked[min(ranked)]
    sides = [source.side for source in best]
    if len(best) > 1 and (None in sides or len(set(sides)) < len(sides)):
        raise AfaError(
            f"{folder}: {_below(best[0].path, folder)} and {_below(best[1].path, folder)} may both be the tags; "
            "set data.tags to one of them"
        )
    return best


def _side_of(text: str) -> int | None:
    """The side that a name speaks of: `instances_val2014` of validation."""
    words = re.findall(r"[a-z]+", text.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def _read_tag_files(data: DataConfig, root: Path, sources: Sequence[_Source]) -> Layout:
    listed = class_list(data, root, default=())
    files = [read_tag_file(source.path, listed.names) for source in sources]
    is_metadata = all(source.path.stem.lower() == "metadata" for source in sources)
    kind = files[0].kind if files[0].kind in ("coco", "labelstudio", "cvat") else "hf" if is_metadata else "table"
    folder = root
    in_splits = any(source.path.parent != root and source.path.parent.name.lower() in _SPLITS for source in sources)
    if not in_splits or data.image_dir != DataConfig().image_dir:
        folder = _image_folder(data, root)
    images = ImageFiles(folder, skip=lambda path: _is_mask_folder(path, folder, data, root))
    entries: dict[str, TagEntry] = {}
    sides: list[int | None] = []
    for file, source in zip(files, sources, strict=True):
        for path, entry in _match(file, images, root):
            if path in entries:
                raise AfaError(
                    f"{entry.where}: image {shown(entry.image)} is {shown(path)}, which {entries[path].where} has too; "
                    "keep one entry of it"
                )
            entries[path] = entry
            sides.append(_entry_side(entry) if source.side is None else source.side)
    where = " and ".join(_below(source.path, root) for source in sources)
    words = KINDS[files[0].kind].removeprefix("an ").removeprefix("a ")
    return _found_layout(
        data,
        images,
        {path: entry.tags for path, entry in entries.items()},
        sides,
        kind=kind,
        root=root,
        origin=f"{'Hugging Face metadata' if kind == 'hf' else words} in {where}",
        classes=_merged_classes(files),
        declared=any(file.declared for file in files),
        colors=listed.colors,
    )


def _merged_classes(files: Sequence[TagFile]) -> tuple[str, ...]:
    first = files[0]
    different = next((file for file in files if file.classes != first.classes), None)
    if different is None:
        return first.classes
    if first.declared or different.declared:
        raise AfaError(f"{first.path} and {different.path}: list different classes; make them the same")
    classes = tuple(sorted({name for file in files for name in file.classes}))
    check_classes(classes, f"{first.path} and {different.path}")
    return classes


def _image_folder(data: DataConfig, root: Path) -> Path:
    """Where images of a file of tags lie: the folder that is set, `images`, or the root."""
    stated = root / data.image_dir
    if stated.is_dir():
        return stated
    if data.image_dir != DataConfig().image_dir:
        raise AfaError(f"{stated}: no such folder; set data.image_dir")
    return root / "images" if (root / "images").is_dir() else root


def _is_mask_folder(path: str, folder: Path, data: DataConfig, root: Path) -> bool:
    return bool(_MASK_FOLDER.fullmatch(path.rsplit("/", 1)[-1])) or folder / path == root / data.mask_dir


def _match(file: TagFile, images: ImageFiles, root: Path) -> list[tuple[str, TagEntry]]:
    """The image of each entry, all of which must be there."""
    folder = images.folder
    drop = [f"{folder.name}/"] if folder != root else []
    lacks = ""
    if file.path.parent.is_relative_to(folder) and file.path.parent != folder:
        lacks = f"{file.path.parent.relative_to(folder).as_posix()}/"
    found = []
    missing = []
    for entry in file.entries.values():
        path = images.find(entry, lacks=lacks, drop=drop, loose=file.kind == "labelstudio")
        if path is None:
            missing.append(entry)
        else:
            found.append((path, entry))
    if missing:
        raise AfaError(
            f"{missing[0].where}: {folder} has no image {shown(missing[0].image)} ({len(missing)} of "
            f"{len(file.entries)} images missing); add them, set data.image_dir, or take them out of the tags"
        )
    return found


def _entry_side(entry: TagEntry) -> int | None:
    """The side that an entry states: a word such as `val`, or nothing."""
    if not entry.split or entry.split.lower() == "default":  # what CVAT writes where there are no subsets
        return None
    side = _side_of(entry.split)
    if side is None:
        raise AfaError(f"{entry.where}: the split is {shown(entry.split)}; write train, val or test")
    return side


# -- Folders of classes


def _read_class_folders(data: DataConfig, root: Path) -> Layout | None:
    """One folder for each class, perhaps below folders for the sides of a split; None where there are none."""
    folder = root
    if data.image_dir != DataConfig().image_dir:
        folder = _image_folder(data, root)
    images = ImageFiles(folder, skip=lambda path: _is_mask_folder(path, folder, data, root))
    first = {path.split("/", 1)[0] for path in images.paths if "/" in path}
    if folder == root and first and first <= {"images", data.image_dir}:
        folder = root / min(first)
        images = ImageFiles(folder)
        first = {path.split("/", 1)[0] for path in images.paths if "/" in path}
    # A class may be named train: folders are the sides of a split only when all are named so and hold folders.
    has_sides = bool(first) and all(name.lower() in _SPLITS for name in first)
    has_sides = has_sides and any(path.count("/") >= 2 for path in images.paths)
    place = 1 if has_sides else 0
    tags: dict[str, tuple[str, ...]] = {}
    sides: list[int | None] = []
    for path in images.paths:
        parts = path.split("/")
        if len(parts) > place + 1:
            tags[path] = (parts[place],)
            sides.append(_SPLITS[parts[0].lower()] if has_sides else None)
    if not tags:
        return None
    met = sorted({name for (name,) in tags.values()})
    listed = class_list(data, root, default=())
    if listed.names and (unknown := [name for name in met if name not in listed.names]):
        raise AfaError(
            f"{folder}: the folder {shown(unknown[0])} is none of the classes; name it as one of "
            f"{', '.join(listed.names)}, or add the class"
        )
    if not listed.names:
        check_classes(met, str(folder))
    return _found_layout(
        data,
        images,
        tags,
        sides,
        kind="imagefolder",
        root=root,
        origin="folders of classes",
        classes=listed.names or tuple(met),
        declared=bool(listed.names),
        colors=listed.colors,
    )


# -- What all have in common


def _found_layout(
    data: DataConfig,
    images: ImageFiles,
    entries: Mapping[str, tuple[str, ...]],
    stated: Sequence[int | None],
    *,
    kind: str,
    root: Path,
    origin: str,
    classes: tuple[str, ...],
    declared: bool,
    colors: dict[str, tuple[int, int, int]],
) -> Layout:
    """Names, tags and sides of the images that have an entry."""
    paths = tuple(entries)
    names = check_paths(paths, images.folder)
    index = {name: position for position, name in enumerate(classes)}
    tags = np.zeros((len(paths), len(classes)), dtype=bool)
    for row, present in enumerate(entries.values()):
        tags[row, [index[name] for name in present]] = True
    wanted = classes
    if data.class_subset:
        # Tags that only meet some classes say nothing of the others; a trained network may know more.
        known = classes if declared else (*classes, *(name for name in data.class_subset if name not in index))
        kept = kept_classes(data, known)
        tags = np.pad(tags, ((0, 0), (0, len(known) - len(classes))))[:, kept]
        wanted = tuple(known[i] for i in kept)
    sides, split_words = _sides(data, paths, names, tags, stated)
    places = [path for path in (root / data.mask_dir, root / "masks", root / "SegmentationClass") if path.is_dir()]
    tagged = {path for path, row in zip(paths, tags, strict=True) if row.any()}
    return _FoundLayout(
        kind=kind,
        root=root,
        classes=wanted,
        colors=colors,
        untagged=tuple(stem_of(path) for path in images.paths if path not in tagged),
        folder=images.folder,
        origin=origin,
        paths=paths,
        names=names,
        tags=tags,
        sides=sides,
        split_words=split_words,
        every_class=classes,
        declared=declared,
        mask_folder=places[0] if places else None,
    )


def _sides(
    data: DataConfig, paths: Sequence[str], names: Sequence[str], tags: NDArray[np.bool_], stated: Sequence[int | None]
) -> tuple[NDArray[np.int8], str]:
    """(N,) the side of each image, and in words how that came about."""
    if all(side is None for side in stated):
        by_folder = [_SPLITS.get(path.split("/", 1)[0].lower()) if "/" in path else None for path in paths]
        if {0, 1} <= set(by_folder):
            stated = by_folder
    sides = np.array([0 if side is None else side for side in stated], dtype=np.int8)
    if (sides == 1).any():
        return sides, "as the data says"
    if not data.val_list:
        return sides, "data.val_list is empty"
    if data.split_fraction == 0:
        return sides, "data.split_fraction is 0"
    splittable = np.flatnonzero((sides == 0) & tags.any(axis=1))
    aside = split_by_tags(
        tags[splittable], [names[i] for i in splittable.tolist()], fraction=data.split_fraction, seed=data.split_seed
    )
    sides[splittable[aside]] = 1
    return sides, f"set aside here by tags, seed {data.split_seed}"


def _find_masks(names: Sequence[str], folder: Path) -> dict[str, str]:
    """The mask of each name that has one: its path without suffix is the name, or the name without leading folders."""
    masks = {stem_of(path): path for path in walk_files(folder, {".png"})}
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        stems = ("/".join(parts[cut:]) for cut in range(len(parts)))
        stem = next((stem for stem in stems if stem in masks), None)
        if stem is None:
            continue
        if stem in taken:
            raise AfaError(
                f"{folder / masks[stem]}: images {shown(taken[stem])} and {shown(name)} would share this mask; put "
                "masks into the same folders as the images"
            )
        taken[stem] = name
        found[name] = masks[stem]
    return found
