from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from afa.data.readers import table
from afa.data.readers.base import TagEntry
from afa.data.readers.tag_files import TagFile, read_tag_file
from afa.errors import AfaError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def rows(path: Path) -> list[TagEntry]:
    return table.read(path, TagFile(path).content, ())[1]


def tags_of(path: Path) -> dict[str, tuple[str, ...]]:
    return {entry.image: entry.tags for entry in rows(path)}


def message(path: Path) -> str:
    with pytest.raises(AfaError) as caught:
        read_tag_file(TagFile(path))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    assert str(path) in text
    return text


TWO = {"a.jpg": ("cat", "dog"), "b/c.png": ("cat",)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "file,tags\na.jpg,cat dog\nb/c.png,cat\n"),
        ("t.csv", '\ufefffile,tags\r\n"a.jpg","cat, dog"\r\n\r\nb/c.png,cat\r\n'),
        ("t.csv", "Filename;Labels\na.jpg;cat|dog\nb/c.png;cat\n"),
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
        (
            "t.jsonl",
            '\ufeff{"file_name": "a.jpg", "labels": ["cat", "dog"]}\n\n{"filename": "b/c.png", "class": "cat"}',
        ),
    ],
)
def test_forms(tmp_path: Path, name: str, text: str) -> None:
    assert tags_of(write(tmp_path, name, text)) == TWO


def test_one_label_keeps_its_spaces(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", "file,label\na.jpg,traffic light\nb.jpg,stop sign; cat\n")
    assert tags_of(path) == {"a.jpg": ("traffic light",), "b.jpg": ("stop sign", "cat")}
    path = write(tmp_path, "t.csv", "file,tags\na.jpg,traffic light\nb.jpg,stop sign;cat\n")
    assert tags_of(path) == {"a.jpg": ("traffic light",), "b.jpg": ("stop sign", "cat")}


def test_splits_and_empty_tags(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", "file,tags,split\na,cat,train\nb,,val\n")
    assert rows(path) == [
        TagEntry(f"{path}, line 2", "a", ("cat",), "train"),
        TagEntry(f"{path}, line 3", "b", (), "val"),
    ]
    assert tags_of(write(tmp_path, "t.jsonl", '{"file": "a"}\n{"file": "b", "tags": null}\n')) == {"a": (), "b": ()}


def test_one_hot_classes_keep_the_order_of_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", "image,zebra,cat\na,0,1\n")
    assert read_tag_file(TagFile(path)).classes == ("zebra", "cat")
    assert read_tag_file(TagFile(path)).declared
    met = read_tag_file(TagFile(write(tmp_path, "u.csv", "image,tags\na,zebra cat\n")))
    assert (met.classes, met.declared) == (("cat", "zebra"), False)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("t.csv", "file,tags\na,cat\0\n", "line 2: holds a NUL byte; save"),
        ("t.csv", f"file,tags\na,{'x' * 200_000}\n", "field larger than field limit"),
        ("t.csv", f"file,tags\na,{'x,' * 600_000}\n", "line 2: longer than 1,000,000 characters; write"),
        ("t.csv", "file,cat\na,maybe\n", "line 2, column 'cat': the value is 'maybe'; write 0 or 1"),
        ("t.csv", "file,cat,cat\na,1,1\n", "two columns have the same name"),
        ("t.csv", "file,cat,dog\na,1\n", "line 2: 2 columns; the header has 3"),
        ("t.csv", "file\na\n", "the first line is 'file'; write the header image,tags"),
        ("t.csv", 'file,tags\n"a\nb",cat\n', "line 3: the image name 'a\\nb' has control characters"),
        ("t.csv", "file,tags\na,cat\na.jpg,dog\n", "line 3: image 'a' is there a second time; keep"),
        ("t.csv", "file,tags\na,Cat\nb,cat\n", "classes 'Cat' and 'cat' differ in case"),
        ("t.csv", "file,tags\na,background\n", "leave 'background' out"),
        ("t.csv", "file,tags\na,\n", "0 classes; give 1 to 254"),
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
        ("t.jsonl", "[1]\n", "line 1: is [1]; write objects"),
        ("t.jsonl", '{"file": "a"\n', "line 1: not valid JSON"),
        ("t.jsonl", "[" * 100_000, "line 1: not valid JSON"),
    ],
)
def test_mistakes(tmp_path: Path, name: str, text: str, expected: str) -> None:
    assert expected in message(write(tmp_path, name, text))


@pytest.mark.parametrize("name", ["t.csv", "t.json", "t.jsonl"])
def test_another_encoding(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes('{"file": "ä"}'.encode("utf-16"))
    assert "in UTF-8" in message(path)


def test_a_line_of_50_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"file,tags\na," + b"cat " * 12_500_000)
    assert "line 2: longer than 1,000,000 characters" in message(path)


def test_agrees_with_the_csv_module(tmp_path: Path) -> None:
    """Names with every character that must be quoted come back as another writer wrote them."""
    names = ["a b", "c,d", 'e"f', "ä;ö", "g|h", "日本"]
    path = tmp_path / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "tags"])
        writer.writerows([name, "cat|dog"] for name in names)
    assert tags_of(path) == dict.fromkeys(names, ("cat", "dog"))


def test_equal_tags_are_kept_once(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"file": f"{i}", "tags": "cat dog"} for i in range(100)]
    path = write(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows)))
    assert len({id(entry.tags) for entry in read_tag_file(TagFile(path)).entries.values()}) == 1
