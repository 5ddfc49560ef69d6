"""The layout of PASCAL VOC: lists of names, images, and tags from the first usual place."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from afa.config import DataConfig
from afa.data.classes import VOC_CLASSES, stated_classes
from afa.data.dataset import UNKNOWN, TagTable
from afa.data.files import ImageFiles
from afa.data.images import image_name
from afa.data.readers.base import entry_rows
from afa.data.readers.places import TagFile
from afa.data.readers.tag_files import read_tag_file
from afa.data.split import UNSTATED
from afa.errors import AfaError

_TAG_PLACES: Final = (
    "lists/tags.csv",
    "tags.csv",
    "lists/cls_labels_onehot.npy",
    "cls_labels_onehot.npy",
    "Annotations",
)


def has_lists(root: Path, data: DataConfig) -> bool:
    """Whether the lists exist, or are set."""
    lists = (data.train_list, data.val_list)
    return data.train_list != DataConfig().train_list or any(name and (root / name).is_file() for name in lists)


def read(root: Path, data: DataConfig) -> TagTable:
    """Read all images of the folder, and the tags of those that have any; the lists are left for later.

    Returns:
        A row for each image; the tags of images without an entry are unknown.

    Raises:
        AfaError: There is no folder of images; `data.tags` is set and missing; tags or classes cannot be read.
    """
    listed = stated_classes(data, root, default=VOC_CLASSES)
    folder = root / data.image_dir
    if not folder.is_dir():
        raise AfaError(f"{folder}: no such folder; set data.image_dir")
    images = ImageFiles(folder)
    paths = images.paths
    names = tuple([image_name(path) for path in paths])
    found = (root / place for place in _TAG_PLACES if (root / place).exists())
    tags_path = root / data.tags if data.tags else next(found, None)
    tags = np.full((len(names), len(listed.names)), UNKNOWN, dtype=np.int8)
    if tags_path is not None:
        entries = read_tag_file(TagFile(tags_path), listed.names, data.negatives, frozenset(names)).entries
        rows = [row for row, name in enumerate(names) if name in entries]
        tags[rows] = entry_rows([entries[names[row]] for row in rows], listed.names)
    return TagTable(
        kind="voc",
        origin="VOC layout",
        classes=listed.names,
        tags=tags,
        sides=np.full(len(names), UNSTATED, dtype=np.int8),
        folder=folder,
        paths=paths,
        names=names,
        colors=listed.colors,
        words=listed.words,
        listed=True,
        tags_path=tags_path,
        remarks=images.passed_over,
    )
