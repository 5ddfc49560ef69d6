"""Data sets in the layout of PASCAL VOC: lists of names, images, tags, and masks for evaluation.

Other layouts, and which one a folder has, are `afa.data.layout`'s, which hands out the same two classes.

Training gets `TaggedImages`, which knows no mask; only `open_scored` looks at the mask folder. Everything
that can be wrong with names is found when a data set is opened; pixels are read, and checked,
one image at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from afa.config import DataConfig
from afa.data.classes import ClassList, read_class_list, read_lines
from afa.data.files import stem_of, walk_files
from afa.data.images import IMAGE_SUFFIXES, image_name, read_image, read_mask, read_size
from afa.data.tags import check_classes, read_tags, unknown_class
from afa.errors import AfaError
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

_TAG_PLACES: Final = (
    "lists/tags.csv",
    "tags.csv",
    "lists/cls_labels_onehot.npy",
    "cls_labels_onehot.npy",
    "Annotations",
)


class TaggedImages:
    """Images with their tags: all that training sees.

    There is no way from here to a mask. Built by `open_tagged`.

    Attributes:
        classes: The C class names; `tags` follows their order.
        names: Image names in the order of the list.
    """

    def __init__(
        self,
        *,
        classes: tuple[str, ...],
        names: tuple[str, ...],
        paths: Sequence[Path],
        tags: NDArray[np.bool_],
    ) -> None:
        assert tags.shape == (len(names), len(classes)), tags.shape
        assert len(paths) == len(names), (len(paths), len(names))
        self.classes = classes
        self.names = names
        self._paths = tuple(paths)
        self._tags = tags

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def image_path(self, index: int) -> Path:
        """File of an image."""
        return self._paths[index]

    def image(self, index: int) -> NDArray[np.uint8]:
        """Read an image.

        Returns:
            (H, W, 3) uint8 RGB.

        Raises:
            AfaError: The file is not a readable image.
        """
        return read_image(self._paths[index])

    def tags(self, index: int) -> NDArray[np.float32]:
        """Tags of an image.

        Returns:
            (C,) float32, 1 where the class is tagged as present, else 0.
        """
        row: NDArray[np.float32] = self._tags[index].astype(np.float32)
        return row


class ScoredImages(TaggedImages):
    """Images with masks, for evaluation only. Built by `open_scored`.

    Tags may be missing here: segmentation is scored without them.
    """

    def __init__(
        self,
        *,
        classes: tuple[str, ...],
        names: tuple[str, ...],
        paths: Sequence[Path],
        tags: NDArray[np.bool_],
        tagged: NDArray[np.bool_],
        mask_paths: Sequence[Path],
        mask_values: NDArray[np.uint8],
        origin: str,
    ) -> None:
        """Take also what evaluation needs.

        Args:
            classes: C class names.
            names: N image names.
            paths: N image files.
            tags: (N, C), False where there is no entry.
            tagged: (N,), whether the tags have an entry for the image.
            mask_paths: N index PNGs.
            mask_values: (1 + number of classes in the files,) the value that each stored one becomes.
            origin: Where the tags came from, or should have, for messages.
        """
        super().__init__(classes=classes, names=names, paths=paths, tags=tags)
        assert len(mask_paths) == len(names), (len(mask_paths), len(names))
        self._tagged = tagged
        self._mask_paths = tuple(mask_paths)
        self._mask_values = mask_values
        self._origin = origin

    def has_tags(self, index: int) -> bool:
        """Whether the tags have an entry for the image; the entry may be empty."""
        return bool(self._tagged[index])

    def tags(self, index: int) -> NDArray[np.float32]:
        """Tags of an image, as `TaggedImages.tags`.

        Raises:
            AfaError: There is no entry for the image; CAM labels cannot be scored without.
        """
        if not self._tagged[index]:
            raise AfaError(
                f"{self._origin}: no entry for image {self.names[index]!r}; "
                "add its tags, or score the segmentation, which needs none"
            )
        return super().tags(index)

    def mask(self, index: int) -> NDArray[np.uint8]:
        """Read the true mask of an image.

        Returns:
            (H, W) uint8, the image's size: 0 background, 1..C in the order of `classes`, 255 ignored. Classes
            outside `class_subset` are 255.

        Raises:
            AfaError: The file is not a readable index PNG, has another size than the image, or has values
                beyond the classes.
        """
        path = self._mask_paths[index]
        mask = read_mask(path)
        size = read_size(self._paths[index])
        if mask.shape != size:
            raise AfaError(
                f"{path}: the mask is {mask.shape[1]}x{mask.shape[0]} pixels and its image "
                f"{self._paths[index].name} {size[1]}x{size[0]}; give both the same size"
            )
        last = len(self._mask_values) - 1
        beyond = mask[(mask > last) & (mask != IGNORE_INDEX)]
        if beyond.size:
            raise AfaError(
                f"{path}: the mask has value {beyond[0]}; use 0 for background, 1 to {last} for the classes, "
                f"{IGNORE_INDEX} for ignored pixels"
            )
        values = np.full(256, IGNORE_INDEX, dtype=np.uint8)
        values[: last + 1] = self._mask_values
        return values[mask]


def open_tagged(data: DataConfig, *, list_file: str | None = None) -> TaggedImages:
    """Open images and tags for training. The mask folder is not touched.

    Args:
        data: Where things lie.
        list_file: List to use instead of `data.train_list`; relative to the root unless absolute.

    Returns:
        The listed images, each with at least one tag.

    Raises:
        AfaError: A folder, list, image or tag is missing; a list is empty or names an image twice; a class is
            unknown; `class_subset` leaves an image without a tag.
    """
    root = data_root(data)
    every_class = class_list(data, root).names
    kept = kept_classes(data, every_class)
    source, names = read_list(root, data.train_list if list_file is None else list_file, key="data.train_list")
    paths = _find_files(root / data.image_dir, names, IMAGE_SUFFIXES, source=source, key="data.image_dir")
    tags_path = find_tags(data, root)
    if tags_path is None:
        raise AfaError(f"{root}: no tags; set data.tags, or put one of these there: {', '.join(_TAG_PLACES)}")
    tags, _ = tag_matrix(tags_path, names, every_class)
    untagged = [name for name, row in zip(names, tags, strict=True) if not row.any()]
    if untagged:
        raise AfaError(
            f"{tags_path}: image {untagged[0]!r} has no tags ({len(untagged)} of {len(names)} images in "
            f"{source}); tag it or take it off the list"
        )
    tags = tags[:, kept]
    classes = tuple(every_class[index] for index in kept)
    emptied = [name for name, row in zip(names, tags, strict=True) if not row.any()]
    if emptied:
        raise AfaError(
            f"{source}: image {emptied[0]!r} has no tag of data.class_subset ({len(emptied)} of {len(names)} "
            f"images); use a list of images with {', '.join(classes)}"
        )
    return TaggedImages(classes=classes, names=names, paths=paths, tags=tags)


def open_scored(data: DataConfig, *, list_file: str | None = None) -> ScoredImages:
    """Open images with masks, and with tags where there are any, for evaluation.

    Args:
        data: Where things lie.
        list_file: List to use instead of `data.val_list`; relative to the root unless absolute.

    Returns:
        The listed images, each with a mask.

    Raises:
        AfaError: A folder, list, image or mask is missing; a list is empty or names an image twice; a class
            is unknown; `data.tags` is set and missing, or tags cannot be read.
    """
    root = data_root(data)
    every_class = class_list(data, root).names
    kept = kept_classes(data, every_class)
    source, names = read_list(root, data.val_list if list_file is None else list_file, key="data.val_list")
    paths = _find_files(root / data.image_dir, names, IMAGE_SUFFIXES, source=source, key="data.image_dir")
    masks = _find_files(root / data.mask_dir, names, {".png"}, source=source, key="data.mask_dir")
    tags_path = find_tags(data, root)
    if tags_path is None:
        tags, tagged = np.zeros((len(names), len(every_class)), dtype=bool), np.zeros(len(names), dtype=bool)
    else:
        tags, tagged = tag_matrix(tags_path, names, every_class)
    return ScoredImages(
        classes=tuple(every_class[index] for index in kept),
        names=names,
        paths=paths,
        tags=tags[:, kept],
        tagged=tagged,
        mask_paths=masks,
        mask_values=kept_values(kept, len(every_class)),
        origin=f"{root} (no tags file)" if tags_path is None else str(tags_path),
    )


def data_root(data: DataConfig) -> Path:
    """The folder of a data set.

    Raises:
        AfaError: `data.root` is empty or no folder.
    """
    if not data.root:
        raise AfaError("data.root is empty; set it to the folder of the data set")
    root = Path(data.root)
    if not root.is_dir():
        raise AfaError(f"{root}: no such folder; set data.root to the folder of the data set")
    return root


def class_list(data: DataConfig, root: Path, *, default: tuple[str, ...] = VOC_CLASSES) -> ClassList:
    """The class names that are stated: those of `data.classes`, else of classes.txt in the root, else `default`.

    Raises:
        AfaError: As `read_class_list`.
    """
    if data.classes:
        check_classes(data.classes, "data.classes")
        return ClassList(data.classes, {})
    path = root / "classes.txt"
    return read_class_list(path) if path.is_file() else ClassList(default, {})


def kept_classes(data: DataConfig, classes: Sequence[str]) -> list[int]:
    """The indices that `data.class_subset` keeps of the classes, in its order.

    Raises:
        AfaError: It names an unknown class, or one twice.
    """
    if len(set(data.class_subset)) != len(data.class_subset):
        raise AfaError(f"data.class_subset: class {_first_twice(data.class_subset)!r} is there twice; keep one")
    for name in data.class_subset:
        if name not in classes:
            raise AfaError(f"data.class_subset: unknown class {name!r}; {unknown_class(name, classes)}")
    return [classes.index(name) for name in data.class_subset or classes]


def kept_values(kept: Sequence[int], num_classes: int) -> NDArray[np.uint8]:
    """(1 + num_classes,) what each stored mask value becomes when only the classes `kept` count."""
    values = np.full(1 + num_classes, IGNORE_INDEX, dtype=np.uint8)
    values[0] = 0
    values[[index + 1 for index in kept]] = range(1, 1 + len(kept))
    return values


def read_list(root: Path, list_file: str, *, key: str) -> tuple[Path, tuple[str, ...]]:
    """Read a list of image names.

    Args:
        root: Folder that a relative path begins in.
        list_file: Text file with one image name a line; suffixes of images do not count.
        key: Setting that names the file, for messages.

    Returns:
        The file, and its names.

    Raises:
        AfaError: The file is missing, empty or no text, or names an image twice.
    """
    if not list_file:
        raise AfaError(f"{key} is empty; name a text file with one image name a line")
    path = root / list_file
    if not path.is_file():
        raise AfaError(f"{path}: no such list; set {key} to a text file with one image name a line")
    names = tuple(image_name(line) for line in read_lines(path))
    if not names:
        raise AfaError(f"{path}: the list is empty; write one image name a line")
    if len(set(names)) != len(names):
        raise AfaError(
            f"{path}: image {_first_twice(names)!r} is there twice ({len(names) - len(set(names))} lines "
            "too many); keep one line of each"
        )
    return path, names


def _first_twice(names: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _find_files(
    folder: Path, names: Sequence[str], suffixes: Collection[str], *, source: Path, key: str
) -> tuple[Path, ...]:
    """The file of each name, which is its path below `folder` without suffix; one listing finds them all."""
    if not folder.is_dir():
        raise AfaError(f"{folder}: no such folder; set {key}")
    found: dict[str, list[Path]] = {}
    for path in walk_files(folder, suffixes):
        found.setdefault(stem_of(path), []).append(folder / path)
    missing = [name for name in names if name not in found]
    if missing:
        raise AfaError(
            f"{source}: {folder} has no file for {missing[0]!r} ({len(missing)} of {len(names)} names "
            f"missing); add the files, correct the list, or set {key}"
        )
    for name in names:
        if len(found[name]) > 1:
            first, second = sorted(file.name for file in found[name])[:2]
            raise AfaError(f"{folder}: {first} and {second} have the same name; keep one of them")
    return tuple(found[name][0] for name in names)


def find_tags(data: DataConfig, root: Path) -> Path | None:
    """The file or folder of tags in the VOC layout: `data.tags`, else the first usual place that exists."""
    if data.tags:
        return root / data.tags
    return next((root / place for place in _TAG_PLACES if (root / place).exists()), None)


def tag_matrix(path: Path, names: Sequence[str], classes: Sequence[str]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(N, C) tags of the named images, and (N,) whether `path` has an entry for each."""
    entries = read_tags(path, classes)
    tagged = np.array([name in entries for name in names], dtype=bool)
    index = {name: position for position, name in enumerate(classes)}
    tags = np.zeros((len(names), len(classes)), dtype=bool)
    for row, name in enumerate(names):
        tags[row, [index[tag] for tag in entries.get(name, ())]] = True
    return tags, tagged
