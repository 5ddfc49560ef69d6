from __future__ import annotations

import importlib.util
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from afa.data.files import find_images, walk_files
from afa.data.images import IMAGE_SUFFIXES, image_name, picture_pixels, read_image, read_levels, read_mask, read_size
from mistakes import refused, said


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def write_png(path: Path, *, width: int, height: int, depth: int, kind: int, rows: bytes) -> None:
    """A PNG written by hand, for what Pillow does not write (and for sizes that lie)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def message(path: Path) -> str:
    text = said(read_image, path)
    assert text.startswith(f"{path}: ")
    return text


def test_rgb_is_read_as_it_is(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, pixels)
    image[0] = 0  # a caller may write into it


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("L", "png"), ("P", "gif"), ("CMYK", "jpg"), ("YCbCr", "jpg"), ("L", "pgm")],
)
def test_other_color_modes_become_rgb(tmp_path: Path, pixels: np.ndarray, mode: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (5, 7, 3)
    assert image.dtype == np.uint8
    assert image.std() > 1
    if mode in ("1", "L"):
        np.testing.assert_array_equal(image[:, :, 0], image[:, :, 2])


@pytest.mark.parametrize(
    ("suffix", "kind", "values", "levels"),
    [
        ("png", np.uint16, [0, 257, 128 * 257, 65535], [0, 1, 128, 255]),
        ("tif", np.uint16, [0, 257, 128 * 257, 65535], [0, 1, 128, 255]),
        ("tif", np.int32, [0, 65535, 70000, -1], [0, 255, 255, 0]),
    ],
)
def test_deep_gray_is_scaled_not_cut(tmp_path: Path, suffix: str, kind: Any, values: Any, levels: Any) -> None:
    Image.fromarray(np.array([values], dtype=kind)).save(tmp_path / f"a.{suffix}")
    image, largest = read_levels(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(image, np.repeat(np.array(levels, dtype=np.uint8)[None, :, None], 3, 2))
    assert largest == max(values)


@pytest.mark.parametrize(("white_level", "levels"), [(4095, [0, 1, 128, 255, 255]), (2**31 - 1, [0] * 5)])
def test_the_white_level_is_the_range_of_deep_gray_alone(tmp_path: Path, white_level: int, levels: list[int]) -> None:
    Image.fromarray(np.array([[0, 16, 2048, 4095, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", white_level=white_level)[0, :, 0].tolist() == levels
    Image.fromarray(np.array([[0, 16, 255]], dtype=np.uint8)).save(tmp_path / "b.png")
    image, largest = read_levels(tmp_path / "b.png", white_level=white_level)
    assert image[0, :, 0].tolist() == [0, 16, 255]
    assert largest == 0


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_a_picture_in_memory_has_the_pixels_of_its_file(
    tmp_path: Path, mode: str, orientation: int, *, loaded: bool
) -> None:
    rng, exif = np.random.default_rng(0), Image.Exif()
    if mode.startswith("I"):
        picture = Image.fromarray(rng.integers(0, 65536, (5, 7)).astype(np.uint16 if ";" in mode else np.int32))
    else:
        picture = Image.fromarray(rng.integers(0, 256, (5, 7, 4), dtype=np.uint8)).convert(mode)
    exif[0x0112] = orientation
    path = tmp_path / {"I": "a.tif", "CMYK": "a.jpg"}.get(mode, "a.png")
    picture.save(path, exif=exif)
    expected = read_image(path, white_level=20_000)
    assert expected.shape == ((5, 7, 3) if orientation == 1 else (7, 5, 3))
    with Image.open(path) as image:
        if loaded:
            image.load()
        found = picture_pixels(image, "it", white_level=20_000)
    np.testing.assert_array_equal(found, expected)


def test_pictures_in_memory_that_cannot_be_read(tmp_path: Path, pixels: np.ndarray) -> None:
    assert "it: floating-point" in said(picture_pixels, Image.new("F", (2, 2)), "it")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:80])
    with Image.open(tmp_path / "a.png") as image:
        assert "it: cannot be read as an image (" in said(picture_pixels, image, "it")


def test_16_bit_rgb_png(tmp_path: Path) -> None:
    row = b"\0" + struct.pack(">6H", 65535, 0, 32896, 0, 65535, 0)
    write_png(tmp_path / "a.png", width=2, height=1, depth=16, kind=2, rows=row)
    image, largest = read_levels(tmp_path / "a.png")
    assert image.tolist() == [[[255, 0, 128], [0, 255, 0]]]
    assert largest == -65535


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
        image.putpalette([10, 10, 10, 10, 10, 10])
        image.save(path, transparency=bytes([0, 255]))  # byte transparency: Pillow warns on conversion
    else:
        black = Image.new("RGBA", (2, 1), (10, 10, 10, 255))
        black.putpixel((0, 0), (10, 10, 10, 0))
        black.convert(mode).save(path)
    assert read_image(path).tolist() == [[[255] * 3, [10] * 3]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("suffix", "mode"), [("png", "RGB"), ("tif", "RGB"), ("tif", "L")])
def test_exif_orientation_is_applied(
    tmp_path: Path, pixels: np.ndarray, suffix: str, mode: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).convert(mode).save(tmp_path / "stored.png", exif=exif)
    Image.fromarray(pixels).convert(mode).save(path, exif=exif)
    with Image.open(tmp_path / "stored.png") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    np.testing.assert_array_equal(read_image(path), expected)
    assert read_size(path) == expected.shape[:2]
    assert (expected.shape[0] == 7) == (orientation >= 5)


def test_broken_exif_is_no_reason_to_refuse(tmp_path: Path, pixels: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    start = content.index(b"Exif\0\0") + 6
    content[start + 4 : start + 8] = b"\xff\xff\xff\xff"  # offset of the first directory
    (tmp_path / "a.jpg").write_bytes(content)
    assert read_image(tmp_path / "a.jpg").shape == (5, 7, 3)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such image; check the path"), (b"", "empty (0 bytes)"), (b"no pixels", "Pillow can read; replace")],
)
def test_not_an_image(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    assert words in message(tmp_path / "a.jpg")
    assert "is a folder" in message(tmp_path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    text = message(path)
    words = "truncated" if suffix == "jpg" else "cannot be read as an image ("
    assert words in text or (suffix != "jpg" and "not an image" in text)
    assert text.endswith("replace it or leave it out")


def test_too_many_pixels(tmp_path: Path) -> None:
    for side in (10_000, 60_000):  # Pillow warns of the first and refuses the second
        write_png(tmp_path / "a.png", width=side, height=side, depth=8, kind=0, rows=b"\0")
        assert "more than 89,478,485 pixels; scale" in message(tmp_path / "a.png")


def test_no_pixels_or_pixels_without_a_range(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", width=0, height=4, depth=8, kind=0, rows=b"\0" * 4)
    message(tmp_path / "a.png")
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "a.tif")
    assert "floating-point pixels" in message(tmp_path / "a.tif")


def test_mask_gives_the_stored_indices(tmp_path: Path) -> None:
    label = np.array([[0, 1, 255], [20, 3, 0]], dtype=np.uint8)
    image = Image.fromarray(label)
    image.save(tmp_path / "gray.png")
    image.putpalette(bytes(range(256)) * 3)
    image.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "gray.png"), label)
    np.testing.assert_array_equal(read_mask(tmp_path / "palette.png"), label)


@pytest.mark.parametrize(
    ("mode", "suffix", "found"), [("RGB", "png", "PNG of mode RGB"), ("L", "jpg", "JPEG of mode L")]
)
def test_mask_of_another_kind(tmp_path: Path, mode: str, suffix: str, found: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, (4, 4)).save(path)
    with refused(f"{path}: is a {found}; save ", "index PNG"):
        read_mask(path)


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "sub/c.webp", "notes.txt", ".hidden.png", ".git/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    inside = [tmp_path / name for name in ("a.png", "b.JPG", "sub/c.webp")]
    assert find_images([tmp_path]) == inside
    notes = tmp_path / "notes.txt"
    assert find_images([notes, tmp_path / "b.JPG", tmp_path]) == [notes, inside[1], inside[0], inside[2]]
    (tmp_path / "sub" / "link").symlink_to(tmp_path / ".git", target_is_directory=True)
    (tmp_path / "sub" / "circle").symlink_to(tmp_path, target_is_directory=True)
    assert find_images([tmp_path]) == [*inside, tmp_path / "sub" / "link" / "d.png"]


def test_litter_is_no_image(tmp_path: Path) -> None:
    """What file servers, notebooks and systems leave beside images."""
    litter = ("@eaDir/0.jpg/SYNOFILE_THUMB_M.jpg", ".ipynb_checkpoints/0-checkpoint.jpg", "__MACOSX/._0.jpg", "._0.jpg")
    for name in (*litter, "#recycle/0.jpg", "Thumbs.db", "$RECYCLE.BIN/0.jpg", "SYNOPHOTO_THUMB_B.jpg", "cat/0.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert find_images([tmp_path]) == [tmp_path / "cat" / "0.jpg"]
    passed: dict[str, Any] = {}
    assert list(walk_files(tmp_path, {".jpg"}, passed=passed)) == ["cat/0.jpg"]
    assert passed == {"": {}, "cat": {}}


def test_find_images_mistakes(tmp_path: Path) -> None:
    assert "no image in this folder; looked for .avif" in said(find_images, [tmp_path])
    assert "no such image or folder" in said(find_images, [tmp_path / "x.png"])


@pytest.mark.parametrize(
    ("content", "package"),
    [
        (b"\0\0\0\x18ftypheic", "pillow-heif"),
        (b"\xff\n" + b"\0" * 20, "pillow-jxl-plugin"),
        (b"\0\0\0\x18ftypisom", ""),
    ],
)
def test_a_format_of_a_plug_in_names_its_package(tmp_path: Path, content: bytes, package: str) -> None:
    """Whatever the suffix: phones call their HEIC files .jpg too. A film is no image."""
    if importlib.util.find_spec(package.removesuffix("-plugin").replace("-", "_") or "no_plugin"):
        pytest.skip("the plug-in is installed")
    (tmp_path / "a.jpg").write_bytes(content + b"\0" * 12)
    assert (f"pip install {package}" if package else "not an image that Pillow can read") in message(tmp_path / "a.jpg")


def test_every_suffix_is_one_that_pillow_or_a_plug_in_reads() -> None:
    plug_ins = {".heic", ".heif", ".hif", ".jxl"}
    Image.init()
    assert IMAGE_SUFFIXES - plug_ins <= set(Image.registered_extensions())


def test_find_images_tells_what_it_passes_over(tmp_path: Path) -> None:
    for name in ("a.png", "b.cr2", "c/d.CR2", "e.psd", "f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    remarks: list[str] = []
    assert find_images([tmp_path], remarks=remarks) == [tmp_path / "a.png"]
    assert remarks == [f"{tmp_path}: 2 .cr2 files passed over", f"{tmp_path}: 1 .psd file passed over"]
    with refused(f"{tmp_path / 'c'}: no image in this folder; 1 .cr2 file passed over; looked for"):
        find_images([tmp_path / "c"])


def test_image_name() -> None:
    assert [image_name(f"x{suffix}") for suffix in IMAGE_SUFFIXES] == ["x"] * len(IMAGE_SUFFIXES)
    assert image_name("2007.05_x") == "2007.05_x"
    assert image_name(".png") == ".png"
