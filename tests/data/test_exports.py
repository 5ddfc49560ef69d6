"""Data sets for YOLO and of LabelMe as input, in the forms that tools write; and what afa itself writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from afa.config import DataConfig
from afa.data.open import DataSet, open_data
from layouts import touch, write
from made_masks import CLASSES, write_made
from mistakes import said
from opened import Opened

BOX = "0.5 0.5 0.2 0.2\n"


def found(root: Path, **keys: Any) -> DataSet:
    return open_data(DataConfig(root=str(root), **keys))


def tags_of(data: DataSet, side: str = "tagged") -> dict[str, tuple[str, ...]]:
    images = getattr(data, side)()
    return {
        name: tuple(images.classes[c] for c in np.flatnonzero(images.tags(i))) for i, name in enumerate(images.names)
    }


def yolo(root: Path, images: str = "images/{}.jpg", texts: str = "labels/{}.txt") -> dict[str, tuple[str, ...]]:
    """Three labeled images, one labeled as empty, one without labels; the tags of the labeled ones."""
    lines = {
        "a": f"0 {BOX}",
        "b": f"1 {BOX}\n0 0.1 0.2 0.3 0.4 0.5 0.6\n",
        "c": f"1.0 {BOX}1 {BOX}",
        "d": "",
        "e": None,
    }
    for name, text in lines.items():
        touch(root, images.format(name))
        if text is not None:
            write(root, texts.format(name), text)
    stem = images.removeprefix("images/").removesuffix(".jpg")
    return {
        stem.format(name): tags for name, tags in (("a", ("cat",)), ("b", ("cat", "dog")), ("c", ("dog",)), ("d", ()))
    }


@pytest.mark.parametrize(
    ("images", "texts", "names", "content"),
    [
        ("images/{}.jpg", "labels/{}.txt", "data.yaml", "train: images\nval: images\nnc: 2\nnames: [cat, dog]\n"),
        ("images/{}.jpg", "labels/{}.txt", "pets.yml", "path: ../pets\nnames:\n  1: dog\n  0: cat\n"),
        ("images/{}.jpg", "labels/{}.txt", "classes.txt", "cat #ff8000\ndog\n"),
        ("images/{}.jpg", "labels/{}.txt", "labels/classes.txt", "cat\ndog\n"),
        ("images/sub/{}.jpg", "labels/sub/{}.txt", "classes.txt", "cat\ndog\n"),
        ("JPEGImages/{}.jpg", "labels/{}.txt", "classes.txt", "cat\ndog\n"),
        ("train/images/{}.rgb.jpg", "train/labels/{}.rgb.txt", "data.yaml", "names: ['cat', 'dog']\n"),
        ("obj_train_data/{}.jpg", "obj_train_data/{}.txt", "obj.names", "cat\ndog\n"),
        ("{}.jpg", "{}.txt", "classes.txt", "cat\ndog\n"),
        ("images/{}.jpg", "images/{}.txt", "images/classes.txt", "cat\ndog\n"),
        ("images/{}.png.jpg", "labels/{}.png.txt", "classes.txt", "cat\ndog\n"),
    ],
)
def test_yolo(tmp_path: Path, images: str, texts: str, names: str, content: str) -> None:
    tags = {name.removeprefix("JPEGImages/"): each for name, each in yolo(tmp_path, images, texts).items()}
    write(tmp_path, names, content)
    write(tmp_path, "notes.json", {"categories": [{"id": 0, "name": "cat"}], "info": {}})  # as Label Studio adds
    write(tmp_path, "README.txt", "made by hand")
    data = found(tmp_path, classes=())
    assert (data.kind, data.classes) == ("yolo", ("cat", "dog"))
    assert tags_of(data) == tags
    assert [name.rpartition("/")[2][0] for name in data.untagged] == ["e"]
    assert "YOLO labels" in data.describe()
    assert found(tmp_path, layout="yolo").classes == ("cat", "dog")
    if names.endswith("ml"):
        assert tags_of(found(tmp_path, tags=names)) == tags


@pytest.mark.parametrize(
    ("settings", "train", "validation"),
    [
        ("path: /content/pets\ntrain: images/one\nval: images/two\n", {"one/a", "three/c"}, {"two/b"}),
        ("train: ../images/one\nval: [images/two, images/three]\n", {"one/a"}, {"two/b", "three/c"}),
        ("train: /content/pets/images/one\nval: /content/pets/images/two\n", {"one/a", "three/c"}, {"two/b"}),
        ("train: t.txt\nval: ./v.txt\n", {"one/a", "three/c"}, {"two/b"}),
        ("train: images\nval: images\n", None, None),
        ("", None, None),
    ],
)
def test_sides_of_yolo(tmp_path: Path, settings: str, train: set[str] | None, validation: set[str] | None) -> None:
    for name, place in zip("abc", ("one", "two", "three"), strict=True):
        touch(tmp_path, f"images/{place}/{name}.jpg")
        write(tmp_path, f"labels/{place}/{name}.txt", f"0 {BOX}")
    write(tmp_path, "t.txt", "./images/one/a.jpg\n/content/pets/images/three/c.jpg\n")
    write(tmp_path, "v.txt", "images/two/b.jpg\n")
    write(tmp_path, "data.yaml", f"{settings}names: [cat]\n")
    data = found(tmp_path)
    if train is None:
        assert "set aside here" in data.describe()
        return
    assert "as the data says" in data.describe()
    assert (set(data.train().names), set(data.validation().names)) == (train, validation)


def test_sides_of_yolo_by_folders(tmp_path: Path) -> None:
    for side in ("train", "valid", "test"):
        touch(tmp_path, f"{side}/images/a.jpg")
        write(tmp_path, f"{side}/labels/a.txt", f"0 {BOX}")
    write(tmp_path, "data.yaml", "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: [cat]\n")
    for _ in range(2):
        data = found(tmp_path)
        assert (data.train().names, data.validation().names) == (("train/images/a",), ("valid/images/a",))
        assert "1 in a test split left out" in data.describe()
        write(tmp_path, "data.yaml", "names: [cat]\n")


def test_texts_beside_labels_are_no_labels(tmp_path: Path) -> None:
    names = ("one/a", "two/my_classes", "two/readme")
    for name in names:
        touch(tmp_path, f"images/{name}.jpg")
        write(tmp_path, f"labels/{name}.txt", f"0 {BOX}")
    write(tmp_path, "classes.txt", "cat\ndog\n")
    write(tmp_path, "labels/one/classes.txt", "cat\ndog\n")
    write(tmp_path, "labels/README.txt", "made by hand\n")
    assert tags_of(found(tmp_path)) == dict.fromkeys(names, ("cat",))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_labels_in_encodings_of_windows(tmp_path: Path, encoding: str) -> None:
    tags = yolo(tmp_path)
    write(tmp_path, "classes.txt", "cat\ndog\n")
    for label in (tmp_path / "labels").iterdir():
        label.write_text(label.read_text(), encoding=encoding)
    assert tags_of(found(tmp_path)) == tags


def test_a_broken_file_of_labels_is_named_without_settings(tmp_path: Path) -> None:
    yolo(tmp_path)
    write(tmp_path, "classes.txt", "cat\ndog\n")
    write(tmp_path, "labels/a.txt", f"cat {BOX}")
    assert "labels/a.txt, line 1: is 'cat 0.5 0.5 0.2 0.2'; write class" in said(found, tmp_path)
    for name in "abc":
        write(tmp_path, f"labels/{name}.txt", "a red car")
    assert f"{tmp_path}: no tags found" in said(found, tmp_path)


@pytest.mark.parametrize(
    ("place", "content", "expected"),
    [
        ("labels/a.txt", "2 " + BOX, "labels/a.txt: class number 2, of 2 names by number; correct"),
        ("labels/a.txt", "cat " + BOX, "labels/a.txt, line 1: is 'cat 0.5 0.5 0.2 0.2'; write class x y width height"),
        ("labels/b.txt", f"0 {BOX}\n\n1 0.5\n", "labels/b.txt, line 4: is '1 0.5'; write"),
        ("data.yaml", "names: [cat, dog\n", "data.yaml: not valid YAML (while parsing"),
        ("data.yaml", "names:\n  a: cat\n", "data.yaml: names has no list of names by number; write names:"),
        ("data.yaml", "names:\n  0: [cat]\n", "data.yaml: name 0 is no text; write"),
        ("data.yaml", "names: cat\n", "data.yaml: numbers of classes without names; write the names to classes.txt"),
        ("data.yaml", "names: [cat, cat]\n", "data.yaml: class 'cat' is there twice"),
        ("labels/f.txt", "0 " + BOX, "no image 'images/f.jpg' (1 of 5 images missing); add"),
    ],
)
def test_mistakes_in_yolo(tmp_path: Path, place: str, content: str, expected: str) -> None:
    yolo(tmp_path)
    write(tmp_path, "data.yaml", "names: [cat, dog]\n")
    write(tmp_path, place, content)
    assert expected in said(found, tmp_path)


def test_settings_that_would_fill_the_memory_are_read(tmp_path: Path) -> None:
    yolo(tmp_path)
    lines = [
        "a0: &a0 [x, x, x, x, x, x, x, x]",
        *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 40)),
    ]
    write(tmp_path, "data.yaml", "\n".join([*lines, "names: *a39"]))
    assert "name 0 is no text" in said(found, tmp_path)


def test_texts_beside_images_are_no_labels(tmp_path: Path) -> None:
    """Captions, as for training generators of images."""
    touch(tmp_path, "cat/a.jpg", "dog/b.jpg", "images/c.jpg")
    write(tmp_path, "classes.txt", "cat\ndog\nimages\n")
    write(tmp_path, "images/c.txt", "a red car\n")
    assert found(tmp_path).kind == "imagefolder"


def shape(label: str) -> dict[str, Any]:
    return {"label": label, "points": [[1, 2], [3, 12345.5]], "group_id": None, "shape_type": "polygon", "flags": {}}


def labelme(root: Path, place: str, image: str, *tags: str, **flags: bool) -> None:
    shapes = [shape(tag) for tag in tags]
    head = {"version": "5.5.0", "flags": flags, "shapes": shapes, "imagePath": image}
    write(root, place, head | {"imageData": "AAAA", "imageHeight": 4, "imageWidth": 6})


@pytest.mark.parametrize(
    ("images", "place", "path"),
    [
        ("{}.jpg", "{}.json", "{}.jpg"),
        ("images/{}.jpg", "images/{}.json", "{}.jpg"),
        ("images/{}.jpg", "labels/{}.json", "..\\images\\{}.jpg"),
        ("images/{}.jpg", "annotations/{}.json", "../../elsewhere/{}.jpg"),
        ("images/x/{}.jpg", "annotations/x/{}.json", "C:\\me\\x\\{}.jpg"),
        ("images/{}.rgb.jpg", "images/{}.rgb.json", "{}.rgb.jpg"),
    ],
)
def test_labelme(tmp_path: Path, images: str, place: str, path: str) -> None:
    names = {"a": ("cat", "traffic light"), "b": ("dog",), "c": ()}
    for name, tags in names.items():
        touch(tmp_path, images.format(name))
        labelme(tmp_path, place.format(name), path.format(name), *tags, "__ignore__", "_background_", cat=False)
    labelme(tmp_path, place.format("c"), path.format("c"), cat=True)
    data = found(tmp_path)
    stem = images.removeprefix("images/").removesuffix(".jpg")
    expected = {"a": ("cat", "traffic light"), "b": ("dog",), "c": ("cat",)}
    assert (data.kind, data.classes) == ("labelme", ("cat", "dog", "traffic light"))
    assert tags_of(data) == {stem.format(name): tags for name, tags in expected.items()}
    assert "LabelMe files, 3 classes" in data.describe()
    assert tags_of(found(tmp_path, layout="labelme")) == tags_of(data)


def test_numbers_are_labels_of_labelme(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    shapes = [{"label": label, "points": []} for label in (7, "cat", None)]
    write(tmp_path, "a.json", {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": "a.jpg"})
    assert tags_of(found(tmp_path)) == {"a": ("7", "cat")}


def test_labelme_in_folders_of_the_split(tmp_path: Path) -> None:
    for side in ("train", "val"):
        touch(tmp_path, f"{side}/train_1.jpg")
        labelme(tmp_path, f"{side}/train_1.json", "train_1.jpg", "cat")
    write(tmp_path, "val/settings.json", {"a": 1})
    data = found(tmp_path)
    assert tags_of(data, "train") == {"train/train_1": ("cat",)}
    assert tags_of(data, "validation") == {"val/train_1": ("cat",)}
    assert data.notes == (f"{tmp_path}: 1 JSON files are none of LabelMe and left out (['val/settings.json'])",)


def test_one_labelme_file_is_a_file_of_tags(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    labelme(tmp_path, "a.json", "a.jpg", "cat")
    assert tags_of(found(tmp_path, tags="a.json")) == {"a": ("cat",)}
    write(tmp_path, "a.json", {"shapes": 5, "imagePath": "a.jpg"})
    assert "a.json: no file of LabelMe, which has shapes" in said(found, tmp_path, tags="a.json")


def test_a_table_beside_wins(tmp_path: Path) -> None:
    yolo(tmp_path)
    labelme(tmp_path, "images/a.json", "a.jpg", "dog")
    write(tmp_path, "tags.csv", "file,tags\na.jpg,bird\n")
    assert tags_of(found(tmp_path)) == {"a": ("bird",)}
    assert tags_of(found(tmp_path, layout="labelme")) == {"a": ("dog",)}
    write(tmp_path, "data.yaml", "names: [cat, dog]\n")
    assert found(tmp_path, layout="yolo").classes == ("cat", "dog")
    assert "no YOLO labels here" in said(found, tmp_path / "images", layout="yolo")


def test_masks_beside_are_not_listed(tmp_path: Path) -> None:
    yolo(tmp_path)
    write(tmp_path, "data.yaml", "names: [cat, dog]\n")
    write(tmp_path, "masks/a.txt", "x")
    with Opened.recorded() as paths:
        found(tmp_path).train()
    assert not [path for path in paths if "/masks" in path]


DOTTED = ("b", "b.rgb", "b.png", "sub/b.jpg.v2", "2007.01.02")


@pytest.mark.parametrize(
    ("format", "root", "keys"),
    [
        ("yolo", "out/yolo", {}),
        ("labelme", "", {"tags": "out/labelme"}),
        ("coco", "", {"tags": "out/coco.json"}),
    ],
)
def test_afa_reads_the_tags_that_it_writes(tmp_path: Path, format: str, root: str, keys: dict[str, Any]) -> None:
    masks = [np.full((20, 30), value, dtype=np.uint8) for value in (1, 2, 3, 1, 0)]
    masks[0][:, 15:] = 3
    write_made(format, tmp_path, masks, names=DOTTED)
    data = found(tmp_path / root, **keys)
    assert set(data.classes) == set(CLASSES)
    tags = dict(zip(DOTTED, [("cat", "Straße"), ("potted plant",), ("Straße",), ("cat",), ()], strict=True))
    assert {name: set(each) for name, each in tags_of(data).items()} == {name: set(tags[name]) for name in tags}


def test_afa_reads_the_lists_and_masks_that_it_writes(tmp_path: Path) -> None:
    masks = [np.full((20, 30), value, dtype=np.uint8) for value in range(4)]
    write_made("voc", tmp_path, [*masks, masks[1]], names=DOTTED)
    keys = {"layout": "voc", "val_list": "ImageSets/Segmentation/default.txt", "mask_dir": "SegmentationClass"}
    rows = ["cat", "cat", "potted plant", "Straße", "cat"]
    write(tmp_path / "out/voc", "tags.csv", "image,tags\n" + "".join(map("{},{};\n".format, DOTTED, rows)))
    data = found(tmp_path / "out/voc", **keys)
    images = data.masked()
    assert images.names == DOTTED
    assert [int(images.mask(index)[0, 0]) for index in range(5)] == [0, 1, 2, 3, 1]
    assert [images.classes[int(images.tags(index).argmax())] for index in range(5)] == rows
    assert "5 images for validation" in data.describe()
