"""A data set of the `datasets` library as training images; the library itself is the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.data.classes import check_classes, check_count, unknown_class
from afa.data.dataset import PRESENT, UNKNOWN, TaggedImages
from afa.data.images import picture_pixels
from afa.data.pixels import WHITE_LEVEL
from afa.data.readers.base import TagEntry, entry_rows
from afa.data.readers.table import SINGLE_TAG_COLUMNS, TAG_COLUMNS
from afa.errors import AfaError, shown


class DatasetImages(TaggedImages):
    """Images of a `datasets.Dataset`, decoded by it one at a time. Built by `tagged_dataset`."""

    def __init__(
        self, dataset: Any, image_column: str, *, classes: tuple[str, ...], rows: NDArray[np.int64], **images: Any
    ) -> None:
        """Take N rows, (N,) int64, of the data set; `images` as of `TaggedImages`."""
        width = len(str(len(dataset)))
        names = tuple(f"{row:0{width}d}" for row in rows.tolist())
        super().__init__(classes=classes, names=names, paths=[Path(name) for name in names], **images)
        self._dataset, self._column, self._rows = dataset, image_column, rows

    def image(self, index: int) -> NDArray[np.uint8]:
        """Read an image, as `TaggedImages.image`."""
        row = int(self._rows[index])
        try:
            image = self._dataset[row][self._column]
        except Exception as error:  # Decoders raise nearly anything on a broken file.
            raise AfaError(f"row {row}: cannot be read as an image ({shown(str(error))}); leave it out") from None
        if not isinstance(image, Image.Image):
            raise AfaError(f"row {row}: {self._column!r} holds a {type(image).__name__}; cast it to datasets.Image()")
        return picture_pixels(image, f"row {row}", white_level=self.white_level)


def tagged_dataset(
    dataset: Any,
    *,
    image_column: str = "",
    tag_column: str = "",
    classes: tuple[str, ...] = (),
    white_level: int = WHITE_LEVEL,
) -> TaggedImages:
    """Take the images and tags of a `datasets.Dataset`.

    Args:
        dataset: One split, with a column of images and a column of tags: `ClassLabel`, a list of them, or texts.
        image_column: Column of the images; empty: the first of type `Image`.
        tag_column: Column of the tags; empty: the first usual name, such as tags, labels, label.
        classes: Class names in index order; none: those of the `ClassLabel`, else the tags, sorted.
        white_level: As of `afa.data.pixels.rgb_pixels`.

    Returns:
        The rows whose tags are known, named by their numbers; an empty list says that the image has none of the
        classes.

    Raises:
        AfaError: A column is missing or of another type; a class is unknown; no row has a tag.
    """
    features = getattr(dataset, "features", None)
    if not isinstance(features, dict):
        raise AfaError("the data set has no features; give one split of it, such as load_dataset(..., split='train')")
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    image_column = image_column or next(iter(images), "")
    if image_column not in images:
        raise AfaError(f"the data set has no image column {image_column!r}; its image columns: {', '.join(images)}")
    usual = [name for name in TAG_COLUMNS + SINGLE_TAG_COLUMNS if name in features]
    tag_column = tag_column or next(iter(usual), "")
    if tag_column not in features:
        raise AfaError(f"the data set has no tag column {tag_column!r}; its columns: {', '.join(features)}")
    feature = features[tag_column]
    labels = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    cells = dataset.select_columns([tag_column])[:][tag_column]
    rows = [tag_entry(value, labels, f"row {row}: column {tag_column!r}") for row, value in enumerate(cells)]
    classes = classes or tuple(labels or sorted({tag for entry in rows for tag in entry.tags}))
    check_classes(classes, f"column {tag_column!r}", none="each row is without a tag; name another column")
    check_count(classes, f"column {tag_column!r}")
    for row, entry in enumerate(rows):
        for tag in entry.tags:
            if tag not in classes:
                raise AfaError(f"row {row}: unknown tag {shown(tag)}; {unknown_class(tag[:100], classes)}")
    matrix = entry_rows(rows, classes)
    kept = np.flatnonzero((matrix != UNKNOWN).all(axis=1))
    if not (matrix == PRESENT).any():
        raise AfaError(f"no row of the data set has a tag in column {tag_column!r}; name another column")
    return DatasetImages(dataset, image_column, classes=classes, rows=kept, tags=matrix[kept], white_level=white_level)


def tag_entry(value: Any, labels: Sequence[str] | None, where: str) -> TagEntry:
    """The tags in a cell: texts, or numbers of `labels`, one or a list of them; unknown where there is no label.

    Raises:
        AfaError: A tag is neither, or a number without a name; `where` begins the message.
    """
    tags = []
    items = value if isinstance(value, list) else [value]
    is_known = items not in ([None], [-1])  # -1: no label
    for item in items if is_known else ():
        if labels is not None and isinstance(item, int):
            if not -1 <= item < len(labels):
                raise AfaError(
                    f"{where} holds {item}, and the {len(labels)} names have numbers from 0; correct it, or write -1 "
                    "for no label"
                )
            if item >= 0:
                tags.append(labels[item])
        elif isinstance(item, str):
            tags.append(item)
        else:
            raise AfaError(f"{where} holds {shown(item)}; cast it to ClassLabel, or give the names")
    return TagEntry("", "", tuple(tags), unknown=() if is_known else None)
