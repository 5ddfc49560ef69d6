"""Images read from the top, some rows at a time, so that their size does not decide how much memory they take.

PNG and TIFF are decoded piece by piece: a run of PNG rows, or a strip or tile of a TIFF, is handed to Pillow as an
image of its own. So every kind of pixel becomes what `afa.data.images.read_image` makes of it. Other formats are
decoded whole.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, TiffImagePlugin

from afa.data.images import MAX_PIXELS, check_pixels, open_image, read_image, reading
from afa.data.pixels import WHITE_LEVEL, rgb_pixels
from afa.errors import AfaError

MAX_STREAMED_PIXELS: Final = 2**32
"""Limit of images that are read in rows, if no other is stated."""

GEO_TAGS: Final = (33550, 33922, 34264, 34735, 34736, 34737)
"""TIFF tags that say where on Earth the pixels lie: scale, tie points, transformation, and the keys of GeoTIFF."""

Convert = Callable[[Image.Image], NDArray[np.uint8]]

_BAND_BYTES: Final = 2**24
_LANES: Final = {1: ("L",), 2: ("LA",), 3: ("RGB",), 4: ("RGBA",), 6: ("RGB", "RGB"), 8: ("RGBA", "RGBA")}
"""Bytes of a PNG's pixel -> modes of 8-bit images that have these bytes."""
_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Color type of a PNG -> samples of a pixel."""
_PIECE_TAGS: Final = (258, 259, 262, 266, 277, 284, 292, 293, 317, 320, 332, 338, 339, 347, 529, 530, 531, 532)
"""TIFF tags that say how the bytes of a strip or tile become pixels."""


class Rows:
    """An image that is read from the top; use it in a `with` statement.

    Args:
        path: Image file of any format that `read_image` reads.
        max_pixels: Limit of pixels; 0 is none, None is `MAX_STREAMED_PIXELS` for rows that are streamed, else
            `MAX_PIXELS`.
        white_level: As of `read_image`.
        convert: Makes an (h, w) uint8 array of a piece of a mask, where rows are streamed; None: colors.

    Attributes:
        size: (height, width) of the upright image.
        is_tiff: Whether the file is a TIFF.
        is_streamed: Whether the rows come piece by piece: PNG that is not interlaced, and TIFF, both stored upright
            and the TIFF in strips or tiles of a size that fits into memory.
        geo: Those of `GEO_TAGS` that the file has: (type, value) by tag.

    Raises:
        AfaError: As `read_image`.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_pixels: int | None = None,
        white_level: int = WHITE_LEVEL,
        convert: Convert | None = None,
    ) -> None:
        self.path = path
        with reading(path):
            self._image = open_image(path)
        self._max_pixels, self._white_level = max_pixels, white_level
        self._convert = convert or partial(rgb_pixels, white_level=white_level)
        try:
            with reading(path):
                self._look()
        except AfaError:
            self._image.close()
            raise
        self._bands = self._read()
        self._left: list[NDArray[np.uint8]] = []

    def _look(self) -> None:
        """Find out from the header what the image is."""
        stored = self._image
        self.is_tiff = isinstance(stored, TiffImagePlugin.TiffImageFile)
        self.geo: Mapping[int, tuple[int, Any]] = {}
        if isinstance(stored, TiffImagePlugin.TiffImageFile):
            tags = stored.tag_v2
            self.geo = {tag: (tags.tagtype[tag], tags[tag]) for tag in GEO_TAGS if tag in tags}
            self._pieces = _TiffPieces(stored)
            can_stream, is_turned = self._pieces.are_small, ExifTags.Base.Orientation in tags
        else:
            is_png = isinstance(stored, PngImagePlugin.PngImageFile)
            can_stream, is_turned = is_png and not stored.info.get("interlace"), False
            if is_png:
                stored.info.update(_late_info(self.path))
        # Not the method of PNG, which decodes the image.
        orientation = Image.Image.getexif(stored).get(ExifTags.Base.Orientation, 1)
        self.is_streamed = can_stream and orientation not in range(2, 9)
        sideways = orientation in (5, 6, 7, 8) and not is_turned  # Pillow turns the size of a TIFF by its tag.
        self.size = stored.size if sideways else (stored.height, stored.width)
        limit = MAX_STREAMED_PIXELS if self.is_streamed else MAX_PIXELS
        check_pixels(self.path, stored.size, limit if self._max_pixels is None else self._max_pixels)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._bands.close()
        self._image.close()

    def take(self, count: int) -> NDArray[np.uint8]:
        """Read the next rows: (count, W, 3) uint8 RGB, fewer at the end of the image.

        Raises:
            AfaError: The file is cut off or broken.
        """
        have = sum(map(len, self._left))
        while have < count:
            with reading(self.path):
                band = next(self._bands, None)
            if band is None:
                break
            self._left.append(band)
            have += len(band)
        found = self._left[0] if len(self._left) == 1 else np.concatenate(self._left or [np.empty((0, 0, 3), np.uint8)])
        self._left = [found[count:]] if len(found) > count else []
        return found[:count]

    def _read(self) -> Generator[NDArray[np.uint8], None, None]:
        """Bands of rows, (n, W, 3) each."""
        if not self.is_streamed:
            yield read_image(self.path, white_level=self._white_level, max_pixels=self._max_pixels)
        elif isinstance(self._image, PngImagePlugin.PngImageFile):
            with self.path.open("rb") as file:
                for band in _png_bands(file, self._image):
                    yield self._convert(band)
        else:
            with self.path.open("rb") as file:
                for top in range(0, self.size[0], self._pieces.height):
                    yield self._pieces.band(file, top, self._convert)


def _late_info(path: Path) -> Mapping[str | tuple[int, int], Any]:
    """EXIF and texts that a PNG has after its pixels, where Pillow looks only once it has decoded them."""
    with path.open("rb") as file, PngImagePlugin.PngStream(file) as stream:
        file.seek(8)
        is_late = False
        with contextlib.suppress(struct.error, SyntaxError):  # The file ends, or what follows is no part of it.
            while (chunk := stream.read())[0] not in (b"IEND", b"fcTL" if is_late else b""):
                name, place, length = chunk
                is_late |= name == b"IDAT"
                if is_late and name in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                    stream.call(name, place, length)
                    length = 0
                file.seek(length + 4, io.SEEK_CUR)
        return stream.im_info


def _png_bands(file: BinaryIO, image: ImageFile.ImageFile) -> Generator[Image.Image, None, None]:
    """Runs of rows of a PNG, as Pillow images.

    A row is stored as differences from the row above it. So each run begins with the last row of the run before,
    as it is; Pillow's own decoder undoes the differences. It does so for each byte of a pixel apart, hence pixels of 6
    or 8 bytes can go through it in halves.
    """
    file.seek(24)
    depth, kind = file.read(2)
    bits = depth * _CHANNELS[kind]
    width, height = image.size
    row_bytes, pixel_bytes = (width * bits + 7) // 8, max(1, bits // 8)
    count = max(1, _BAND_BYTES // row_bytes)
    above = np.zeros((1, 1 + row_bytes), np.uint8)
    content = _png_content(file, count * (1 + row_bytes))
    arguments = image.tile[0].args
    assert arguments is not None
    rawmode = arguments if isinstance(arguments, str) else arguments[0]
    for top in range(0, height, count):
        rows = min(count, height - top)
        stored = next(content, b"")
        if len(stored) < rows * (1 + row_bytes):
            raise OSError(f"the file is truncated after row {top + len(stored) // (1 + row_bytes)} of {height}")
        run = np.frombuffer(stored, np.uint8)[: rows * (1 + row_bytes)].reshape(rows, 1 + row_bytes)
        raw = _unfiltered(np.concatenate([above, run]), pixel_bytes)[1:]
        above[0, 1:] = raw[-1]
        band = Image.frombytes(image.mode, (width, rows), raw.tobytes(), "raw", rawmode)
        band.info = image.info
        if image.palette is not None:
            palette_mode, palette = image.palette.getdata()
            band.putpalette(palette, palette_mode)
        yield band


def _unfiltered(stored: NDArray[np.uint8], pixel_bytes: int) -> NDArray[np.uint8]:
    """Undo the differences of (n, 1 + row_bytes) stored rows, each after its kind: (n, row_bytes)."""
    count, width = len(stored), (stored.shape[1] - 1) // pixel_bytes
    modes = _LANES[pixel_bytes]
    part = pixel_bytes // len(modes)
    pixels = stored[:, 1:].reshape(count, width, pixel_bytes)
    done = np.empty_like(pixels)
    for lane, mode in enumerate(modes):
        own = slice(lane * part, (lane + 1) * part)
        rows = stored
        if len(modes) > 1:
            rows = np.concatenate([stored[:, :1], pixels[:, :, own].reshape(count, -1)], 1)
        lane_image = Image.frombytes(mode, (width, count), zlib.compress(rows.tobytes(), 0), "zip", mode, 0)
        done[:, :, own] = np.asarray(lane_image).reshape(count, width, part)
    return done.reshape(count, -1)


def _png_content(file: BinaryIO, size: int) -> Generator[bytes, None, None]:
    """What a PNG stores, unpacked, `size` bytes at a time and the rest last."""
    file.seek(8)
    unpack, found = zlib.decompressobj(), bytearray()
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name == b"IEND":
            break
        if name != b"IDAT":
            file.seek(length + 4, io.SEEK_CUR)
            continue
        while length and (packed := file.read(min(length, 2**16))):
            length -= len(packed)
            found += unpack.decompress(packed)
            while len(found) >= size:
                yield bytes(memoryview(found)[:size])
                del found[:size]
        file.seek(4, io.SEEK_CUR)
    yield bytes(found)


class _TiffPieces:
    """The strips or tiles of a TIFF, one below the other and side by side.

    Attributes:
        height: Rows of a piece.
        are_small: Whether a row of pieces fits into memory, and Pillow can decode a piece alone.
    """

    def __init__(self, image: TiffImagePlugin.TiffImageFile) -> None:
        tags = self._tags = image.tag_v2
        self._mode = image.mode
        self._size = (tags[257], tags[256])
        height, width = self._size
        is_tiled = 322 in tags
        self._width = tags[322] if is_tiled else width
        self.height = tags[323] if is_tiled else min(tags.get(278, height), height)
        offsets, counts = (tags.get(324, ()), tags.get(325, ())) if is_tiled else (tags.get(273, ()), tags.get(279, ()))
        if min(self._width, self.height) < 1:
            raise OSError("its strips or tiles have no pixels")
        self._planes = tags.get(277, 1) if tags.get(284, 1) == 2 else 1
        self._across = -(-width // self._width)
        self._is_tiled = is_tiled
        if tags.get(259, 1) == 1 and len(offsets) == 1 and not is_tiled:
            # Rows that are stored as they are can be cut anywhere.
            bits = tags.get(258, (1,))
            row_bytes = (width * (sum(bits) if len(bits) > 1 else bits[0] * tags.get(277, 1)) + 7) // 8
            self.height = min(height, max(1, _BAND_BYTES // row_bytes))
            offsets = [offsets[0] + top * row_bytes for top in range(0, height, self.height)]
            counts = [min(self.height, height - top) * row_bytes for top in range(0, height, self.height)]
        self._offsets, self._counts = offsets, counts
        wanted = self._planes * self._across * -(-height // self.height)
        is_known = min(len(offsets), len(counts)) >= wanted and tags.get(259, 1) != 6
        self.are_small = is_known and self._width * self._across * self.height <= MAX_PIXELS

    def band(self, file: BinaryIO, top: int, convert: Convert) -> NDArray[np.uint8]:
        """Decode the row of pieces that begins at a row of the image: (n, W, ...) uint8."""
        height, width = self._size
        rows = min(self.height, height - top)
        first = top // self.height * self._across
        per_plane = self._across * -(-height // self.height)
        shape = (self._width, self.height if self._is_tiled else rows)
        found = []
        for column in range(self._across):
            parts = [self._stored(file, plane * per_plane + first + column, top) for plane in range(self._planes)]
            piece = self._decoded(parts, shape) if all(parts) else Image.new(self._mode, shape)
            found.append(convert(piece)[:rows, : width - column * self._width])
        return np.concatenate(found, 1)

    def _stored(self, file: BinaryIO, place: int, top: int) -> bytes:
        """The bytes of a piece; none for one that is all 0 and therefore nowhere in the file."""
        if self._offsets[place] and not self._counts[place]:
            raise OSError(f"a strip or tile at row {top} of {self._size[0]} has no bytes")
        file.seek(self._offsets[place])
        stored = file.read(self._counts[place])
        if len(stored) < self._counts[place]:
            raise OSError(f"the file is truncated after row {top} of {self._size[0]}")
        return stored

    def _decoded(self, parts: list[bytes], shape: tuple[int, int]) -> Image.Image:
        """A piece as an image of its own, (width, height) pixels."""
        little = self._tags.prefix == b"II"
        head = b"II*\0\x08\0\0\0" if little else b"MM\0*\0\0\0\x08"
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        for tag in _PIECE_TAGS:
            if tag in self._tags:
                tags.tagtype[tag] = self._tags.tagtype[tag]
                tags[tag] = self._tags[tag]
        tags[256], tags[257] = shape
        tags[278], tags[279] = shape[1], tuple(map(len, parts))
        tags.tagtype[273] = tags.tagtype[279] = 4
        tags[273] = tuple(sum(map(len, parts[:index])) for index in range(len(parts)))  # Pillow adds where they begin.
        piece = TiffImagePlugin.TiffImageFile(io.BytesIO(b"".join([head, tags.tobytes(8), *parts])))
        piece.load()
        return piece
