"""Each kind of file of tags: what is read of it, and what is said of mistakes in it."""

from __future__ import annotations

import csv
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from afa.data.readers import table
from afa.data.readers.base import TagEntry
from afa.data.readers.places import TagFile
from afa.data.readers.tag_files import FoundTags, read_tag_file, read_tags
from layouts import write
from mistakes import said
from opened import reachable

CLASSES = ("bird", "cat", "dog")


def found(root: Path, name: str, content: Any) -> FoundTags:
    """A file of this name and content, read without known classes."""
    return read_tag_file(TagFile(write(root, name, content)))


def tags_of(root: Path, name: str, content: Any) -> dict[str, tuple[str, ...]]:
    """The tags of the images as the file writes their names."""
    return {entry.image: entry.tags for entry in found(root, name, content).entries.values()}


def rows(path: Path) -> list[TagEntry]:
    return table.read(path, TagFile(path).content, ())[1]


TWO = {"a.jpg": ("cat", "dog"), "b/c.png": ("cat",)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "file,tags\na.jpg,cat dog\nb/c.png,cat\n"),
        ("t.csv", '\ufefffile,tags\r\n"a.jpg","cat, dog"\r\n\r\nb/c.png,cat\r\n'),
        ("t.csv", "Filename;Labels\na.jpg;cat|dog\nb/c.png;cat\n"),
        ("t.csv", "\ufeffsep=;\r\nfile;tags\r\na.jpg;cat, dog\r\nb/c.png;cat\r\n"),
        ("t.csv", '"sep=|"\nfile|label\na.jpg|cat\na.jpg|dog\nb/c.png|cat\n'),
        ("t.csv", "tags,x,image\ncat;dog,1,a.jpg\ncat,2,b/c.png\n"),
        ("t.csv", "image,labels\na.jpg,\"['cat', 'dog']\"\nb/c.png,['cat']\n"),
        ("t.csv", "image,label\na.jpg,cat\nb/c.png,cat\na.jpg,dog\n"),
        ("t.tsv", "file_name\tclasses\na.jpg\tcat dog\nb/c.png\tcat\n"),
        ("t.csv", "file,cat,dog\na.jpg,1,1\nb/c.png,True,\n"),
        ("t.csv", "file,cat,split,dog\na.jpg,1,train,1.0\nb/c.png,yes,val,false\n"),
        ("t.json", '{"a.jpg": ["cat", "dog"], "b/c.png": ["cat"]}'),
        ("t.json", '{"a.jpg": "cat dog", "b/c.png": {"cat": 1, "dog": 0}}'),
        ("t.json", '{"a.jpg": {"labels": ["cat", "dog"]}, "b/c.png": {"label": "cat"}}'),
        ("t.json", '[{"file": "a.jpg", "tags": ["cat", "dog"]}, {"image": "b/c.png", "label": "cat", "x": {}}]'),
        ("t.json", '[{"file": "a.jpg", "cat": true, "dog": 1}, {"file": "b/c.png", "cat": "yes", "split": "val"}]'),
        (
            "t.jsonl",
            '{"file": "a.jpg", "objects": {"bbox": [[1]], "categories": ["cat", "dog"]}}\n'
            '{"file": "b/c.png", "objects": [{"category": "cat"}]}',
        ),
        (
            "t.jsonl",
            '\ufeff{"file_name": "a.jpg", "labels": ["cat", "dog"]}\n\n{"filename": "b/c.png", "class": "cat"}',
        ),
    ],
)
def test_forms_of_tables(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path, name, text)
    assert {entry.image: entry.tags for entry in rows(path)} == TWO


def test_tags_come_in_the_order_of_the_classes(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", '\ufeffimage,tags\r\na,dog\r\nb.JPG,"dog  bird dog"\n\nc d, cat\ne,\n')
    assert read_tags(path, CLASSES) == {"a": ("dog",), "b": ("bird", "dog"), "c d": ("cat",), "e": ()}


@pytest.mark.parametrize(
    ("name", "content", "allowed"),
    [
        ("t.csv", "file,bird,cat,dog\na,1,?,0\nb,?,?,?\nc,0,0,0\n", [("bird", "cat"), CLASSES, ()]),
        ("t.json", {"a": ["cat"], "b": None, "c": []}, [("cat",), CLASSES, ()]),
        ("t.csv", "file,tags\na,cat\nb,None\nc,dog normal\n", [("cat",), (), ("dog",)]),
    ],
)
def test_what_images_may_show(tmp_path: Path, name: str, content: Any, allowed: list[tuple[str, ...]]) -> None:
    path = write(tmp_path, name, content)
    assert list(read_tags(path, CLASSES, ("none", "normal")).values()) == allowed


@pytest.mark.parametrize("column", ["label", "tags"])
def test_one_label_keeps_its_spaces(tmp_path: Path, column: str) -> None:
    path = write(tmp_path, "t.csv", f"file,{column}\na.jpg,traffic light\nb.jpg,stop sign; cat\n")
    assert {entry.image: entry.tags for entry in rows(path)} == {
        "a.jpg": ("traffic light",),
        "b.jpg": ("stop sign", "cat"),
    }


def test_class_with_a_space_needs_another_separator(tmp_path: Path) -> None:
    classes = ("dog", "traffic light")
    path = write(tmp_path, "t.csv", "image,tags\na,dog traffic light\n")
    assert "'traffic light' has one; name it traffic_light" in said(read_tags, path, classes)
    write(tmp_path, "t.csv", "image,tags\na,dog;traffic light\nb,traffic light\n")
    assert read_tags(path, classes) == {"a": classes, "b": ("traffic light",)}
    write(tmp_path, "t.csv", "image,tags\na,traffic light\n")
    assert read_tags(path, classes) == {"a": ("traffic light",)}


def test_splits_and_empty_tags(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", "file,tags,split\na,cat,train\nb,,val\n")
    expected = [TagEntry(f"{path}, line 2", "a", ("cat",), "train"), TagEntry(f"{path}, line 3", "b", (), "val")]
    assert rows(path) == expected
    path = write(tmp_path, "t.jsonl", '{"file": "a"}\n{"file": "b", "tags": null}\n')
    assert {entry.image: entry.tags for entry in rows(path)} == {"a": (), "b": ()}


@pytest.mark.parametrize(
    ("name", "text", "classes", "declared"),
    [
        ("t.csv", "image,zebra,cat\na,0,1\n", ("zebra", "cat"), True),
        ("t.json", [{"image": "a", "zebra": 0}, {"image": "b", "cat": 1, "zebra": None}], ("zebra", "cat"), True),
        ("t.csv", "image,tags\na,zebra cat\n", ("cat", "zebra"), False),
        ("t.xml", '<annotations><image name="a.jpg"><tag label="b"/></image></annotations>', ("b",), False),
    ],
)
def test_order_of_the_classes(tmp_path: Path, name: str, text: Any, classes: tuple[str, ...], declared: bool) -> None:
    tags = found(tmp_path, name, text)
    assert (tags.classes, tags.declared) == (classes, declared)


def test_agrees_with_the_csv_module(tmp_path: Path) -> None:
    """Names with every character that must be quoted come back as another writer wrote them."""
    names = ["a b", "c,d", 'e"f', "ä;ö", "g|h", "日本"]
    path = tmp_path / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "tags"])
        writer.writerows([name, "cat|dog"] for name in names)
    assert {entry.image: entry.tags for entry in rows(path)} == dict.fromkeys(names, ("cat", "dog"))


def test_equal_tags_are_kept_once(tmp_path: Path) -> None:
    text = "\n".join(json.dumps({"file": f"{i}", "tags": "cat dog"}) for i in range(100))
    assert len({id(entry.tags) for entry in found(tmp_path, "t.jsonl", text).entries.values()}) == 1


def result(kind: str, names: list[Any]) -> dict[str, Any]:
    return {"from_name": "x", "to_name": "image", "type": kind, "value": {kind: names}}


COCO: dict[str, Any] = {
    "info": {"year": 2014},
    "images": [
        {"id": 7, "file_name": "b.jpg", "height": 4, "width": 6},
        {"id": 3, "file_name": "train/a.jpg", "height": 4, "width": 6},
        {"id": 5, "file_name": "c.jpg", "height": 4, "width": 6},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 90, "segmentation": [[12345.5, 0, 5, 0, 5, 3]], "iscrowd": 0},
        {"id": 2, "image_id": 3, "category_id": 2, "segmentation": {"counts": "SECRETRUNS", "size": [4, 6]}},
        {"id": 3, "image_id": 3, "category_id": 2, "segmentation": [], "bbox": [1, 2, 3, 4]},
        {"id": 4, "image_id": 7, "category_id": 17, "iscrowd": 1},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 2, "name": "bicycle"}, {"id": 17, "name": "cat"}],
}
TASK = {"id": 1, "data": {"image": "a.jpg"}, "annotations": [{"result": [result("choices", ["cat"])]}]}
MISTAKES: list[tuple[str, Any, str]] = [
    ("t.csv", "", "the first line is ''; write the header image,tags"),
    ("t.csv", "a,dog\n", "the first line is 'a,dog'; write the header image,tags"),
    ("t.csv", "file\na\n", "the first line is 'file'; write the header image,tags"),
    ("t.csv", "image,tags\na,dog\na.png,cat\n", "line 3: image 'a' is there a second time; keep"),
    ("t.csv", "image,tags\na,dog,cat\n", "line 2: 3 columns; write image,tags"),
    ("t.csv", "file,cat,dog\na,1\n", "line 2: 2 columns; the header has 3"),
    ("t.csv", "image,tags\n,dog\n", "line 2: no image name"),
    ("t.csv", 'image,tags\na,"dog\n', "not a CSV in UTF-8"),
    ("t.csv", "file,tags\na,cat\0\n", "line 2: holds a NUL byte; save"),
    ("t.csv", f"file,tags\na,{'x' * 200_000}\n", "field larger than field limit"),
    ("t.csv", f"file,tags\na,{'x,' * 600_000}\n", "line 2: longer than 1,000,000 characters; write"),
    ("t.csv", "file,cat\na,maybe\n", "line 2, column 'cat': the value is 'maybe'; write 0 or 1"),
    ("t.csv", "file,cat,width\na,1,64\n", "column 'width': the value is '64'; write 0 or 1, ? for unknown, remove the"),
    ("t.csv", "file,cat,cat\na,1,1\n", "two columns have the same name"),
    ("t.csv", 'file,tags\n"a\nb",cat\n', "line 3: the image name 'a\\nb' has control characters"),
    ("t.csv", "file,tags\na,Cat\nb,cat\n", "classes 'Cat' and 'cat' differ in case"),
    ("t.csv", "file,tags\na,background\n", "leave 'background' out"),
    ("t.csv", "file,tags\na,\n", "0 classes; each image is without a tag, or its tags"),
    ("t.csv", f"file,label\na,{'x' * 300}\n", "more than 200; rename"),
    ("t.json", "", "not valid JSON near character 0: Expecting value; save"),
    ("t.json", '{"a": ["cat"]', "not valid JSON near character 13: Expecting ',' delimiter; save"),
    ("t.json", '{"a": ["cat"]} x', "not valid JSON near character 15: Extra data; save"),
    ("t.json", '[["a", "cat"]]', "entry 1: is ['a', 'cat']; write objects"),
    ("t.json", '[{"file": 5, "tags": []}]', "entry 1: no text that names the image; add"),
    ("t.json", '{"a": [1.5]}', "entry 1: the tag 1.5 is no text; write"),
    ("t.json", '{"a": {"cat": "x"}}', "entry 1, column 'cat': the value is 'x'; write 0 or 1"),
    ("t.json", '{"a\\u0000b": ["cat"]}', "the image name 'a\\x00b' has control characters"),
    ("t.json", '{"a\\ud800b": ["cat"]}', "the image name 'a\\ud800b' has control characters"),
    ("t.json", "[" * 100_000, "not valid JSON: cannot be decoded (maximum recursion"),
    ("t.json", "5", "is neither a list nor an object; write"),
    ("t.json", '{"a": ["cat"], "a": ["dog"]}', "'a' is there a second time; keep"),
    ("t.json", f'{{"a": {"1" * 5000}}}', "cannot be decoded (Exceeds the limit"),
    ("t.jsonl", '{"file": "a", "text": "a car"}', "line 1, column 'text': the value is 'a car'; write 0 or 1, ? for"),
    ("t.jsonl", "[1]\n", "line 1: is [1]; write objects"),
    ("t.jsonl", '{"file": "a"\n', "line 1: not valid JSON"),
    ("t.jsonl", "[" * 100_000, "line 1: not valid JSON"),
    ("coco.json", COCO | {"images": []}, "no images; give"),
    ("coco.json", COCO | {"categories": []}, "no categories"),
    ("coco.json", COCO | {"images": [{"id": 1}]}, "image 1 has no file_name"),
    ("coco.json", COCO | {"images": COCO["images"] * 2}, "image id 7 is there twice"),
    ("coco.json", COCO | {"categories": COCO["categories"] * 2}, "category id 90 is there twice"),
    ("coco.json", COCO | {"categories": [{"id": 90}]}, "category 90 has no name"),
    ("coco.json", COCO | {"annotations": [{"image_id": 9, "category_id": 2}]}, "image id 9, which"),
    ("coco.json", COCO | {"annotations": [{"image_id": 3, "category_id": 1}]}, "category id 1, which"),
    ("coco.json", COCO | {"annotations": [{"image_id": 3}]}, "{'image_id': 3} has no number or text as category_id"),
    ("coco.json", COCO | {"annotations": [5]}, "5 has no number or text as image_id"),
    ("coco.json", COCO | {"categories": [{"id": i, "name": "a"} for i in (2, 17, 90)]}, "class 'a' is there twice"),
    ("ls.json", [{"id": 1, "data": {"text": "hello"}, "annotations": []}], "task 1: names no image; export"),
    ("ls.json", [TASK, 5], "task 2: is no task; export"),
    ("t.xml", "<annotations>", "not an XML file (no element found"),
    ("t.xml", "{}", "not an XML file (not well-formed"),
    (
        "t.xml",
        '<annotations><track id="0" label="cat"><box frame="0"/></track></annotations>',
        "tracks of a video, which",
    ),
    ("t.csv", "sep=;\nfile;tags\na;cat;dog\n", "line 3: 3 columns; the header has 2"),
    ("t.xml", "<annotation/>", "is <annotation>, not <annotations>; export"),
    ("t.xml", '<annotations><image id="0"/></annotations>', "image 1 has no name"),
    ("t.xml", '<!DOCTYPE a [<!ENTITY b "c">]><annotations/>', "(a); remove the DOCTYPE"),
    ("t.xml", "<annotations/>", "0 classes; each image is without a tag, or its tags"),
]


@pytest.mark.parametrize(("name", "content", "expected"), MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes(tmp_path: Path, name: str, content: Any, expected: str) -> None:
    text = said(found, tmp_path, name, content)
    assert text.startswith(str(tmp_path / name))
    assert expected in text
    assert len(text) < 600


def test_a_line_of_50_megabytes(tmp_path: Path) -> None:
    text = said(found, tmp_path, "t.csv", "file,tags\na," + "cat " * 12_500_000)
    assert "line 2: longer than 1,000,000 characters" in text


@pytest.mark.parametrize(("tag", "hint"), [("dgo", "did you mean dog?"), ("zebra", "allowed: bird, cat, dog")])
def test_unknown_tags(tmp_path: Path, tag: str, hint: str) -> None:
    path = write(tmp_path, "t.csv", f"image,tags\na,{tag}\n")
    assert f"{path}, line 2, image 'a': unknown tag {tag!r}; {hint}" in said(read_tags, path, CLASSES)


ÄPFEL = {
    "t.csv": "file,tags\nä.jpg,Äpfel\nb.jpg,cat Äpfel\n",
    "t.json": '{"ä.jpg": ["Äpfel"], "b.jpg": ["cat", "Äpfel"]}',
    "t.jsonl": '{"file": "ä.jpg", "tags": "Äpfel"}\n{"file": "b.jpg", "tags": "cat Äpfel"}',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("name", ÄPFEL)
def test_encodings_that_are_certain(tmp_path: Path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes(ÄPFEL[name].encode(encoding))
    if (name, encoding) == ("t.json", "cp1252"):
        assert f"{path}: not a text file in UTF-8" in said(read_tags, path, ())
        return
    tags = read_tag_file(TagFile(path))
    assert {key: entry.tags for key, entry in tags.entries.items()} == {"ä": ("Äpfel",), "b": ("cat", "Äpfel")}
    assert [note for note in tags.notes if "cp1252" in note] == (
        [f"{path}: is not in UTF-8; read as cp1252 of Windows, as in {'ä'!r}; if that is wrong, save it in UTF-8"]
        if encoding == "cp1252"
        else []
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("file,tags\na.jpg,собака\n".encode("cp1251"), "not a text in UTF-8 (invalid"),
        ("file,tags\na.jpg,ł\n".encode("cp1250"), "not a text in UTF-8 (invalid"),
        ("file,tags\na.jpg,ä\n".encode("cp437"), "not a text in UTF-8 (invalid"),
        ("file,tags\na.jpg,犬猫\n".encode("shift-jis"), "not a text in UTF-8 (invalid"),
        (b"PK\x03\x04\xff\xfe\0\0", "is an Excel workbook or another archive, not a text; save it as CSV"),
        (b"\xff\xfe" + "file,tags\na.jpg,cat".encode("utf-16-le")[:-1], "not a text in utf-16 (truncated data)"),
        (b"\x80\0\x80", "not a text in UTF-8 (invalid"),
    ],
)
def test_encodings_that_are_not_certain(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    assert f"{path}: {expected}" in said(read_tags, path, ())


@pytest.mark.parametrize("text", ["a.jpg,cat\nb.jpg,cat dog\n", "cat;a.jpg\ncat dog;b.jpg\n"])
def test_a_table_without_a_header(tmp_path: Path, text: str) -> None:
    tags = found(tmp_path, "t.csv", text)
    assert {name: entry.tags for name, entry in tags.entries.items()} == {"a": ("cat",), "b": ("cat", "dog")}
    assert [note for note in tags.notes if "has no header; read as " in note and "on" in note]


@pytest.mark.parametrize("text", ["a.jpg,1\nb.jpg,2\n", "a.jpg,1,0\n", "a.jpg,cat,dog\n", "a.jpg,\n", "a.jpg\nb.jpg\n"])
def test_a_missing_header_that_is_not_certain(tmp_path: Path, text: str) -> None:
    message = said(found, tmp_path, "t.csv", text)
    assert f"{tmp_path / 't.csv'}: has no header, and what is in {text.splitlines()[0]!r} is not certain" in message


@pytest.mark.parametrize(
    ("cells", "asked"),
    [
        (["traffic light", "dog", "traffic light"], ["'traffic' and 'light' always"]),
        (["dog traffic light", "traffic light", "dog"], ["'traffic' and 'light' always"]),
        (["old red car", "cat", "cat old red car"], ["'old' and 'red' and 'car' always"]),
        (["a b", "c d", "a b", "d c"], ["'a' and 'b' always"]),
        (["a b", "b a", "a b c", "c"], []),
        (["traffic light", "dog"], []),  # once is no habit
        (["traffic light;dog", "traffic light"], []),
        (["a b", "a b", "a"], []),
    ],
)
def test_words_that_always_come_together_raise_a_question(tmp_path: Path, cells: list[str], asked: list[str]) -> None:
    text = "file,tags\n" + "".join(f"{n}.jpg,{cell}\n" for n, cell in enumerate(cells))
    notes = found(tmp_path, "t.csv", text).notes
    assert len(notes) == len(asked)
    assert all(part in note and "is that one name?" in note for part, note in zip(asked, notes, strict=True))
    stated = tuple(dict.fromkeys(" ".join(cells).replace(";", " ").split()))
    if ";" not in text:
        assert not read_tag_file(TagFile(tmp_path / "t.csv"), stated).notes


def test_single_tags_beside_lists_of_tags_raise_no_question(tmp_path: Path) -> None:
    rows = [{"file": "a.jpg", "tags": "dog"}, *({"file": f"{n}.jpg", "label": "traffic light"} for n in "bc")]
    tags = found(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows)))
    assert (tags.classes, tags.notes) == (("dog", "traffic light"), ())


def test_missing(tmp_path: Path) -> None:
    assert f"{tmp_path / 't.csv'}: no such tags file or folder; set data.tags" in said(
        read_tags, tmp_path / "t.csv", ()
    )


def npy(folder: Path, content: Any, *, protocol: int | None = None) -> Path:
    """What numpy.save writes, or an `.npy` whose pickle has another protocol."""
    path = folder / "cls_labels_onehot.npy"
    if protocol is None:
        np.save(path, content)
        return path
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        array = np.empty((), dtype=object)
        array[()] = content
        pickle.dump(array, file, protocol=protocol)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float64", ">f4", "uint8", "int64", "bool"])
@pytest.mark.parametrize("protocol", [None, 2, 3, 4])
def test_npy(tmp_path: Path, dtype: str, protocol: int | None) -> None:
    content: dict[Any, Any] = {
        "2007_000032": np.array([1, 0, 1], dtype=dtype),
        2007000033: np.array([0, 1, 0], dtype=dtype),
        np.int64(2008000001): np.array([0, 0, 0], dtype=dtype),
        9: np.array([1, 0, 0], dtype=dtype),
    }
    tags = {"2007_000032": ("bird", "dog"), "2007_000033": ("cat",), "2008_000001": (), "9": ("bird",)}
    assert read_tags(npy(tmp_path, content, protocol=protocol), CLASSES) == tags


def test_npy_of_numpy_1(tmp_path: Path) -> None:
    path = npy(tmp_path, {"a": np.array([0, 1, 0], dtype=np.float32)}, protocol=3)
    content = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(content)
    assert b"numpy.core" in content
    assert read_tags(path, CLASSES) == {"a": ("cat",)}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a": np.ones(4)}, "image 'a' has a vector of 4 values; give"),
        ({"a": "dog"}, "image 'a' has a vector of 0 values"),
        ({"a": np.array([0.5, 0, 0])}, "image 'a' has values other"),
        ({"a": np.array([np.nan, 0, 0])}, "image 'a' has values other"),
        ({1.5: np.ones(3)}, "key 1.5 is not an image name"),
        ({2007000032: np.ones(3), "2007_000032.jpg": np.ones(3)}, "image '2007_000032' is there a second"),
        ({"a": np.array(["x", "y", "z"])}, "holds values of type 'U1'; use numbers"),
        (np.ones((5, 3)), "not a dictionary"),
        (np.array([{"a": 1}, 2], dtype=object), "not a dictionary"),
        ([1, 2], "not a dictionary"),
    ],
)
def test_npy_mistakes(tmp_path: Path, content: Any, expected: str) -> None:
    path = npy(tmp_path, content)
    text = said(read_tags, path, CLASSES)
    assert text.startswith(f"{path}: ")
    assert expected in text


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"image,tags\n", bytes(range(256))])
def test_npy_that_is_not_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    assert f"{tmp_path / 'a.npy'}: not a dictionary" in said(read_tags, tmp_path / "a.npy", CLASSES)


def test_npy_cut_short(tmp_path: Path) -> None:
    path = npy(tmp_path, {"a": np.ones(3), "b": np.ones(3)})
    content = path.read_bytes()
    for length in range(0, len(content) - 1, 7):
        path.write_bytes(content[:length])
        assert str(path) in said(read_tags, path, CLASSES)


class Hostile:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "name"), [(os.mkdir, "posix.mkdir"), (exec, "exec"), (getattr, "getattr"), (np.load, "load")]
)
def test_hostile_npy_is_refused_and_runs_nothing(tmp_path: Path, function: Any, name: str, protocol: int) -> None:
    target = tmp_path / "made"
    argument = f"import os; os.mkdir({str(target)!r})" if function is exec else str(target)
    text = said(read_tags, npy(tmp_path, {"a": Hostile(function, argument)}, protocol=protocol), CLASSES)
    assert "refused; give the tags as CSV" in text
    assert name in text
    assert not target.exists()


def test_hostile_npy_is_hostile(tmp_path: Path) -> None:
    """What the test above refuses does run in an ordinary load."""
    target = tmp_path / "made"
    np.load(npy(tmp_path, Hostile(os.mkdir, str(target)), protocol=4), allow_pickle=True)
    assert target.exists()


def test_npy_with_a_forged_type_is_refused(tmp_path: Path) -> None:
    """An array of 8-byte numbers that says its bytes are objects must not become pointers."""
    path = npy(tmp_path, {"a": np.full(3, 2**40, dtype=np.int64)}, protocol=4)
    content = path.read_bytes()
    assert content.count(b"\x8c\x02i8") == 1
    path.write_bytes(content.replace(b"\x8c\x02i8", b"\x8c\x02O8"))
    assert "has a vector of 0 values" in said(read_tags, path, CLASSES)


def test_voc_xml(tmp_path: Path) -> None:
    text = (
        "<annotation><filename>x.jpg</filename><object><name>dog</name><part><name>head</name></part></object>"
        "<object><name>bird</name></object><object><name>dog</name></object></annotation>"
    )
    write(tmp_path, "2007_000032.xml", text)
    write(tmp_path, "2007_000033.xml", "<annotation/>")
    write(tmp_path, "notes.txt", "x")
    assert read_tags(tmp_path, CLASSES) == {"2007_000032": ("bird", "dog"), "2007_000033": ()}


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<annotation><object><name>gnu</name></object></annotation>", "unknown tag 'gnu'; allowed: bird, cat, dog"),
        ("<annotation><object>", "not a VOC annotation (no element found"),
        (
            f'<?xml version="1.0"?><!DOCTYPE annotation [<!ENTITY l0 "ha">{LAUGHS}]>'
            "<annotation><object><name>&l8;</name></object></annotation>",
            "has a document type (annotation); remove the DOCTYPE",
        ),
        (None, "no .xml file in this folder"),
    ],
)
def test_voc_xml_mistakes(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path if text is None else write(tmp_path, "a.xml", text)
    assert f"{path}: {expected}" in said(read_tags, tmp_path, CLASSES)


def test_coco(tmp_path: Path) -> None:
    tags = found(tmp_path, "export.json", COCO)
    assert TagFile(tmp_path / "export.json").kind == "coco"
    assert tags.classes == ("bicycle", "cat", "toothbrush")
    expected = {"b.jpg": ("cat",), "train/a.jpg": ("bicycle", "toothbrush"), "c.jpg": ()}
    assert tags_of(tmp_path, "export.json", COCO) == expected
    assert tags_of(tmp_path, "export.json", dict(reversed(COCO.items()))) == expected
    held = reachable(tags)
    assert "cat" in held
    assert 12345.5 not in held
    assert not [item for item in held if isinstance(item, str) and ("SECRET" in item or "segmentation" in item)]
    assert 12345.5 in reachable(COCO)  # the search does find it


@pytest.mark.parametrize(("to_image", "to_category"), [(str, str), (float, float), (lambda n: f"{n:06d}", str)])
def test_coco_ids_of_other_types(tmp_path: Path, to_image: Any, to_category: Any) -> None:
    coco = {
        "images": [image | {"id": to_image(image["id"])} for image in COCO["images"]],
        "annotations": [
            {"image_id": to_image(part["image_id"]), "category_id": to_category(part["category_id"])}
            for part in COCO["annotations"]
        ],
        "categories": [part | {"id": to_category(part["id"])} for part in COCO["categories"]],
    }
    assert found(tmp_path, "a.json", coco) == found(tmp_path, "a.json", COCO)
    coco["annotations"].append({"image_id": "3 ", "category_id": 2})
    assert "an annotation is of image id '3 ', which is not in images" in said(found, tmp_path, "a.json", coco)


def test_coco_categories_that_are_only_parents(tmp_path: Path) -> None:
    above = {"supercategory": "animals"}
    categories = [
        {"id": 0, "name": "animals", "supercategory": "none"},
        {"id": 2, "name": "cat", **above},
        {"id": 17, "name": "dog", **above},
        {"id": 90, "name": "person", "supercategory": "person"},
        {"id": 91, "name": "unused", "supercategory": "none"},
    ]
    coco = COCO | {"categories": categories}
    tags = found(tmp_path, "a.json", coco)
    assert tags.classes == ("cat", "dog", "person", "unused")
    assert [note.partition(": ")[2][:55] for note in tags.notes] == [
        "category 'animals' is only the parent of others, and no"
    ]
    every = ("animals", *tags.classes)
    assert read_tag_file(TagFile(tmp_path / "a.json"), every).classes == every
    with_object = coco | {"annotations": [{"image_id": 3, "category_id": 0}]}
    assert found(tmp_path, "a.json", with_object).classes == every


def test_label_studio(tmp_path: Path) -> None:
    tasks = [
        {
            "id": 1,
            "data": {"image": "/data/upload/3/0a1b2c3d-my%20cat.jpg"},
            "annotations": [
                {"was_cancelled": True, "result": [result("choices", ["canceled"])]},
                {"result": [result("choices", ["cat", "dog"]), result("taxonomy", [["animal", "bird"]])]},
                {"result": [result("rectanglelabels", ["cow"]), {"type": "rating", "value": {"rating": 3}}]},
            ],
            "predictions": [{"result": [result("choices", ["predicted"])]}],
        },
        {"id": 2, "data": {"note": "x", "photo": "/data/local-files/?d=pets/b.jpg"}, "annotations": []},
        {"id": 3, "data": {"image": "s3://bucket/pets/c.jpg"}, "annotations": [{"result": []}]},
        {"id": 4, "data": {"image": "pets/d.PNG"}, "annotations": [{"result": [result("brushlabels", ["cat"])]}]},
    ]
    assert tags_of(tmp_path, "export.json", tasks) == {
        "/data/upload/3/0a1b2c3d-my%20cat.jpg": ("bird", "cat", "cow", "dog"),
        "/data/local-files/?d=pets/b.jpg": (),
        "s3://bucket/pets/c.jpg": (),
        "pets/d.PNG": ("cat",),
    }
    assert TagFile(tmp_path / "export.json").kind == "labelstudio"


def test_label_studio_short_export(tmp_path: Path) -> None:
    tasks = [
        {"image": "http://localhost:8080/data/upload/1/a.jpg", "id": 1, "choice": "cat", "annotator": 1},
        {"image": "b.jpg", "id": 2, "animals": {"choices": ["cat", "dog"]}, "lead_time": 2.5},
        {"image": "c.jpg", "id": 3, "kind": [["animal", "bird"]], "annotator": 1},
        {"image": "d.jpg", "id": 4, "boxes": [{"x": 1, "rectanglelabels": ["cow"]}], "annotator": 1},
    ]
    expected = {"a": ("cat",), "b": ("cat", "dog"), "c": ("bird",), "d": ("cow",)}
    path = write(tmp_path, "export.json", tasks)
    assert read_tags(path, ("bird", "cat", "cow", "dog")) == expected
    assert TagFile(path).kind == "labelstudio"


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version>
<meta><job><labels>
  <label><name>dog</name><color>#ff0000</color><attributes><attribute><name>age</name></attribute></attributes></label>
  <label><name>cat</name></label><label><name>unused</name></label>
</labels></job></meta>
<image id="0" name="x/a.jpg" subset="Train" width="6" height="4">
  <tag label="cat" source="manual"><attribute name="age">3</attribute></tag><tag label="dog"></tag><tag label="cat"/>
</image>
<image id="1" name="b &amp; c.jpg" subset="Validation" width="6" height="4">
  <polygon label="dog" points="12345.5,1;2,2;3,3"></polygon></image>
<image id="2" name="d.jpg" width="6" height="4"/>
</annotations>"""


def test_cvat(tmp_path: Path) -> None:
    file = found(tmp_path, "annotations.xml", CVAT)
    assert file.classes == ("dog", "cat", "unused")
    assert file.declared
    assert [(entry.image, entry.tags, entry.split) for entry in file.entries.values()] == [
        ("x/a.jpg", ("dog", "cat"), "Train"),
        ("b & c.jpg", ("dog",), "Validation"),
        ("d.jpg", (), ""),
    ]
    assert not [item for item in reachable(file) if isinstance(item, str) and "12345" in item]
