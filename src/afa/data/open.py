"""Opens a data set, once per command: finds the layout of its folder, and returns its images.

Names are looked at and tags are read; no image is opened, and only `DataSet.masked` looks at the folder of masks.
All errors in names are found when images are requested.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from afa.config import DataConfig
from afa.data.classes import kept_classes, read_list
from afa.data.dataset import ABSENT, PRESENT, UNKNOWN, MaskedImages, TaggedImages, TagTable
from afa.data.files import path_below, unadorned, walk_files
from afa.data.images import IMAGE_SUFFIXES, image_name
from afa.data.members import Column, take
from afa.data.readers import folders, shards, tag_files, voc
from afa.data.readers.places import unread, words
from afa.data.split import TEST, TRAIN, VALIDATION, choose_sides
from afa.errors import AfaError, BrokenImageError, shown
from afa.runtime import image_progress, read_ahead, say, shows_progress
from afa.types import IGNORE_INDEX


def open_data(data: DataConfig) -> DataSet:
    """Find out how images and tags lie in the folder of a data set, and read the tags. Nothing looks for files again.

    Raises:
        AfaError: No layout fits; several files may be the tags; a file of tags is malformed, names a missing image,
            one twice, or one outside of the folder; names or classes are no good.
    """
    root = data_root(data)
    collects = gc.isenabled()
    gc.disable()  # hundreds of thousands of entries, none of which leads back to itself
    try:
        return DataSet(data, root, _read(root, data))
    finally:
        if collects:
            gc.enable()


def data_root(data: DataConfig) -> Path:
    """The folder of a data set, or of its shards; an `AfaError` if `data.root` is empty, or no folder or shard."""
    if not data.root:
        raise AfaError("data.root is empty; set it to the folder of the data set")
    if shards.names_shards(data.root):
        return shards.home(data.root)
    root = Path(data.root)
    if root.is_file():
        raise AfaError(f"{root}: is a file; name the folder that has it and the images, and the file as data.tags")
    if not root.is_dir():
        raise AfaError(f"{root}: no such folder; set data.root to the folder of the data set")
    return root


def _read(root: Path, data: DataConfig) -> TagTable:
    """The table of the first reader that fits."""
    layout, is_default = data.layout, data.image_dir == DataConfig().image_dir
    if (
        shards.names_shards(data.root)
        or layout == "shards"
        or (layout == "auto" and shards.holds_shards(root, {".tar"}, only=True))
    ):
        return shards.read(root, data)
    if layout == "voc" or (layout == "auto" and voc.has_lists(root, data)):
        return voc.read(root, data)
    table = None if layout == "imagefolder" else tag_files.read(root, data)
    if table is None and not data.tags and layout in ("auto", "hf"):
        table = shards.read(root, data) if shards.holds_shards(root) else None
    if table is None and layout not in ("auto", "imagefolder"):
        kind = words(layout)
        raise AfaError(f"{root}: no {kind} here; set data.tags to the file, or data.layout to what it is")
    table = table or folders.read(root, data)
    if table is not None:
        return table
    if layout == "auto" and is_default and (root / data.image_dir).is_dir():
        return voc.read(root, data)
    what = "images" if layout == "imagefolder" else "tags"
    raise AfaError(
        f"{root}: no {what} found; put a tags.csv with the header file,tags there, sort the images into one folder for "
        f"each class, or set data.tags{unread(root)}"
    )


class DataSet:
    """A data set that was opened once for a whole command. Built by `open_data`.

    Attributes:
        root: Folder of the data set.
        kind: As of `TagTable`.
        classes: The class names of the images that it hands out, in index order.
        colors: Class name -> (red, green, blue), where the class list has colors.
        words: For each class the words that a text encoder is asked: those that the class list states, or its name.
        remarks: What was passed over, a phrase each.
        untagged: Names of images of which nothing is known, left out of training; listed images are refused instead.
        notes: As of `TagTable`.
    """

    def __init__(self, data: DataConfig, root: Path, table: TagTable) -> None:
        """Keep the classes that the settings choose, and make a split if there is none.

        Raises:
            AfaError: As `kept_classes`.
        """
        self.root = root
        self.kind = table.kind
        self.colors = table.colors
        self.remarks = table.remarks
        self.notes = table.notes
        self._data = data
        self._table = table
        known, tags = table.classes, table.tags
        if not table.declared:
            # Tags in which only some classes occur say nothing about the others; a trained network may know more.
            known += tuple(dict.fromkeys(name for name in data.class_subset if name not in known))
            tags = np.pad(tags, ((0, 0), (0, len(known) - len(table.classes))), constant_values=UNKNOWN)
        kept = kept_classes(data, known)
        self.classes = tuple(known[index] for index in kept)
        self.words = tuple(table.words.get(name, (name,)) for name in self.classes)
        self._all = TaggedImages(
            classes=self.classes,
            names=table.names,
            paths=table.paths,
            tags=tags[:, kept],
            folder=table.folder,
            white_level=data.white_level,
            windows=table.windows,
        )
        present = self._all.tagged
        self._negative = (table.tags == ABSENT).all(axis=1)
        self._usable = present.any(axis=1) | self._negative
        self._broken = np.zeros(len(table.paths), dtype=bool)
        self._sides, self._split_words = table.sides, ""
        if not table.listed:
            self._sides, self._split_words = choose_sides(data, table, present, self._negative)
        if isinstance(table.names, Column):
            self.untagged = tuple(take(table.names, np.flatnonzero(~self._usable)))
        else:
            tagged = {path for path, usable in zip(table.paths, self._usable.tolist(), strict=True) if usable}
            self.untagged = tuple(image_name(path) for path in table.every_path if path not in tagged)

    @property
    def has_validation(self) -> bool:
        """Whether there is a list or a side of images for validation."""
        if self._table.listed:
            return bool(self._data.val_list) and (self.root / self._data.val_list).is_file()
        return bool((self._sides == VALIDATION).any())

    @property
    def has_masks(self) -> bool:
        """Whether there is a folder of masks, or shards have some; their contents are not checked."""
        return self._mask_folder is not None or self._table.mask_of is not None

    def describe(self) -> str:
        """What was found, in one line."""
        parts = self._describe_lists() if self._table.listed else self._describe_sides()
        folder = self._mask_folder
        parts.append("no masks" if folder is None else f"masks in {path_below(folder, self.root)}")
        if folder is None and self.has_masks:
            parts[-1] = "masks in the shards"
        first = ", ".join(self.classes[:4]) + (", ..." if len(self.classes) > 4 else "")
        classes = f"{len(self.classes)} class{'' if len(self.classes) == 1 else 'es'} ({first})"
        return f"{self.root}: {self._table.origin}, {classes}; {', '.join((*parts, *self.remarks))}"

    def leave_out_broken(self, sides: Sequence[int] = (TRAIN, VALIDATION), *, list_file: str | None = None) -> None:
        """If `data.skip_broken` says so, read the images of some sides once and leave out those that cannot be read.

        Args:
            sides: `TRAIN`, `VALIDATION`.
            list_file: As of `train`.

        Raises:
            AfaError: A list is missing or names an unknown image; an image is missing.
        """
        if not self._data.skip_broken:
            return
        wanted = [side for side in sides if side == TRAIN or list_file is not None or self.has_validation]
        rows = np.unique(np.concatenate([self._rows(side, list_file) for side in wanted] or [np.zeros(0, np.int64)]))
        failures = []
        with image_progress("looking for broken images", total=len(rows)) as advance:

            def read(row: int) -> tuple[int, ...]:
                return self._all.image(row).shape

            for row, reading in read_ahead(read, rows.tolist()):
                try:
                    reading.result()
                except BrokenImageError as error:
                    self._broken[row] = True
                    failures.append(str(error))
                advance(1)
        if failures and shows_progress():
            say(f"{_images(len(failures), 'broken ')} of {len(rows):,} left out (first: {failures[0]})")

    def train(self, *, list_file: str | None = None) -> TaggedImages:
        """Images to train on: each has a tag, or is known to hold none of the classes.

        Args:
            list_file: List of names to take instead; relative to the root unless absolute.

        Raises:
            AfaError: There are none; the list is missing or names an unknown image; a listed image has no tag.
        """
        return self._tagged_images(TRAIN, list_file)

    def validation(self, *, list_file: str | None = None) -> TaggedImages:
        """Images set aside, by their tags alone: for scores that need no mask. Arguments as `train`."""
        return self._tagged_images(VALIDATION, list_file)

    def tagged(self) -> TaggedImages:
        """All images whose tags are known, on whatever side; of listed images those to train on."""
        if self._table.listed:
            return self.train()
        rows = np.flatnonzero(self._usable & ~self._broken)
        if not rows.size:
            raise AfaError(f"{self.root}: no image with a tag ({self._table.origin}); add some")
        return self._all.subset(rows)

    def masked(self, *, list_file: str | None = None) -> MaskedImages:
        """Images set aside that have masks. Arguments as `train`.

        Raises:
            AfaError: There are none, or a list names an image without mask; the list is missing or names an unknown
                image; what the values of masks mean is not known.
        """
        table, folder = self._table, self._mask_folder
        chosen = self._rows(VALIDATION, list_file)
        if not self.has_masks:
            place = self.root / (self._data.mask_dir if table.listed else "masks")
            raise AfaError(
                f"{place}: no folder of masks; put index PNGs there, named as the images, or set data.mask_dir"
            )
        if new := [name for name in self.classes if name not in table.classes]:
            raise AfaError(
                f"{self.root}: the tags never have class {new[0]!r}, so what the mask values mean is not known; "
                "write the classes to classes.txt in the order of the mask values"
            )
        if not chosen.size:
            raise AfaError(f"{self.root}: no images for validation ({self._split_words}); raise data.split_fraction")
        masks = self._find_masks(chosen)
        rows = np.array([row for row in chosen.tolist() if row in masks], dtype=np.int64)
        if not rows.size or (len(rows) < len(chosen) and (table.listed or list_file is not None)):
            missing = next(table.names[row] for row in chosen.tolist() if row not in masks)
            other = None if rows.size or folder is None else next(walk_files(folder, IMAGE_SUFFIXES), None)
            words = "add the masks" if other is None else f"{shown(other)} is there: name masks as their images, as PNG"
            count = f"{len(chosen) - len(rows)} of {len(chosen)} images have no mask"
            raise AfaError(f"{folder or self.root}: no {missing}.png ({count}); {words}, or set data.mask_dir")
        origin = table.origin
        if table.listed:
            origin = f"{self.root} (no tags file)" if table.tags_path is None else str(table.tags_path)
        return MaskedImages(
            **self._all.chosen(rows),
            has_tags=(table.tags[rows] != UNKNOWN).any(axis=1),
            mask_paths=[masks[row] for row in rows.tolist()],
            mask_values=self._mask_values(),
            origin=origin,
        )

    def _mask_values(self) -> dict[int, int]:
        """Stored value of a mask -> what it becomes: the classes that are left out are ignored."""
        classes, stated = self._table.classes, self._data.mask_values
        if len(stated) > 1 + len(classes) or len(set(stated)) < len(stated):
            raise AfaError(
                f"data.mask_values is {','.join(map(str, stated))}; give different values of the background and of the "
                f"{len(classes)} classes, in their order"
            )
        places = {name: place for place, name in enumerate(self.classes, start=1)}
        becomes = (0, *(places.get(name, IGNORE_INDEX) for name in classes))
        return dict(zip(stated or range(IGNORE_INDEX), becomes, strict=False))

    def _tagged_images(self, side: int, list_file: str | None) -> TaggedImages:
        rows = self._rows(side, list_file)
        if self._table.listed:
            self._require_tags(rows, self.root / (self._list_of(side) if list_file is None else list_file))
        rows = rows[self._usable[rows]]
        if not rows.size:
            purpose = "to train on" if side == TRAIN else "for validation"
            words = f"{self._table.origin}; {self._split_words}"
            raise AfaError(f"{self.root}: no image with a tag {purpose} ({words}); add some")
        return self._all.subset(rows)

    def _rows(self, side: int, list_file: str | None) -> NDArray[np.int64]:
        """(n,) rows of the table that a list names, in its order, or that are on a side."""
        table, key = self._table, "--list"
        if list_file is None:
            if not table.listed:
                return np.flatnonzero((self._sides == side) & ~self._broken)
            list_file, key = self._list_of(side), f"data.{'train' if side == TRAIN else 'val'}_list"
        names = read_list(self.root, list_file, key=key, known=self._row_of)
        missing = [name for name in names if name not in self._row_of]
        if missing:
            source, remedy = table.origin, ""
            if table.listed:
                source, remedy = str(table.folder), ", add the files, or set data.image_dir"
            raise AfaError(
                f"{self.root / list_file}: {source} has no image {shown(missing[0])} ({len(missing)} of {len(names)} "
                f"names missing); correct the list{remedy}"
            )
        rows = np.array([self._row_of[name] for name in names], dtype=np.int64)
        repeated = set(range(len(table.names))).difference(self._row_of.values())  # only lists care
        twice = next((row for row in sorted(repeated) if table.names[row] in names), None)
        if twice is not None:
            kept = table.paths[self._row_of[table.names[twice]]]
            raise AfaError(f"{table.folder}: {table.paths[twice]} and {kept} have the same name; keep one of them")
        return rows[~self._broken[rows]]

    def _list_of(self, side: int) -> str:
        return self._data.train_list if side == TRAIN else self._data.val_list

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self._table.names)}

    def _require_tags(self, rows: NDArray[np.int64], source: Path) -> None:
        """Refuse listed images without tags."""
        table = self._table
        if table.tags_path is None:
            raise AfaError(f"{self.root}: no tags; set data.tags, or put a tags.csv with the header image,tags there")
        tagged = (table.tags == PRESENT).any(axis=1) | self._usable
        if without := rows[~tagged[rows]].tolist():
            raise AfaError(
                f"{table.tags_path}: image {table.names[without[0]]!r} has no tags ({len(without)} of {len(rows)} "
                f"images in {source}); tag it or take it off the list"
            )
        if without := rows[~self._usable[rows]].tolist():
            raise AfaError(
                f"{source}: image {table.names[without[0]]!r} has no tag of data.class_subset ({len(without)} of "
                f"{len(rows)} images); use a list of images with {', '.join(self.classes)}"
            )

    @cached_property
    def _mask_folder(self) -> Path | None:
        places = [self._data.mask_dir] if self._table.listed else [self._data.mask_dir, "masks", "SegmentationClass"]
        return next((self.root / place for place in places if (self.root / place).is_dir()), None)

    def _find_masks(self, rows: NDArray[np.int64]) -> dict[int, Path]:
        """The mask of each row that has one: its path without suffix is the name, perhaps without leading folders.

        Where all masks are named alike in another way, such as NAME_mask.png, that is seen.
        """
        folder, of = self._mask_folder, self._table.mask_of
        if folder is None:
            return {row: path for row in rows.tolist() if of is not None and (path := of(row)) is not None}
        chosen = set(rows.tolist())
        masks = unadorned([self._table.names[row] for row in rows.tolist()], walk_files(folder, {".png"}))
        row_of: dict[str, int] = {}
        # Of all images, so that the sides of a split do not decide whether names are clear.
        for row, name in enumerate(self._table.names):
            parts = name.split("/")
            cuts = range(1 if self._table.listed else len(parts))
            stem = next((stem for cut in cuts if (stem := "/".join(parts[cut:])) in masks), None)
            if stem in row_of and chosen & {row, row_of[stem]}:
                other = self._table.names[row_of[stem]]
                raise AfaError(
                    f"{folder / masks[stem]}: images {shown(other)} and {shown(name)} would share this mask; put "
                    "masks into the same folders as the images"
                )
            if stem is not None:
                row_of[stem] = row
        return {row: folder / masks[stem] for stem, row in row_of.items() if row in chosen}

    def _describe_lists(self) -> list[str]:
        parts = []
        for side, purpose in ((TRAIN, "to train on"), (VALIDATION, "for validation")):
            name = self._list_of(side)
            if name and (self.root / name).is_file():
                count = len(read_list(self.root, name, key="data.train_list", known=self._row_of))
                parts.append(f"{_images(count)} {purpose} ({name})")
        tags = self._table.tags_path
        return [*parts, "no tags" if tags is None else f"tags from {path_below(tags, self.root)}"]

    def _describe_sides(self) -> list[str]:
        train, validation = (int((self._usable & (self._sides == side)).sum()) for side in (TRAIN, VALIDATION))
        parts = [f"{_images(train)} to train on", f"{validation} for validation ({self._split_words})"]
        if neither := int((self._sides == TEST).sum()):
            parts.append(f"{neither} in a test split left out")
        if empty := int((self._negative & (self._sides != TEST)).sum()):
            parts.append(f"{empty:,} of them without any class")
        if self.untagged:
            parts.append(f"{len(self.untagged)} without tags left out")
        return parts


def _images(count: int, kind: str = "") -> str:
    return f"{count:,} {kind}image{'' if count == 1 else 's'}"
