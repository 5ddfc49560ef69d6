"""Pixels of large images, decoded once into files of which a crop reads its part alone."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from afa.data.dataset import TaggedImages
from afa.data.images import read_size
from afa.runs.files import write_whole

LARGE_PIXELS: Final = 2**24
"""Images with more pixels are large: decoding one takes longer than a training step."""


class LargeImages:
    """Files of the pixels of large images, which this and later calls share. Threads may share an object.

    Args:
        images: The images.
        folder: Where the files lie; made when the first one comes.
        max_bytes: Disk that they may take; images beyond it are decoded each time.
    """

    def __init__(self, images: TaggedImages, folder: Path, max_bytes: int) -> None:
        self._images, self._folder, self._left = images, folder, max_bytes
        self._files: dict[int, Path | None] = {}
        self._lock = threading.Lock()

    def image(self, index: int) -> NDArray[np.uint8] | None:
        """The pixels of an image, (H, W, 3) uint8 RGB on disk; None if it is not large, or there is no room for it.

        Raises:
            AfaError: The image is not readable; the file cannot be written.
        """
        if index not in self._files:
            with self._lock:
                if index not in self._files:
                    self._files[index] = self._unpack(index)
        path = self._files[index]
        return None if path is None else np.load(path, mmap_mode="r")

    def _unpack(self, index: int) -> Path | None:
        source = self._images.image_path(index)
        if not source.is_file():
            return None
        height, width = read_size(source)
        if height * width <= LARGE_PIXELS or 3 * height * width > self._left:
            return None
        status = source.stat()
        key = f"{source.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{self._images.white_level}"
        path = self._folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.npy"
        if not path.is_file():
            pixels = self._images.image(index)
            write_whole(path, lambda file: np.save(file, pixels), remedy="free space, or set data.large_gib to 0")
        self._left -= 3 * height * width
        return path
