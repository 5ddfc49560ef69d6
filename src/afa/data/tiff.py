"""Writes class maps of any size as tiled, compressed TIFF with the VOC palette, while they are being made."""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray
from PIL import TiffImagePlugin

from afa.data.palette import voc_palette

TILE: Final = 512
"""Side of the tiles of a TIFF, pixels."""


def write_label_tiff(
    file: BinaryIO,
    size: tuple[int, int],
    bands: Iterable[NDArray[np.uint8]],
    geo: Mapping[int, tuple[int, Any]],
) -> None:
    """Write class indices as a TIFF: palette of VOC, tiles, deflate.

    Args:
        file: Empty file that can seek.
        size: (height, width) of the map.
        bands: (n, W) uint8 class indices each, from the top; together H rows.
        geo: Further tags: (type, value) by tag, as `afa.data.rows.Rows.geo` has them.

    Raises:
        OSError: The file cannot be written, or would have more than 4 GB.
    """
    height, width = size
    file.write(b"II*\0\0\0\0\0")
    places, lengths = [], []
    across = -(-width // TILE)
    for band in _of_height(bands, TILE):
        padded = np.zeros((TILE, across * TILE), np.uint8)
        padded[: len(band), :width] = band
        for left in range(0, width, TILE):
            packed = zlib.compress(padded[:, left : left + TILE].tobytes())
            places.append(file.tell())
            lengths.append(file.write(packed))
    assert len(places) == across * -(-height // TILE), (len(places), size)
    start = file.tell() + file.write(b"\0" * (file.tell() % 2))
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[256], tags[257], tags[258], tags[259], tags[262], tags[277], tags[284] = width, height, 8, 8, 3, 1, 1
    tags[320] = tuple((voc_palette().astype(int) * 257).T.ravel().tolist())
    tags[322], tags[323] = TILE, TILE
    tags.tagtype[324] = tags.tagtype[325] = 4
    tags[324], tags[325] = tuple(places), tuple(lengths)
    for tag, (kind, value) in geo.items():
        tags.tagtype[tag] = kind
        # Pillow reads texts as Latin-1, and writes them as ASCII.
        tags[tag] = value.encode("latin-1") if isinstance(value, str) else value
    directory = tags.tobytes(start)
    if start + len(directory) >= 2**32:
        raise OSError(errno.EFBIG, "a TIFF holds at most 4 GB")
    file.write(directory)
    file.seek(4)
    file.write(struct.pack("<I", start))


def _of_height(bands: Iterable[NDArray[np.uint8]], height: int) -> Iterator[NDArray[np.uint8]]:
    """The same rows in bands of one height; the last may have fewer."""
    left: list[NDArray[np.uint8]] = []
    for band in bands:
        rows = np.concatenate([*left, band])
        whole = len(rows) // height * height
        yield from (rows[top : top + height] for top in range(0, whole, height))
        left = [rows[whole:]]
    if left and len(left[0]):
        yield left[0]
