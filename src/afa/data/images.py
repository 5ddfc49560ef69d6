"""Image and mask files to arrays: every common format becomes the same (H, W, 3) uint8 RGB.

What the pixels mean is up to `afa.data.pixels`; which file belongs to which name, to `afa.data.open`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from afa.data.members import MemberPath
from afa.data.pixels import WHITE_LEVEL, PixelError, load_pixels, rgb_pixels
from afa.errors import AfaError, BrokenImageError

IMAGE_SUFFIXES: Final = frozenset(
    ".avif .bmp .dib .gif .heic .heif .hif .j2k .jfif .jp2 .jpe .jpeg .jpg .jxl .mpo "  # noqa: SIM905
    ".pbm .pgm .png .pnm .ppm .qoi .tga .tif .tiff .webp".split()
)
"""Suffixes of the files that count as images, lower case, with the dot."""

MAX_PIXELS: Final = Image.MAX_IMAGE_PIXELS or 89_478_485
"""Limit of images that are held in memory, if no other is stated: Pillow's, against decompression bombs."""

_PLUGINS: Final = {
    "pillow_heif": ("HEIC", "pillow-heif"),
    "pillow_avif": ("AVIF", "pillow-avif-plugin"),
    "pillow_jxl": ("JPEG XL", "pillow-jxl-plugin"),
}
"""Module that teaches Pillow a format -> the format, and the package that has the module."""

_SAMPLE: Final = 16
_SAMPLE_BYTES: Final = 64 * 2**20

_HEIC: Final = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
"""Brands that files in HEIC and its relatives begin with."""

_OPENED: Final[dict[bytes, Callable[..., ImageFile.ImageFile]]] = {
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"\xff\xd8\xff": JpegImagePlugin.jpeg_factory,
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
}
"""First bytes of a file -> what opens it: `Image.open` itself knows one limit for all images of a process."""

_BANDS_UNKNOWN: Final = ("Invalid value for samples per pixel", "unknown data organization", "unknown pixel mode")
"""What Pillow says of TIFFs with bands that it does not know."""

_T = TypeVar("_T")

# Pillow warns of oddities that it reads well nevertheless, such as broken EXIF. Images are decoded in threads, where a
# filter cannot be set for one call only.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# Where nothing else takes them, Python prints the errors that Pillow logs before it raises its own.
logging.getLogger("PIL").addHandler(logging.NullHandler())
# Without libtiff, Pillow takes the first half of 16-bit planes that are not packed for 8-bit planes.
TiffImagePlugin.READ_LIBTIFF = True


def read_image(path: Path, *, white_level: int = WHITE_LEVEL, max_pixels: int | None = None) -> NDArray[np.uint8]:
    """Read an image of any common format, which its content says, as upright (H, W, 3) uint8 RGB.

    Args:
        path: The file.
        white_level: As of `rgb_pixels`, which says what becomes of the pixels.
        max_pixels: Limit of pixels; 0 is none, None is `MAX_PIXELS`.

    Raises:
        BrokenImageError: The file is empty, truncated, not an image, or holds floating-point pixels.
        AfaError: The file is missing, of a format that needs a package, or of more pixels than the limit.
    """
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    return _decode(path, lambda image: rgb_pixels(image, white_level=white_level), limit)


def read_levels(path: Path, *, white_level: int = WHITE_LEVEL) -> tuple[NDArray[np.uint8], int]:
    """The image as `read_image` returns it, and the largest value stored in it if it has more than 8 bits, else 0.

    Of colors, of which Pillow reads the upper 8 bits, the value is negative.
    """

    def levels(image: Image.Image) -> tuple[NDArray[np.uint8], int]:
        is_deep = any(";16" in str(part) for tile in getattr(image, "tile", ()) for part in tile[3:])
        pixels = rgb_pixels(image, white_level=white_level)
        if image.mode.startswith("I"):
            return pixels, max(0, int(np.asarray(image).max()))
        return pixels, -256 * int(pixels.max()) - 255 if is_deep else 0

    return _decode(path, levels)


def sample_peaks(count: int, path_of: Callable[[int], Path]) -> list[int]:
    """The largest values of up to 16 of `count` images, of those of more than 8 bits, gray; only these are decoded.

    `path_of` gives the file of an image, and is asked for the evenly spread ones that are looked at alone.
    """

    def largest(image: Image.Image) -> int:
        return int(np.asarray(image).max()) if image.mode.startswith("I") else 0

    peaks = []
    for path in map(path_of, range(0, count, max(1, count // _SAMPLE))[:_SAMPLE]):
        with contextlib.suppress(AfaError):  # whoever needs the image will be told
            if path.is_file() and path.stat().st_size <= _SAMPLE_BYTES:
                peaks.append(_decode(path, largest))
    return [peak for peak in peaks if peak > 0]


def level_warning(peaks: Sequence[int], white_level: int) -> str:
    """What to say of images of more than 8 bits by the largest values, as of `read_levels`; empty if all is well.

    >>> level_warning([4095, 4000], 65535)[-69:]
    '4095 of 65535, so they are nearly black; set data.white_level to 4095'
    """
    colors, peaks = [-peak for peak in peaks if peak < 0], [peak for peak in peaks if peak > 0]
    if colors and max(colors) <= WHITE_LEVEL // 4:
        return (
            f"the largest value of {len(colors)} images of 16-bit colors is {max(colors)} of {WHITE_LEVEL}, and only "
            "the upper 8 bits are read, so they are nearly black; save them as 8-bit colors"
        )
    largest = max(peaks, default=0)
    usual = next((2**bits - 1 for bits in (8, 10, 12, 14, 16) if largest < 2**bits), largest)
    words = f"the largest value of {len(peaks)} images of more than 8 bits that were read is {largest}"
    if 0 < largest <= white_level // 4:
        return f"{words} of {white_level}, so they are nearly black; set data.white_level to {usual}"
    if largest > white_level:
        return f"{words}, and all above {white_level} is white; set data.white_level to {usual}"
    return ""


def picture_pixels(image: Image.Image, where: str, *, white_level: int = WHITE_LEVEL) -> NDArray[np.uint8]:
    """The (H, W, 3) uint8 RGB pixels of a picture in memory, the same as those of its file; messages call it `where`.

    Raises:
        BrokenImageError: It cannot be decoded, or holds floating-point pixels.
    """
    try:
        return rgb_pixels(image, white_level=white_level)
    except Exception as error:  # Decoders raise nearly anything on a broken file.
        raise _unreadable(where, error) from None


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of what `read_image` returns, pixels, from the header where the format allows; errors alike."""

    def upright_size(image: Image.Image) -> tuple[int, int]:
        if image.format == "TIFF":
            load_pixels(image)  # Pillow turns TIFFs itself, when it loads them.
        sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size if sideways else (image.height, image.width)

    return _decode(path, upright_size)


def read_mask(path: Path) -> NDArray[np.uint8]:
    """Read an index PNG or TIFF: (H, W) uint8, its palette indices or gray values.

    Raises:
        AfaError: The file cannot be read (as `read_image`), or is not a PNG or TIFF of mode P or L.
    """

    def indices(image: Image.Image) -> NDArray[np.uint8]:
        if image.format not in ("PNG", "TIFF") or image.mode not in ("P", "L"):
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


def _decode(path: Path, read: Callable[[Image.Image], _T], max_pixels: int = MAX_PIXELS) -> _T:
    """Open `path` and apply `read`; whatever is wrong with the file becomes one line that says so."""
    with reading(path), open_image(path) as image:
        check_pixels(path, image.size, max_pixels)
        return read(image)


def check_pixels(path: Path, size: tuple[int, int], max_pixels: int) -> None:
    """Raise an `AfaError` if an image has more pixels than the limit; 0 is none."""
    if max_pixels and size[0] * size[1] > max_pixels:
        raise AfaError(f"{path}: more than {max_pixels:,} pixels; scale it down, or see --tiles and --max-pixels")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever is wrong with an image file into an `AfaError` of one line that says so."""
    if not path.is_file():
        kind = "is a folder, not an image" if path.is_dir() else "no such image"
        raise AfaError(f"{path}: {kind}; check the path")
    if path.stat().st_size == 0:
        raise BrokenImageError(f"{path}: the file is empty (0 bytes); replace it or leave it out")
    with _decoding(str(path)):
        yield


@contextlib.contextmanager
def _decoding(where: str, remedy: str = "save it as PNG, TIFF or JPEG") -> Iterator[None]:
    """Turn whatever is wrong with an image into an `AfaError` of one line that says so."""
    try:
        yield
    except AfaError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise AfaError(f"{where}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; {remedy}") from None
    except UnidentifiedImageError:
        raise BrokenImageError(f"{where}: not an image that Pillow can read; replace it or leave it out") from None
    except Exception as error:  # Decoders raise nearly anything on a broken file.
        raise _unreadable(where, error) from None


def decode_image(content: bytes, where: str, *, white_level: int = WHITE_LEVEL) -> NDArray[np.uint8]:
    """The image that `read_image` would read from a file with this content; formats that need a plug-in excepted.

    Messages call it `where`.

    Raises:
        BrokenImageError: As `read_image`.
        AfaError: It has more than `MAX_PIXELS` pixels.
    """
    if not content:
        raise BrokenImageError(f"{where}: the file is empty (0 bytes); choose another")
    with _decoding(where, "scale it down"):
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > MAX_PIXELS:
            raise AfaError(f"{where}: more than {MAX_PIXELS:,} pixels; scale it down")
        return rgb_pixels(image, white_level=white_level)


def _unreadable(where: str, error: Exception) -> BrokenImageError:
    if isinstance(error, PixelError):
        return BrokenImageError(f"{where}: {error}")
    reason = " ".join(str(error).split())
    return BrokenImageError(f"{where}: cannot be read as an image ({reason}); replace it or leave it out")


def open_image(path: Path) -> ImageFile.ImageFile:
    """Open an image file without its pixels; a plug-in of Pillow is loaded when a file needs it.

    Only files other than PNG, TIFF and JPEG are bound to the limit of pixels of `Image.open`.
    """
    source: Any = io.BytesIO(path.read_bytes()) if isinstance(path, MemberPath) else path
    with contextlib.nullcontext(source) if source is not path else path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
    for start, opened in _OPENED.items():
        if head.startswith(start):
            try:
                return opened(source)
            except SyntaxError as error:
                if str(error) in _BANDS_UNKNOWN:
                    raise PixelError(_bands_advice(path)) from None
                raise
    try:
        return Image.open(source)
    except UnidentifiedImageError:
        module = _plugin(path)
        if not module:
            raise
    if importlib.util.find_spec(module) is None:
        kind, package = _PLUGINS[module]
        raise AfaError(f"{path}: a picture in {kind} needs another package; pip install {package}")
    register = getattr(importlib.import_module(module), "register_heif_opener", None)
    if register is not None:  # the others are ready once they are imported
        register()
    return Image.open(source)


def _bands_advice(path: Path) -> str:
    """What to do about a TIFF with bands that Pillow does not take for a picture."""
    with path.open("rb") as file:
        head = file.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head + (file.read(8) if b"+" in head[2:4] else b""))
        file.seek(tags.next)
        tags.load(file)
    bands, bits, kind = tags.get(277, 1), max(tags.get(258, (1,))), max(tags.get(339, (1,)))
    words = f"{bands} band{'s' * (bands > 1)} of {bits} bits, which Pillow does not take for a picture"
    if bands == 1:
        return f"{words}; save it with 8 bits, for example by gdal_translate -ot Byte -scale"
    chosen = " -b 1 -b 2 -b 3 -co PHOTOMETRIC=RGB" if bands > 2 else " -b 1"
    scaled = "" if bits in (8, 16) and kind == 1 else " -ot Byte -scale"
    return f"{words}; extract {3 if bands > 2 else 1}, for example by gdal_translate{chosen}{scaled}"


def _plugin(path: Path) -> str:
    """The module of `_PLUGINS` that reads a file, by its first bytes; empty where none does."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[:2] == b"\xff\n" or head[4:8] == b"JXL ":
        return "pillow_jxl"
    if head[4:8] != b"ftyp":
        return ""
    return {b"avif": "pillow_avif", b"avis": "pillow_avif"}.get(
        head[8:12], "pillow_heif" if head[8:12] in _HEIC else ""
    )
