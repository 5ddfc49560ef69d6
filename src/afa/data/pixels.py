"""What the pixels of a picture are: one function for files, for pictures in memory, and beside exported networks.

It needs NumPy and Pillow alone, not afa: `afa export` writes a copy of this file beside a network.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

WHITE_LEVEL: Final = 65535
"""Value of 16-bit gray that is white, unless something else is stated."""

_UPRIGHT: Final[dict[object, Image.Transpose]] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""


class PixelError(ValueError):
    """The picture has pixels that have no meaning as colors; the text says which, and what to do."""


def rgb_pixels(image: Image.Image, *, white_level: int = WHITE_LEVEL) -> NDArray[np.uint8]:
    """Turn a picture of any mode, loaded or not, into upright (H, W, 3) uint8 RGB.

    The EXIF orientation is applied. Gray, palette, CMYK and 1-bit pictures are converted; gray of more than 8 bits is
    scaled so that `white_level` becomes 255; of 16-bit colors Pillow reads the upper 8 bits; transparent pixels are
    laid over white. Of an animation the frame that it stands at is taken, the first one of a file.

    Args:
        image: The picture; it stays as it is.
        white_level: Value of gray of more than 8 bits that is white; above it, all is white.

    Raises:
        PixelError: Its pixels are floating-point numbers.
        OSError: It is read from a broken file; decoders raise other exceptions too.
    """
    load_pixels(image)
    # Not ImageOps.exif_transpose: it fails on broken EXIF that it would write back.
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F":
        raise PixelError("floating-point pixels have no known range; save as 8-bit or 16-bit")
    if image.mode.startswith("I"):
        levels = np.clip(np.asarray(image, dtype=np.int32), 0, white_level)
        gray = np.rint(levels * (255 / white_level)).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"), dtype=np.uint8)


def load_pixels(image: Image.Image) -> None:
    """Decode a picture where it is. Pillow (13.0) garbles TIFFs that lie on their side if it maps them into memory."""
    name = getattr(image, "filename", "")
    if image.format != "TIFF" or not name or image.getexif().get(ExifTags.Base.Orientation) not in (5, 6, 7, 8):
        image.load()
        return
    try:
        image.filename = ""  # type: ignore[attr-defined]
        image.load()
    finally:
        image.filename = name  # type: ignore[attr-defined]
