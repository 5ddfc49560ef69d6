"""What all formats share: masks one at a time, an output that appears at the end, images, counts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from afa.data.images import IMAGE_SUFFIXES
from afa.data.members import MemberPath
from afa.errors import AfaError
from afa.runs.files import link_or_copy, unwritable
from afa.types import IGNORE_INDEX

MARKER: Final = ".afa-format"
"""File in each folder that is written here; a folder without it is never replaced."""


@dataclass(frozen=True)
class MaskItem:
    """An image and its mask.

    Attributes:
        name: Path of the image without suffix, `/` between folders; unique.
        image_path: Image file. Most formats only name it.
        mask_path: Index PNG of the upright image's size: 0 background, 1..C classes, 255 ignored.
    """

    name: str
    image_path: Path
    mask_path: Path

    @property
    def file_name(self) -> str:
        """The name with the image's suffix, by which other tools know the image."""
        if self.name.rpartition("/")[2] == self.image_path.name:
            return self.name  # `afa predict` keeps the suffix where two images have the same name
        suffix = self.image_path.suffix
        return self.name + suffix if suffix.lower() in IMAGE_SUFFIXES else self.name


@dataclass
class Tally:
    """What a format could not keep.

    Attributes:
        ignored_pixels: Ignored pixels (255) that became background or belong to no annotation.
        filled_holes: Holes that polygons cover.
        dropped_regions: Specks that got no polygon.
    """

    ignored_pixels: int = 0
    filled_holes: int = 0
    dropped_regions: int = 0


@dataclass
class Job:
    """A conversion that is under way.

    Attributes:
        masks: Items with their (H, W) uint8 masks, read one at a time; to be walked once.
        classes: The C class names; `classes[i]` has mask value i + 1.
        palette: (256, 3) uint8 RGB by mask value.
        target: Where the result will be.
        partial: Where it is written: a file, or a folder that exists.
        tally: Counts of what is lost.
    """

    masks: Iterator[tuple[MaskItem, NDArray[np.uint8]]]
    classes: tuple[str, ...]
    palette: NDArray[np.uint8]
    target: Path
    partial: Path
    tally: Tally = field(default_factory=Tally)

    def present(self, label: NDArray[np.uint8]) -> list[int]:
        """Values of the classes that an (H, W) mask shows, ascending, without background and ignored pixels."""
        return [
            value for value in np.flatnonzero(np.bincount(label.ravel())).tolist() if 0 < value <= len(self.classes)
        ]

    def count_ignored(self, label: NDArray[np.uint8]) -> None:
        """Count the ignored pixels of an (H, W) mask as lost."""
        self.tally.ignored_pixels += int(np.count_nonzero(label == IGNORE_INDEX))

    def write(self, name: str, content: str | bytes) -> None:
        """Write a text or bytes as a file, by its path below the folder, `/` between parts; folders are made."""
        path = self.place(name)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def place(self, name: str) -> Path:
        """The path of a file in the folder; the folders above it are made."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add_image(self, item: MaskItem, name: str) -> None:
        """Put an image file into the folder, as `name` below it: a hard link, or a copy, such as from a shard.

        Raises:
            AfaError: The image is not there.
        """
        source = item.image_path.resolve()
        if isinstance(source, MemberPath):
            self.write(name, source.read_bytes())
            return
        if not source.is_file():
            raise AfaError(f"{item.image_path}: no such image; keep the images where they were when predicted")
        link_or_copy(source, self.place(name))

    def image_path(self, item: MaskItem, name: str) -> Path:
        """Where an image lies: where it was, or if it is in a shard, below the folder, into which it is put."""
        if not isinstance(item.image_path, MemberPath):
            return item.image_path.absolute()
        self.add_image(item, name)
        return self.target.absolute() / name

    def color(self, value: int) -> tuple[int, int, int]:
        """RGB color of a mask value, 0..255 each."""
        red, green, blue = self.palette[value].tolist()
        return red, green, blue


class JsonList:
    """A JSON list that is written entry by entry to a binary file, which brings the brackets."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._separator = "\n"

    def add(self, entry: dict[str, Any]) -> None:
        """Write an entry."""
        self._file.write((self._separator + json.dumps(entry)).encode())
        self._separator = ",\n"


@contextlib.contextmanager
def replacing(target: Path, *, format: str) -> Iterator[Path]:
    """Give a place to write to, which takes the place of `target` when all has gone well.

    If anything fails, what was written is removed, and what `target` held stays.

    Args:
        target: File, if it has a suffix, or folder, to make or replace.
        format: Name for the marker of a folder.

    Yields:
        Path next to `target`: of a file that is not there yet, or of an empty folder.

    Raises:
        AfaError: The target is a folder that was not written here, or was changed since; something cannot be
            written.
    """
    is_folder = not target.suffix
    partial = target.with_name(f".{target.name}.partial")
    if foreign := _foreign(target, is_folder=is_folder):
        raise AfaError(f"{target}: {foreign}; move it, or choose another folder for the output")
    try:
        _remove(partial)  # Left by a call that was killed.
        (partial if is_folder else partial.parent).mkdir(parents=True, exist_ok=True)
        yield partial
        if is_folder:
            (partial / MARKER).write_text(f"{format}\n", encoding="utf-8")
            if target.is_dir():
                old = target.with_name(f".{target.name}.old")
                _remove(old)
                target.rename(old)
                partial.rename(target)
                _remove(old)
                return
        os.replace(partial, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(partial)
        if isinstance(error, OSError):
            raise unwritable(target, error) from None
        raise


def _foreign(target: Path, *, is_folder: bool) -> str:
    """Why `target` must not be replaced; empty if it may."""
    if not target.exists():
        return ""
    if target.is_dir() != is_folder:
        return "is a folder" if target.is_dir() else "is a file"
    if not is_folder or not any(target.iterdir()):
        return ""
    marker = target / MARKER
    if not marker.is_file():
        return "this folder was not written by afa"
    written = marker.stat().st_mtime_ns
    for path in target.rglob("[!.]*"):
        state = path.stat()
        # Linked images change without us, and readers leave caches.
        is_ours = path.is_file() and state.st_nlink == 1 and path.suffix != ".cache"
        if is_ours and state.st_mtime_ns > written:
            return f"{path.relative_to(target)} was changed after afa wrote it"
    return ""


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
