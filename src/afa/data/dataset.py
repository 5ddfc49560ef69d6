"""Forms of a data set: a table of tags, images with tags, and images with tags and masks.

Training gets `TaggedImages`, which know no mask. Pixels are read, and checked, one image at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from afa.data.images import read_image, read_mask, read_size
from afa.data.members import Column, member_or_below, take
from afa.data.pixels import WHITE_LEVEL
from afa.errors import AfaError
from afa.types import IGNORE_INDEX

PRESENT: Final = 1
ABSENT: Final = 0
UNKNOWN: Final = -1
"""Whether an image has a class: yes, no, or unknown."""


_LOOKED_AT: Final = 100
"""Masks that are read before an evaluation, to see whether their values can be meant."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Where N images lie, for orders that fetch what they read.

    Attributes:
        shard: (N,) number of the shard of each image.
        size: Shards that are on this machine at a time.
        num_shards: How many there are.
    """

    shard: NDArray[np.int32]
    size: int
    num_shards: int

    def take(self, rows: NDArray[np.int64]) -> Windows:
        """Those of some images."""
        return Windows(self.shard[rows], self.size, self.num_shards)


class TaggedImages:
    """Images with their tags: all that training sees, for there is no way from here to a mask.

    Attributes:
        classes: The C class names; `tags` follows their order.
        names: Image names in the order of the list.
        white_level: Value of deep gray that is white.
        windows: For images of a store that do not all fit on this machine.
    """

    def __init__(
        self,
        *,
        classes: tuple[str, ...],
        names: Sequence[str],
        paths: Sequence[str | Path],
        tags: NDArray[np.bool_] | NDArray[np.int8],
        folder: Path = Path(),
        white_level: int = WHITE_LEVEL,
        windows: Windows | None = None,
    ) -> None:
        """Take N images.

        Args:
            classes: C class names.
            names: N image names.
            paths: N image files, below `folder` unless absolute.
            tags: (N, C) `PRESENT`, `ABSENT` or `UNKNOWN`, or whether a class is present.
            folder: Where relative paths begin.
            white_level: As of `afa.data.pixels.rgb_pixels`.
            windows: For images of a store that do not all fit on this machine.
        """
        assert tags.shape == (len(names), len(classes)), tags.shape
        assert len(paths) == len(names), (len(paths), len(names))
        self.classes = classes
        self.names = names
        self._folder = folder
        self.white_level = white_level
        self.windows = windows
        self._paths = paths if isinstance(paths, Column) else tuple(paths)
        self._tags = tags.astype(np.int8, copy=False)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def image_path(self, index: int) -> Path:
        """File of an image."""
        return member_or_below(self._folder, self._paths[index])

    def image(self, index: int) -> NDArray[np.uint8]:
        """Read an image: (H, W, 3) uint8 RGB; an `AfaError` if it is not readable."""
        return read_image(self.image_path(index), white_level=self.white_level)

    def tags(self, index: int) -> NDArray[np.float32]:
        """Tags of an image: (C,) float32, 1 where the class is tagged as present, else 0."""
        row: NDArray[np.float32] = (self._tags[index] == PRESENT).astype(np.float32)
        return row

    def targets(self, index: int) -> NDArray[np.float32]:
        """What a classifier is asked for: (C,) float32, as `tags`, and -1 where it is unknown."""
        row: NDArray[np.float32] = self._tags[index].astype(np.float32)
        return row

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> TaggedImages:
        """Some of the images, in the order of `indices`, by their tags alone."""
        return TaggedImages(**self.chosen(np.array(indices, dtype=np.int64)))

    def chosen(self, rows: NDArray[np.int64]) -> dict[str, Any]:
        """What `TaggedImages` takes of some of the images."""
        return {
            "classes": self.classes,
            "names": take(self.names, rows),
            "paths": take(self._paths, rows),
            "windows": self.windows and self.windows.take(rows),
            "tags": self._tags[rows],
            "folder": self._folder,
            "white_level": self.white_level,
        }

    @property
    def tagged(self) -> NDArray[np.bool_]:
        """(N, C), whether each class is tagged as present."""
        tagged: NDArray[np.bool_] = self._tags == PRESENT
        return tagged

    @property
    def negative(self) -> NDArray[np.bool_]:
        """(N,), whether an image is known to hold none of the classes."""
        negative: NDArray[np.bool_] = (self._tags == ABSENT).all(axis=1)
        return negative


class MaskedImages(TaggedImages):
    """Images with masks, for evaluation only. Tags may be missing: segmentation is scored without them."""

    def __init__(
        self,
        *,
        has_tags: NDArray[np.bool_],
        mask_paths: Sequence[Path],
        mask_values: Mapping[int, int],
        origin: str,
        **images: Any,
    ) -> None:
        """Take what evaluation needs.

        Args:
            has_tags: (N,), whether the tags have an entry for each image.
            mask_paths: N index PNGs.
            mask_values: Stored value, 0..255 -> what it becomes; 255 stays as it is unless it is there.
            origin: Where the tags came from, or should have, for messages.
            images: As of `TaggedImages`.
        """
        super().__init__(**images)
        assert len(mask_paths) == len(self), (len(mask_paths), len(self))
        self._has_tags = has_tags
        self._mask_paths = tuple(mask_paths)
        self._mask_values = dict(mask_values)
        lookup = np.full(256, -1, dtype=np.int16)
        lookup[IGNORE_INDEX] = IGNORE_INDEX
        lookup[list(self._mask_values)] = list(self._mask_values.values())
        self._lookup = lookup
        self._origin = origin

    def has_tags(self, index: int) -> bool:
        """Whether the tags have an entry for the image; the entry may be empty."""
        return bool(self._has_tags[index])

    def tags(self, index: int) -> NDArray[np.float32]:
        """Tags of an image, as `TaggedImages.tags`; an `AfaError` if there is no entry for it."""
        if not self._has_tags[index]:
            remedy = "add its tags, or score the segmentation, which needs none"
            raise AfaError(f"{self._origin}: no entry for image {self.names[index]!r}; {remedy}")
        return super().tags(index)

    def mask(self, index: int) -> NDArray[np.uint8]:
        """Read the true mask of an image.

        Returns:
            (H, W) uint8: 0 background, 1..C in the order of `classes`, 255 ignored and outside `class_subset`.

        Raises:
            AfaError: It is no readable index PNG, has another size than the image, or values beyond the classes.
        """
        path = self._mask_paths[index]
        mask = read_mask(path)
        size = read_size(self.image_path(index))
        if mask.shape != size:
            raise AfaError(
                f"{path}: the mask is {mask.shape[1]}x{mask.shape[0]} pixels and its image "
                f"{self.image_path(index).name} {size[1]}x{size[0]}; give both the same size"
            )
        known = self._lookup >= 0
        if not known.all() and not known[mask].all():
            beyond, last = mask[~known[mask]][0], len(self._mask_values) - 1
            raise AfaError(
                f"{path}: the mask has value {beyond}; use 0 for background, 1 to {last} for the classes, "
                f"{IGNORE_INDEX} for ignored pixels, or state the values in data.mask_values"
            )
        return self._lookup.astype(np.uint8)[mask]

    def check_values(self) -> None:
        """Look whether 255 may be meant as a class: where it is the only value beside 0, as far as masks can be read.

        As a rule one mask is read; at most a hundred, spread evenly, unless these have nothing but 0 and 255.

        Raises:
            AfaError: All masks have nothing but 0 and 255, which means that nothing is scored.
        """
        if IGNORE_INDEX in self._mask_values:
            return
        stride, has_ignored = max(1, len(self) // _LOOKED_AT), False
        order = sorted(range(len(self)), key=lambda index: index % stride)
        for count, index in enumerate(order):
            with contextlib.suppress(AfaError):  # whoever needs the mask will be told
                values = np.flatnonzero(np.bincount(read_mask(self._mask_paths[index]).ravel(), minlength=256))
                has_ignored |= bool((values == IGNORE_INDEX).any())
                if ((values > 0) & (values < IGNORE_INDEX)).any():
                    return
            if count >= _LOOKED_AT and not has_ignored:
                return
        if has_ignored:
            raise AfaError(
                f"{self._mask_paths[0].parent}: all {len(self)} masks have the values 0 and 255 alone, and 255 is "
                f"ignored; is it class {self.classes[0]!r}? set data.mask_values to 0,255, else give the classes the "
                f"values 1 to {len(self.classes)}"
            )


@dataclass(frozen=True, eq=False)
class TagTable:
    """What a reader finds in a folder: N images and their tags.

    Attributes:
        kind: `voc`, `table`, `imagefolder`, `hf`, `shards`, `coco`, `labelstudio`, `cvat`, `yolo` or `labelme`.
        origin: What was found, in a few words.
        classes: C class names: the values of masks, in order.
        tags: (N, C) `PRESENT`, `ABSENT` or `UNKNOWN`.
        sides: (N,) side of the split that the data states: of `afa.data.split`.
        folder: Folder that the paths are below.
        paths: N paths; of images in shards the paths of members.
        names: N names; different, unless the images are listed.
        colors: Class name -> (red, green, blue), where the class list has colors.
        words: Class name -> words, where the class list states some.
        declared: Whether the classes were stated, not just collected from the tags.
        every_path: Paths of all images of the folder, if those without tags are to be reported.
        listed: Whether lists say which images train, and which are for validation: the VOC layout.
        tags_path: File or folder of tags of listed images, if there is one.
        remarks: What was passed over, a phrase each.
        notes: What users should know of how the data were understood, one line each.
        mask_of: Path of the mask of a row, or None, where shards have masks.
        windows: As of `TaggedImages`.
    """

    kind: str
    origin: str
    classes: tuple[str, ...]
    tags: NDArray[np.int8]
    sides: NDArray[np.int8]
    folder: Path
    paths: Sequence[str | Path]
    names: Sequence[str]
    colors: dict[str, tuple[int, int, int]]
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    declared: bool = True
    every_path: tuple[str, ...] = ()
    listed: bool = False
    tags_path: Path | None = None
    remarks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    mask_of: Callable[[int], Path | None] | None = None
    windows: Windows | None = None
