"""Images in rows: the pixels of `read_image`, whatever the format; TIFF masks; limits and broken files."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from afa.data import rows as rows_module
from afa.data.images import read_image, read_mask
from afa.data.palette import voc_palette
from afa.data.rows import Rows
from afa.data.tiff import write_label_tiff
from mistakes import refused, said

GEO = {33550: (12, (0.5, 0.5, 0.0)), 33922: (12, (0.0, 0.0, 0.0, 7.0, 8.0, 0.0)), 34735: (3, (1, 1, 0, 0))}

KINDS = ((0, 1, (1, 2, 4, 8, 16)), (2, 3, (8, 16)), (3, 1, (1, 2, 4, 8)), (4, 2, (8, 16)), (6, 4, (8, 16)))
"""Color type of a PNG, its samples a pixel, and its depths."""


@pytest.fixture(autouse=True)
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several bands in a small image."""
    monkeypatch.setattr(rows_module, "_BAND_BYTES", 1500)


def smooth(height: int, width: int, channels: int, *, kind: Any = np.uint8) -> np.ndarray:
    """Slopes and noise, for which PNG writers choose all kinds of differences."""
    noise = np.random.default_rng(0).integers(0, 9, (height, width, channels))
    slope = np.add.outer(3 * np.arange(height), 2 * np.arange(width))[:, :, None] + 9 * np.arange(channels)
    factor = 1 if kind == np.uint8 else 97
    return ((slope + noise) * factor % (np.iinfo(kind).max + 1)).astype(kind)


def assert_same_pixels(path: Path, *, is_streamed: bool = True) -> None:
    expected = read_image(path)
    with Rows(path) as rows:
        assert rows.size == expected.shape[:2]
        assert rows.is_streamed == is_streamed
        found = []
        while len(part := rows.take(13)):
            found.append(part)
    assert {len(part) for part in found[:-1]} <= {13}
    np.testing.assert_array_equal(np.concatenate(found), expected)


def png_bytes(width: int, height: int, depth: int, kind: int, rows: bytes, *, interlace: int = 0) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlace))]
    if kind == 3:
        chunks += [(b"PLTE", voc_palette().tobytes()[: 3 * 2**depth]), (b"tRNS", b"\0\x80")]
    packed = zlib.compress(rows)
    half = len(packed) // 2
    chunks += [(b"tEXt", b"a\0b"), (b"IDAT", packed[:half]), (b"IDAT", packed[half:]), (b"IEND", b"")]
    found = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + found


@pytest.mark.parametrize(
    ("depth", "kind", "channels"),
    [(depth, kind, channels) for kind, channels, depths in KINDS for depth in depths],
)
def test_png_of_every_kind(tmp_path: Path, depth: int, kind: int, channels: int) -> None:
    width, height = 37, 61
    stored = np.random.default_rng(0).integers(0, 256, (height, 1 + (width * depth * channels + 7) // 8), np.uint8)
    stored[:, 0] %= 5  # the kind of differences of a row
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(width, height, depth, kind, stored.tobytes()))
    assert_same_pixels(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_png_of_pillow(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(smooth(77, 93, 4)).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(smooth(77, 93, 1, kind=np.uint16)[:, :, 0])
    image.save(tmp_path / "a.png")
    assert_same_pixels(tmp_path / "a.png")


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_striped_tiff(tmp_path: Path, mode: str, compression: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if compression == "jpeg" and mode in ("P", "RGBA", "I;16"):
        return
    monkeypatch.setattr("PIL.TiffImagePlugin.STRIP_SIZE", 2000)
    image = Image.fromarray(smooth(77, 93, 4)).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(smooth(77, 93, 1, kind=np.uint16)[:, :, 0])
    image.save(tmp_path / "a.tif", compression=compression)
    assert_same_pixels(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("tile", [None, (32, 48)])
def test_tiff_of_another_writer(tmp_path: Path, kind: Any, planar: Any, tile: Any) -> None:
    tifffile = pytest.importorskip("tifffile", reason="tifffile writes the TIFFs of this test")
    pixels, path = smooth(77, 93, 3, kind=kind), tmp_path / "a.tif"
    stored = pixels if planar == "contig" else np.moveaxis(pixels, 2, 0)
    for settings in (
        {"byteorder": "<"},
        {"byteorder": ">"},
        {"bigtiff": True},
        {"compression": "zlib", "predictor": True},
    ):
        tifffile.imwrite(path, stored, photometric="rgb", planarconfig=planar, tile=tile, **settings)
        np.testing.assert_array_equal(read_image(path), pixels if kind == np.uint8 else pixels >> 8)
        assert_same_pixels(path)


def test_other_images_are_read_whole(tmp_path: Path) -> None:
    image = Image.fromarray(smooth(40, 50, 3))
    image.save(tmp_path / "a.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("turned.jpg", "turned.png", "turned.tif"):
        image.save(tmp_path / name, exif=exif)
    (tmp_path / "interlaced.png").write_bytes(png_bytes(1, 1, 8, 0, b"\0\x07", interlace=1))
    for path in tmp_path.iterdir():
        assert_same_pixels(path, is_streamed=False)


XMP = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/>'


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_images_are_turned_wherever_they_say_so(tmp_path: Path, orientation: int) -> None:
    """EXIF and XMP, before and after the pixels of a PNG, and XMP of a TIFF."""
    image, exif, content = Image.fromarray(smooth(40, 50, 3)), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    xmp = XMP % orientation
    image.save(content, format="png")
    pixels_end = len(content.getvalue()) - 12
    for name, (kind, data) in {
        "exif": (b"eXIf", exif.tobytes()[6:]),
        "xmp": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    }.items():
        chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for when, place in (("early", 33), ("late", pixels_end)):
            stored = content.getvalue()[:place] + chunk + content.getvalue()[place:]
            (tmp_path / f"{name}_{when}.png").write_bytes(stored)
    image.save(tmp_path / "xmp.tif", tiffinfo={700: xmp})
    turned = np.rot90(image, {1: 0, 3: 2, 6: -1}[orientation])
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_image(path), turned)
        assert_same_pixels(path, is_streamed=orientation == 1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_cut_off_file(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.TiffImagePlugin.STRIP_SIZE", 2000)
    path = tmp_path / f"a.{suffix}"
    content = io.BytesIO()
    Image.fromarray(smooth(90, 80, 3)).save(content, format="png" if suffix == "png" else "tiff")
    path.write_bytes(content.getvalue()[: len(content.getvalue()) * 2 // 3])
    with Rows(path) as rows:
        assert len(rows.take(10)) == 10
        with refused(f"{path}: cannot be read as an image (the file is truncated after row ", " of 90); replace it"):
            rows.take(80)


def tiff_bytes(tags: dict[int, int | tuple[int, ...]], strip: bytes = b"") -> bytes:
    """A TIFF of 9 x 7 pixels of 8-bit gray, packed in one strip at byte 8; `tags` win over this."""
    usual = {256: 9, 257: 7, 258: 8, 259: 8, 262: 1, 273: 8, 277: 1, 278: 7, 279: len(strip)}
    entries, more, start = b"", b"", 8 + len(strip)
    found = sorted((usual | tags).items())
    for tag, value in found:
        numbers = value if isinstance(value, tuple) else (value,)
        data = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(data) > 4:
            data, more = struct.pack("<I", start + 6 + 12 * len(found) + len(more)), more + data
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + data
    return struct.pack("<4sI", b"II*\0", start) + strip + struct.pack("<H", len(found)) + entries + bytes(4) + more


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        (
            {258: (16,) * 8, 262: 2, 277: 8, 338: (0,) * 5},
            "8 bands of 16 bits;extract 3;-b 1 -b 2 -b 3 -co PHOTOMETRIC=RGB",
        ),
        ({258: (8,) * 12, 277: 12, 338: (0,) * 11}, "12 bands of 8 bits;extract 3;-b 1 -b 2 -b 3 -co PHOTOMETRIC=RGB"),
        ({258: (16, 16), 277: 2, 338: 0}, "2 bands of 16 bits;extract 1;-b 1"),
        ({258: (16, 16), 277: 2, 338: 0, 339: (2, 2)}, "2 bands of 16 bits;extract 1;-b 1 -ot Byte -scale"),
        ({258: 64, 339: 3}, "1 band of 64 bits;save it with 8 bits;-ot Byte -scale"),
        ({258: (16,) * 3, 277: 3, 338: (0, 0)}, "3 bands of 16 bits;extract 3;-b 1 -b 2 -b 3 -co PHOTOMETRIC=RGB"),
    ],
)
def test_bands_that_are_no_picture(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tags: dict[int, Any], words: str
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])  # as on the command line
    path = tmp_path / "a.tif"
    path.write_bytes(tiff_bytes(tags))
    bands, remedy, options = words.split(";")
    for read in (read_image, Rows):
        text = said(read, path)
        assert text.startswith(f"{path}: {bands}, which Pillow does not take for a picture; {remedy}, for example by ")
        assert text.endswith(f" gdal_translate {options}")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({278: 0}, "its strips or tiles have no pixels"),
        ({322: 0, 323: 16, 324: 8, 325: 9}, "its strips or tiles have no pixels"),
        ({279: 0}, "a strip or tile at row 0 of 7 has no bytes"),
    ],
)
def test_strips_that_cannot_be(tmp_path: Path, tags: dict[int, Any], words: str) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff_bytes(tags, zlib.compress(bytes(63))))
    with refused(f"{path}: cannot be read as an image ({words}); replace it"), Rows(path) as rows:
        rows.take(7)


def test_strips_that_are_nowhere_are_black(tmp_path: Path) -> None:
    """GDAL leaves strips and tiles of zeros out (SPARSE_OK)."""
    path, strip = tmp_path / "a.tif", zlib.compress(bytes(range(27)))
    path.write_bytes(tiff_bytes({278: 3, 273: (0, 8, 0), 279: (0, len(strip), 0)}, strip))
    with Rows(path) as rows:
        found = rows.take(7)[:, :, 0]
    expected = np.zeros((7, 9), np.uint8)
    expected[3:6] = np.arange(27).reshape(3, 9)
    np.testing.assert_array_equal(found, expected)


def test_damaged_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(smooth(90, 80, 3)).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :: 40] = b"\xff" * len(content[len(content) // 2 :: 40])
    path.write_bytes(content)
    with Rows(path) as rows, refused(f"{path}: cannot be read as an image ("):
        rows.take(90)


def test_the_limit_of_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(70_000, 70_000, 8, 0, b""))
    with refused(f"{path}: more than 4,294,967,296 pixels", "--max-pixels"):
        Rows(path)
    with Rows(path, max_pixels=0) as rows:
        assert rows.size == (70_000, 70_000)
    with refused(f"{path}: more than 5 pixels"):
        Rows(path, max_pixels=5)
    Image.new("L", (4, 4)).save(tmp_path / "b.jpg")
    with refused("b.jpg: more than 15 pixels"):
        read_image(tmp_path / "b.jpg", max_pixels=15)
    assert read_image(tmp_path / "b.jpg", max_pixels=16).shape == (4, 4, 3)


def label_tiff(path: Path, label: np.ndarray, *, band: int, geo: Any = None) -> None:
    with path.open("wb") as file:
        bands = (label[top : top + band] for top in range(0, len(label), band))
        write_label_tiff(file, (label.shape[0], label.shape[1]), bands, geo or {})


@pytest.mark.parametrize("size", [(1, 1), (511, 600), (1024, 512), (1100, 30)])
def test_tiff_masks(tmp_path: Path, size: tuple[int, int]) -> None:
    label = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    path = tmp_path / "mask.tif"
    label_tiff(path, label, band=300)
    np.testing.assert_array_equal(read_mask(path), label)
    with Image.open(path) as image:
        assert image.getpalette() == voc_palette().ravel().tolist()
    with Rows(path, convert=np.asarray) as rows:
        np.testing.assert_array_equal(rows.take(700), label[:700])
        assert rows.take(700).size == label[700:].size
    assert_same_pixels(path)


def test_where_on_earth_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "a.tif"
    Image.fromarray(smooth(60, 40, 3)).save(source, tiffinfo={tag: value for tag, (_, value) in GEO.items()})
    with Rows(source) as rows:
        label_tiff(tmp_path / "mask.tif", np.zeros(rows.size, np.uint8), band=60, geo=rows.geo)
    with Image.open(tmp_path / "mask.tif") as mask:
        assert {tag: mask.tag_v2[tag] for tag in GEO} == {tag: value for tag, (_, value) in GEO.items()}
    with Rows(tmp_path / "mask.tif") as rows:
        assert set(rows.geo) == set(GEO)


def test_texts_about_the_earth_keep_their_bytes(tmp_path: Path) -> None:
    text = "Grün + 東|".encode()
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[34737], tags[34737] = 2, text
    Image.fromarray(smooth(9, 9, 3)).save(tmp_path / "a.tif", tiffinfo=tags)
    with Rows(tmp_path / "a.tif") as rows:
        label_tiff(tmp_path / "mask.tif", np.zeros(rows.size, np.uint8), band=9, geo=rows.geo)
    for name in ("a.tif", "mask.tif"):
        assert text + b"\0" in (tmp_path / name).read_bytes()


def test_other_readers_find_where_on_earth(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="tifffile reads the mask of this test")
    label = np.random.default_rng(0).integers(0, 256, (600, 700), dtype=np.uint8)
    label_tiff(tmp_path / "mask.tif", label, band=600, geo=GEO)
    with tifffile.TiffFile(tmp_path / "mask.tif") as file:
        page = file.pages[0]
        assert page.is_tiled
        assert page.geotiff_tags["ModelPixelScale"] == [0.5, 0.5, 0.0]
        np.testing.assert_array_equal(page.asarray(), label)
