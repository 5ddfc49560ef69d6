"""No file gives a traceback: reading it succeeds, or fails with one line that can be printed.

Each test tries 100 inputs, or as many as AFA_FUZZ says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from afa.config import DataConfig, load_config
from afa.data.files import ImageFiles
from afa.data.images import read_image, read_mask
from afa.data.open import open_data
from afa.data.rows import Rows
from afa.errors import AfaError
from layouts import table, write
from mistakes import assert_one_line

ODD_TEXT = st.text(
    st.sampled_from(list("a0.,;|/\\\"'[]{}<>:=#\n\r\t\0\ufeffé\u0301🦄 ")) | st.characters(codec="utf-8"), max_size=30
)
WORD_LIST = (
    'file tags image label , ; \n 00.png cat dog 1 0 -1 1e999 NaN null ../x / " [ ] { } : split val '
    "names: train: labels: - 0: &a *a !!python 0.5 shapes imagePath http://x/00.png?a=b ..\\00.png C:\\ 0000- "
    '"images" "annotations" "categories" "id" "file_name" "data" <annotations> </annotations> </image> '
    '{"id":1,"name":"cat"} {"id":1,"file_name":"00.png"} {"image_id":1,"category_id":1} < > & <!DOCTYPE\tx> <name>'
)
WORDS = WORD_LIST.split(" ")
XML = ['<image name="00.png">', '<tag label="cat"/>']
KEY_LIST = (
    "file tags images annotations categories id name file_name image_id category_id data result value choices label "
    "image annotator split 00.png shapes imagePath flags supercategory names train"
)
PIECES = st.lists(st.sampled_from(WORDS + XML) | ODD_TEXT, max_size=24).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ODD_TEXT | st.sampled_from(["00.png", "cat", "../x"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEY_LIST.split()) | ODD_TEXT, inner, max_size=5)
    ),
    max_leaves=25,
).map(lambda value: json.dumps(value, ensure_ascii=False))
GOOD = {
    "t.csv": 'file,tags,split\r\n"00.png",cat;dog,train\r\n01.png,cat,val\r\n',
    "t.tsv": "file_name\tcat\tdog\n00\t1\t0\n01\t1\t1\n",
    "t.json": json.dumps(
        {
            "images": [{"id": 1, "file_name": "00.png"}, {"id": 2, "file_name": "01.png"}],
            "annotations": [{"image_id": 1, "category_id": 9, "segmentation": [[1, 2, 3, 4, 5, 6]]}],
            "categories": [{"id": 9, "name": "cat"}, {"id": 3, "name": "dog"}],
        }
    ),
    "l.json": '[{"data": {"image": "/data/local-files/?d=x/00.png"}, "annotations": [{"result": [{"value": {"choices":'
    ' ["cat"]}}]}]}, {"data": {"image": "01.png"}, "annotations": []}]',
    "d.json": '{"00.png": ["cat", "dog"], "01.png": {"cat": 1}}',
    "t.jsonl": '{"file": "00.png", "tags": ["cat"]}\n{"file": "01.png", "label": "dog"}\n',
    "t.xml": '<?xml version="1.0"?><annotations><meta><labels><label><name>cat</name></label></labels></meta>'
    '<image name="00.png" subset="train"><tag label="cat"/></image><image name="01.png"/></annotations>',
    "Annotations/00.xml": '<?xml version="1.0" encoding="utf-8"?><annotation><filename>a.jpg</filename><object>'
    "<name>cat</name><bndbox/></object><object><name>dog</name></object></annotation>",
    "data.yaml": "path: ../x\ntrain: images\nval: [images/a, v.txt]\nnc: 2\nnames:\n  0: cat\n  1: dog\n",
    "labels/00.txt": "0 0.5 0.5 0.2 0.2\r\n1.0 0.1 0.2 0.3 0.4 0.5 0.6\n",
    "labelme/00.json": '{"version": "5.5.0", "flags": {"cat": true}, "shapes": [{"label": "dog", "points": [[1, 2]]}], '
    '"imagePath": "..\\\\images\\\\00.png", "imageData": null}',
    "windows.csv": "00.png,cat\r\n01.png,größe\r\n",
    "utf16.csv": "file;tags\r\n00.png;cat\r\n01.png;größe\r\n",
}
TAGS = {"classes.txt": "tags.csv", "Annotations/00.xml": "Annotations"}
TAGS |= {"labels/00.txt": "data.yaml", "labelme/00.json": "labelme"}
"""File -> what `data.tags` is for it, unless it is the file."""
ENCODINGS = ("utf-8", "utf-16", "utf-16-be", "utf-32", "cp1252", "shift-jis")
NAMES = (
    "..",
    "/",
    "\\",
    "C:",
    "http://",
    "00.png",
    "01",
    "images",
    "?",
    "file=",
    "&",
    "%2F",
    "%00",
    "data",
    "0a1b2c3d-",
    ".",
)
MASKS = tuple(f"SegmentationClassAug/0{n}.png" for n in (0, 1))
SETTING_LIST = (
    "[data] [train] [data.x] preset= = root tags workers seed precision scales crop_size [ ] , 1 -1 0.5 1e999 \n true "
    'nan \'x\' "demo" {} # """ model.backbone \'mit_tiny\' 1979-05-27 paper'
)
SETTINGS = SETTING_LIST.split(" ")
FUZZ = settings(
    max_examples=int(os.environ.get("AFA_FUZZ", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images with tags and masks, and lists of them for the layout of VOC."""
    root = table(tmp_path_factory.mktemp("fuzzed"), 2)
    for folder in ("Annotations", "lists", "SegmentationClassAug"):
        (root / folder).mkdir()
    for name in ("00", "01"):
        Image.fromarray(np.ones((4, 6), dtype=np.uint8)).save(root / "SegmentationClassAug" / f"{name}.png")
    for name in ("data.yaml", "labels/00.txt", "labelme/00.json"):
        write(root, name, GOOD[name])
    for name in ("train.txt", "val.txt"):
        (root / "lists" / name).write_text("00\n01\n")
    return root


@contextmanager
def content_of(path: Path, content: bytes) -> Iterator[None]:
    """Give a file this content for a while, and expect no error but an `AfaError` of one line."""
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        yield
    except AfaError as error:
        assert_one_line(str(error))
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)


def open_everything(root: Path, tags: str, layout: str = "table") -> tuple[str, ...]:
    """Read the tags, and for VOC the lists and a mask, too; the classes."""
    opened = open_data(DataConfig(root=str(root), tags=tags, image_dir="images", layout=layout))
    opened.train()
    assert_one_line(opened.describe())
    if layout == "voc":
        opened.masked().mask(0)
    return opened.classes


def good_bytes(name: str) -> bytes:
    return GOOD[name].encode({"windows.csv": "cp1252", "utf16.csv": "utf-16"}.get(name, "utf-8"))


def test_no_name_of_an_image_gives_a_traceback(root: Path) -> None:
    @FUZZ
    @given(text=PIECES | ODD_TEXT | st.lists(st.sampled_from(NAMES), max_size=6).map("".join))
    def look_up(text: str) -> None:
        for loose in (False, True):
            try:
                assert ImageFiles(root).find(text, "here", loose=loose) in (
                    None,
                    "images/00.png",
                    "images/01.png",
                    *MASKS,
                )
            except AfaError as error:
                assert_one_line(str(error))

    look_up()


@pytest.mark.parametrize(
    "name", ["t.csv", "t.tsv", "t.json", "t.jsonl", "t.xml", "t.npy", "classes.txt", *list(GOOD)[-5:-2]]
)
@FUZZ
@given(
    content=PIECES | JSON | ODD_TEXT | st.binary(max_size=60), encoding=st.just("utf-8") | st.sampled_from(ENCODINGS)
)
def test_no_content_gives_a_traceback(root: Path, name: str, content: str | bytes, encoding: str) -> None:
    raw = content if isinstance(content, bytes) else content.encode(encoding, "replace")
    with content_of(root / name, raw):
        open_everything(root, TAGS.get(name, name))


@pytest.mark.parametrize("name", GOOD)
@FUZZ
@given(
    place=st.integers(0, 400),
    length=st.integers(0, 12),
    put=st.sampled_from(WORDS).map(str.encode) | st.binary(max_size=6),
)
def test_no_spoiled_file_gives_a_traceback(root: Path, name: str, place: int, length: int, put: bytes) -> None:
    good = good_bytes(name)
    with content_of(root / name, good[:place] + put + good[place + length :]):
        open_everything(root, TAGS.get(name, name))


@pytest.mark.parametrize("name", GOOD)
def test_what_is_spoiled_was_good(root: Path, name: str) -> None:
    with content_of(root / name, good_bytes(name)):
        assert "cat" in open_everything(root, TAGS.get(name, name))


@pytest.mark.parametrize("name", ["train.txt", "val.txt"])
@FUZZ
@given(content=st.binary(max_size=30) | st.text(list("01/\\.\n\r\t\0 é#"), max_size=12).map(str.encode))
def test_no_list_gives_a_traceback(root: Path, name: str, content: bytes) -> None:
    with content_of(root / "lists" / name, content):
        open_everything(root, "tags.csv", "voc")


def test_lists_that_are_not_spoiled_are_good(root: Path) -> None:
    assert "cat" in open_everything(root, "tags.csv", "voc")


PIXELS = {
    "rgb.png": ("RGB", {}), "mask.png": ("P", {}), "deep.png": ("I;16", {}), "clear.png": ("RGBA", {}),
    "a.jpg": ("RGB", {}), "plain.tif": ("RGB", {}), "deep.tif": ("I;16", {}),
    "packed.tif": ("RGB", {"compression": "tiff_deflate"}),
    "a.gif": ("P", {}), "a.bmp": ("RGB", {}), "a.webp": ("RGB", {}), "a.ppm": ("RGB", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", PIXELS)
@FUZZ
@given(place=st.integers(0, 4000), length=st.integers(0, 40), put=st.binary(max_size=8))
def test_no_pixels_give_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, name: str, place: int, length: int, put: bytes
) -> None:
    mode, options = PIXELS[name]
    path = tmp_path_factory.getbasetemp() / name
    Image.new(mode, (9, 7), 3).save(path, **options)
    good = path.read_bytes()
    place %= len(good)
    for read in (read_image, read_mask, read_rows):
        with content_of(path, good[:place] + put + good[place + length :]):
            read(path)


def read_rows(path: Path) -> None:
    with Rows(path) as rows:
        while len(rows.take(3)):
            pass


@FUZZ
@given(
    text=st.lists(
        st.sampled_from(SETTINGS) | ODD_TEXT,
        max_size=20,
    ).map(" ".join)
)
def test_no_configuration_gives_a_traceback(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "config.toml"
    with content_of(path, text.encode("utf-8", "replace")):
        load_config(path)
