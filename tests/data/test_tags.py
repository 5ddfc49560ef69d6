from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from afa.data.readers.tag_files import read_tags
from afa.errors import AfaError

CLASSES = ("bird", "cat", "dog")


def message(path: Path, classes: tuple[str, ...] = CLASSES) -> str:
    with pytest.raises(AfaError) as caught:
        read_tags(path, classes)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def csv(folder: Path, text: str) -> Path:
    path = folder / "tags.csv"
    path.write_text(text, encoding="utf-8")
    return path


def npy(folder: Path, content: Any) -> Path:
    path = folder / "cls_labels_onehot.npy"
    np.save(path, content)
    return path


def pickled(folder: Path, content: Any, *, protocol: int) -> Path:
    """An `.npy` whose pickle has another protocol than numpy.save's."""
    path = folder / "cls_labels_onehot.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        array = np.empty((), dtype=object)
        array[()] = content
        pickle.dump(array, file, protocol=protocol)
    return path


def xml(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.xml"
    path.write_text(body, encoding="utf-8")
    return path


def test_csv(tmp_path: Path) -> None:
    text = '\ufeffimage,tags\r\na,dog\r\nb.JPG,"dog  bird dog"\n\nc d, cat\ne,\n'
    assert read_tags(csv(tmp_path, text), CLASSES) == {
        "a": ("dog",),
        "b": ("bird", "dog"),
        "c d": ("cat",),
        "e": (),
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the first line is ''; write the header image,tags"),
        ("a,dog\n", "the first line is 'a,dog'; write the header image,tags"),
        ("image,tags\na,dog\na.png,cat\n", "line 3: image 'a' is there a second time"),
        ("image,tags\na,dog,cat\n", "line 2: 3 columns; write image,tags"),
        ("image,tags\n,dog\n", "line 2: no image name"),
        (
            "image,tags\na,dgo\n",
            "line 2, image 'a': unknown tag 'dgo'; did you mean dog?",
        ),
        ("image,tags\na,zebra\n", "unknown tag 'zebra'; allowed: bird, cat, dog"),
        ('image,tags\na,"dog\n', "not a CSV in UTF-8"),
    ],
)
def test_csv_mistakes(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message(csv(tmp_path, text))


def test_csv_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "tags.csv").write_bytes("image,tags\nä,dog\n".encode("utf-16"))
    assert "not a CSV in UTF-8" in message(tmp_path / "tags.csv")


def test_class_with_a_space_needs_another_separator(tmp_path: Path) -> None:
    path = csv(tmp_path, "image,tags\na,dog traffic light\n")
    text = message(path, ("dog", "traffic light"))
    assert "'traffic light' has one; name it traffic_light" in text
    csv(tmp_path, "image,tags\na,dog;traffic light\nb,traffic light\n")
    assert read_tags(path, ("dog", "traffic light")) == {"a": ("dog", "traffic light"), "b": ("traffic light",)}
    csv(tmp_path, "image,tags\na,traffic light\n")
    assert read_tags(path, ("dog", "traffic light")) == {"a": ("traffic light",)}


def test_missing(tmp_path: Path) -> None:
    assert "folder; set data.tags" in message(tmp_path / "tags.csv")


@pytest.mark.parametrize("dtype", ["float32", "float64", ">f4", "uint8", "int64", "bool"])
def test_npy(tmp_path: Path, dtype: str) -> None:
    content: dict[Any, Any] = {
        "2007_000032": np.array([1, 0, 1], dtype=dtype),
        2007000033: np.array([0, 1, 0], dtype=dtype),
        np.int64(2008000001): np.array([0, 0, 0], dtype=dtype),
        9: np.array([1, 0, 0], dtype=dtype),
    }
    assert read_tags(npy(tmp_path, content), CLASSES) == {
        "2007_000032": ("bird", "dog"),
        "2007_000033": ("cat",),
        "2008_000001": (),
        "9": ("bird",),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_npy_of_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    path = pickled(tmp_path, {"a": np.array([0, 1, 1], dtype=np.float32)}, protocol=protocol)
    assert read_tags(path, CLASSES) == {"a": ("cat", "dog")}


def test_npy_of_numpy_1(tmp_path: Path) -> None:
    path = pickled(tmp_path, {"a": np.array([0, 1, 0], dtype=np.float32)}, protocol=3)
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
    assert expected in message(npy(tmp_path, content))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"image,tags\n", bytes(range(256))])
def test_npy_that_is_not_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    assert "not a dictionary" in message(tmp_path / "a.npy")


def test_npy_cut_short(tmp_path: Path) -> None:
    path = npy(tmp_path, {"a": np.ones(3), "b": np.ones(3)})
    content = path.read_bytes()
    for length in range(0, len(content) - 1, 7):
        path.write_bytes(content[:length])
        message(path)


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
    path = pickled(tmp_path, {"a": Hostile(function, argument)}, protocol=protocol)
    text = message(path)
    assert "refused; give the tags as CSV" in text
    assert name in text
    assert not target.exists()


def test_hostile_npy_is_hostile(tmp_path: Path) -> None:
    """What the test above refuses does run in an ordinary load."""
    target = tmp_path / "made"
    np.load(pickled(tmp_path, Hostile(os.mkdir, str(target)), protocol=4), allow_pickle=True)
    assert target.exists()


def test_npy_with_a_forged_type_is_refused(tmp_path: Path) -> None:
    """An array of 8-byte numbers that says its bytes are objects must not become pointers."""
    path = pickled(tmp_path, {"a": np.full(3, 2**40, dtype=np.int64)}, protocol=4)
    content = path.read_bytes()
    assert content.count(b"\x8c\x02i8") == 1
    path.write_bytes(content.replace(b"\x8c\x02i8", b"\x8c\x02O8"))
    assert "has a vector of 0 values" in message(path)


VOC_XML = """<annotation><filename>x.jpg</filename>
<object><name>dog</name><part><name>head</name></part></object>
<object><name>bird</name></object><object><name>dog</name></object></annotation>"""


def test_xml_folder(tmp_path: Path) -> None:
    folder = tmp_path / "Annotations"
    xml(folder, "2007_000032", VOC_XML)
    xml(folder, "2007_000033", "<annotation/>")
    (folder / "notes.txt").write_text("x")
    assert read_tags(folder, CLASSES) == {"2007_000032": ("bird", "dog"), "2007_000033": ()}


def test_xml_mistakes(tmp_path: Path) -> None:
    folder = tmp_path / "Annotations"
    path = xml(folder, "a", "<annotation><object><name>gnu</name></object></annotation>")
    with pytest.raises(AfaError, match=r"a\.xml: .*'gnu'; .*bird, cat, dog"):
        read_tags(folder, CLASSES)
    path.write_text("<annotation><object>")
    with pytest.raises(AfaError, match=r"a\.xml: .*VOC .*no element found"):
        read_tags(folder, CLASSES)
    path.unlink()
    assert "no .xml file in this folder" in message(folder)


def test_xml_with_entities_is_refused(tmp_path: Path) -> None:
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 9))
    body = f'<?xml version="1.0"?><!DOCTYPE annotation [<!ENTITY l0 "ha">{laughs}]>'
    xml(tmp_path / "A", "a", body + "<annotation><object><name>&l8;</name></object></annotation>")
    with pytest.raises(AfaError, match=r"a\.xml: .*\(annotation\); .*DOCTYPE"):
        read_tags(tmp_path / "A", CLASSES)
