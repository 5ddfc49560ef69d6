"""Image and mask files to arrays: every common format becomes the same (H, W, 3) uint8 RGB.

What the pixels mean, and which file belongs to which name, is left to `afa.data.open`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from afa.errors import AfaError

IMAGE_SUFFIXES: Final = frozenset(
    ".avif .bmp .gif .jp2 .jpeg .jpg .pgm .png .pnm .ppm .tif .tiff .webp".split()  # noqa: SIM905
)
"""Suffixes of the files that count as images, lower case, with the dot."""

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

_T = TypeVar("_T")

# Pillow warns of oddities that it reads well nevertheless, such as broken EXIF. Images are decoded in threads, where a
# filter cannot be set for one call only.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image of any common format, which its content says, as upright (H, W, 3) uint8 RGB.

    The EXIF orientation is applied. Gray, palette, CMYK and 1-bit images are converted; 16-bit gray is
    divided by 257; transparent pixels are laid over white. Of an animation the first frame is read.

    Raises:
        AfaError: The file is missing, empty, truncated, not an image, too large to be meant (Pillow's
            limit of about 89 million pixels), or holds floating-point pixels.
    """

    def upright_rgb(image: Image.Image) -> NDArray[np.uint8]:
        image.load()
        # Not ImageOps.exif_transpose: it fails on broken EXIF that it would write back.
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
        return _to_rgb(image if turn is None else image.transpose(turn), path)

    return _decode(path, upright_rgb)


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of what `read_image` returns, pixels, from the header where the format allows; errors alike."""

    def upright_size(image: Image.Image) -> tuple[int, int]:
        if image.format == "TIFF":
            image.load()  # Pillow turns TIFFs itself, when it loads them.
        sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size if sideways else (image.height, image.width)

    return _decode(path, upright_size)


def read_mask(path: Path) -> NDArray[np.uint8]:
    """Read an index PNG: (H, W) uint8, its palette indices or gray values.

    Raises:
        AfaError: The file cannot be read (as `read_image`), or is not a PNG of mode P or L.
    """

    def indices(image: Image.Image) -> NDArray[np.uint8]:
        if image.format != "PNG" or image.mode not in ("P", "L"):
            raise AfaError(f"{path}: is a {image.format} of mode {image.mode}; save masks as index PNG of mode P or L")
        return np.array(image, dtype=np.uint8)

    return _decode(path, indices)


def image_name(text: str) -> str:
    """A path or text without its suffix, if that is one of `IMAGE_SUFFIXES`: the name of an image.

    >>> image_name("2007_000032.JPG"), image_name("v1.2_cat")
    ('2007_000032', 'v1.2_cat')
    """
    stem, dot, suffix = text.rpartition(".")
    return stem if stem and dot + suffix.lower() in IMAGE_SUFFIXES else text


def _decode(path: Path, read: Callable[[Image.Image], _T]) -> _T:
    """Open `path` and apply `read`; whatever is wrong with the file becomes one line that says so."""
    if not path.is_file():
        kind = "is a folder, not an image" if path.is_dir() else "no such image"
        raise AfaError(f"{path}: {kind}; check the path")
    if path.stat().st_size == 0:
        raise AfaError(f"{path}: the file is empty (0 bytes); replace it or leave it out")
    try:
        with Image.open(path) as image:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            return read(image)
    except AfaError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise AfaError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale the image down") from None
    except UnidentifiedImageError:
        raise AfaError(f"{path}: not an image that Pillow can read; replace it or leave it out") from None
    except Exception as error:  # Decoders raise nearly anything on a broken file.
        reason = " ".join(str(error).split())
        raise AfaError(f"{path}: cannot be read as an image ({reason}); replace it or leave it out") from None


def _to_rgb(image: Image.Image, path: Path) -> NDArray[np.uint8]:
    if image.mode == "F":
        raise AfaError(f"{path}: floating-point pixels have no known range; save as 8-bit or 16-bit")
    if image.mode.startswith("I"):
        gray = np.rint(np.clip(np.asarray(image), 0, 65535) / 257).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"), dtype=np.uint8)
