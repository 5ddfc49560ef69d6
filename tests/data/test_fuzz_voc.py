"""No VOC XML, list, mask or image file gives a traceback; the other readers are fuzzed in test_layout.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from afa.config import DataConfig
from afa.data.images import read_image, read_mask
from afa.data.open import open_data
from afa.errors import AfaError

XML = (
    b'<?xml version="1.0" encoding="utf-8"?><annotation><filename>a.jpg</filename><object><name>cat</name><bndbox/>'
    b"</object><object><name>dog</name></object></annotation>"
)
PUT = st.sampled_from([b"<", b">", b"&", b"<!DOCTYPE x>", b"<name>", b"\0", b"\xff", b"\n", b'"', b"../x"])
NAMES = st.sampled_from(list("ab/\\.\n\r\t\0 é#"))
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc")
    for folder in ("JPEGImages", "Annotations", "lists", "SegmentationClassAug"):
        (root / folder).mkdir()
    for name in "ab":
        Image.fromarray(np.full((8, 9, 3), 90, dtype=np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        Image.fromarray(np.ones((8, 9), dtype=np.uint8)).save(root / "SegmentationClassAug" / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").write_bytes(XML)
        (root / "lists" / "train.txt").write_text("a\nb\n")
        (root / "lists" / "val.txt").write_text("a\nb\n")
    return root


def one_line(error: AfaError) -> None:
    text = str(error)
    assert len(text.splitlines()) == 1, text
    text.encode("utf-8")


def spoil(good: bytes, place: int, length: int, put: bytes) -> bytes:
    return good[:place] + put + good[place + length :]


def open_everything(root: Path) -> None:
    layout = open_data(DataConfig(root=str(root)))
    layout.train()
    layout.masked().mask(0)
    layout.describe()


@FUZZ
@given(place=st.integers(0, len(XML)), length=st.integers(0, 12), put=PUT | st.binary(max_size=5))
def test_xml(root: Path, place: int, length: int, put: bytes) -> None:
    path = root / "Annotations" / "a.xml"
    path.write_bytes(spoil(XML, place, length, put))
    try:
        open_everything(root)
    except AfaError as error:
        one_line(error)
    finally:
        path.write_bytes(XML)


@pytest.mark.parametrize("name", ["train.txt", "val.txt"])
@FUZZ
@given(
    content=st.binary(max_size=30) | st.text(st.sampled_from(list("ab/\\.\n\r\t\0 é#")), max_size=12).map(str.encode)
)
def test_lists(root: Path, name: str, content: bytes) -> None:
    path = root / "lists" / name
    path.write_bytes(content)
    try:
        open_everything(root)
    except AfaError as error:
        one_line(error)
    finally:
        path.write_text("a\nb\n")


@pytest.mark.parametrize("kind", ["JPEGImages/a.jpg", "SegmentationClassAug/a.png"])
@FUZZ
@given(place=st.integers(0, 400), length=st.integers(0, 40), put=st.binary(max_size=8))
def test_pixels(root: Path, kind: str, place: int, length: int, put: bytes) -> None:
    path = root / kind
    good = path.read_bytes()
    path.write_bytes(spoil(good, place % len(good), length, put))
    try:
        read_image(path)
        read_mask(path)
    except AfaError as error:
        one_line(error)
    finally:
        path.write_bytes(good)


def test_what_is_spoiled_was_good(root: Path) -> None:
    open_everything(root)
