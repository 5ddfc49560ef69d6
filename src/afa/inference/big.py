"""Masks of images that are read in rows and predicted in tiles: from disk to disk, whatever their size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.data.images import MAX_PIXELS
from afa.data.palette import overlay as lay_over
from afa.data.palette import write_index_png
from afa.data.rows import Rows
from afa.data.tiff import write_label_tiff
from afa.inference.tiling import Tiling
from afa.runs.files import write_whole
from afa.runtime import image_progress, say

Bands = Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8]]]
"""(n, W, 3) uint8 RGB rows of an image with their (n, W) uint8 class indices, from the top."""

OVERLAY_SIDE: Final = 2048
"""Overlays of images that are longer are made from every n-th pixel, to be no longer than this."""


@dataclass(frozen=True)
class Large:
    """How the masks of images that are too large for one view are made.

    Attributes:
        tiling: Says which images these are.
        open: Opens the image of a name; any thread may call it.
        bands: Makes the mask of an opened image of a name.
    """

    tiling: Tiling
    open: Callable[[str], Rows]
    bands: Callable[[str, Rows], Bands]

    def has(self, name: str) -> bool:
        """Whether an image is one of these."""
        with self.open(name) as rows:
            return self.tiling.covers(rows.size)

    def announce(self, names: Sequence[str]) -> None:
        """Say in a line that these images are made in tiles."""
        with self.open(names[0]) as rows:
            (height, width), (down, across), side = rows.size, self.tiling.count(rows.size), self.tiling.side
        more = f"; {len(names) - 1} more images in tiles too" if len(names) > 1 else ""
        say(f"{names[0]}: {width} x {height} pixels, in {down * across} tiles of at most {side} x {side}{more}")

    def write(self, out_dir: Path, name: str, *, title: str, overlay: bool) -> None:
        """Make and write the mask of an image."""
        with self.open(name) as rows:
            down, _ = self.tiling.count(rows.size)
            with image_progress(f"{title}: rows of tiles of {name}", total=down, unit="rows") as advance:

                def counted() -> Bands:
                    for band in self.bands(name, rows):
                        yield band
                        advance(1)

                write_bands(out_dir, name, rows, counted(), overlay=overlay)


def write_bands(out_dir: Path, name: str, rows: Rows, bands: Bands, *, overlay: bool) -> None:
    """Write the mask of an image while it is being made, and what belongs to it.

    The mask of a TIFF is OUT/masks/NAME.tif, tiled, compressed, and where the image is on Earth; so is the mask of any
    image beyond `MAX_PIXELS`. Else it is OUT/masks/NAME.png.

    Raises:
        AfaError: The image is broken, or a file cannot be written; no mask is left then.
    """
    folder = out_dir / "masks"
    picture = _Overlay(rows.size)
    labels = picture.watch(bands)

    def write_overlay() -> None:
        if overlay:
            path = out_dir / "overlays" / f"{name}.jpg"
            write_whole(path, lambda file: picture.image().save(file, format="JPEG", quality=90))

    def write_tiff(file: BinaryIO) -> None:
        write_label_tiff(file, rows.size, labels, rows.geo)
        write_overlay()

    tiff, png = folder / f"{name}.tif", folder / f"{name}.png"
    if rows.is_tiff or rows.size[0] * rows.size[1] > MAX_PIXELS:
        write_whole(tiff, write_tiff)
        png.unlink(missing_ok=True)
    else:
        label = np.concatenate(list(labels))
        write_overlay()
        write_index_png(png, label)
        tiff.unlink(missing_ok=True)


class _Overlay:
    """A small picture of an image and its mask, collected while both pass by."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._step = -(-max(size) // OVERLAY_SIDE)
        self._pixels: list[NDArray[np.uint8]] = []
        self._labels: list[NDArray[np.uint8]] = []

    def watch(self, bands: Bands) -> Iterator[NDArray[np.uint8]]:
        """Hand the class indices on."""
        top, step = 0, self._step
        for pixels, label in bands:
            first = -top % step
            self._pixels.append(pixels[first::step, ::step].copy())
            self._labels.append(label[first::step, ::step].copy())
            top += len(label)
            yield label

    def image(self) -> Image.Image:
        """The colored class map over the image."""
        return Image.fromarray(lay_over(np.concatenate(self._pixels), np.concatenate(self._labels)))
