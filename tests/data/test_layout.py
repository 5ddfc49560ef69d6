from __future__ import annotations

import os
import pickle
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from afa.check.tags import check_fast
from afa.config import Config, DataConfig
from afa.config.schema import LayoutName
from afa.data.dataset import MaskedImages, TaggedImages
from afa.data.open import DataSet, open_data
from afa.data.palette import write_index_png
from afa.data.readers.places import READERS
from layouts import (
    CLASSES,
    EXPECTED,
    TAG_FILES,
    class_folders,
    class_folders_of_sides,
    coco_sides,
    metadata_sides,
    one_hot,
    table,
    tag_file,
    touch,
    voc,
    voc_xml,
    with_masks,
    write,
)
from mistakes import refused, said
from opened import Opened, reachable


def found(root: Path, **keys: Any) -> DataSet:
    return open_data(DataConfig(root=str(root), **keys))


def tags_of(images: TaggedImages) -> dict[str, tuple[str, ...]]:
    return {
        name: tuple(images.classes[c] for c in np.flatnonzero(images.tags(i))) for i, name in enumerate(images.names)
    }


def everything(layout: DataSet) -> dict[str, tuple[str, ...]]:
    """The tags of both sides."""
    sides = tags_of(layout.train())
    return sides | (tags_of(layout.validation()) if layout.has_validation else {})


def message(root: Path, **keys: Any) -> str:
    return said(found, root, **keys)


@pytest.mark.parametrize(("kind", "place", "content"), TAG_FILES)
def test_files_of_tags_are_found(tmp_path: Path, kind: str, place: str, content: Any) -> None:
    tag_file(tmp_path, place, content)
    for keys in ({}, {"layout": kind}, {"tags": place}, {"layout": kind, "tags": place}):
        layout = found(tmp_path, **keys)
        assert layout.kind == kind
        assert {name: tags for name, tags in everything(layout).items() if tags} == EXPECTED
        assert layout.classes == ("cat", "dog")
        # An image that COCO lists without annotations holds none of the classes.
        assert (layout.untagged, layout.train().negative.sum()) == (((), 1) if kind == "coco" else (("d",), 0))
    line = layout.describe()
    assert line.startswith(f"{tmp_path}: ")
    assert place in line
    assert "2 classes (cat, dog)" in line
    assert f"1 {'of them without any class' if kind == 'coco' else 'without tags left out'}, no masks" in line
    assert "\n" not in line
    assert layout.train().image(0).shape == (4, 6, 3)


def test_voc_xml_without_lists(tmp_path: Path) -> None:
    voc_xml(tmp_path)
    layout = found(tmp_path)
    assert everything(layout) == {"a": ("cat",), "b": ("dog",)}
    assert "folder of VOC XML in Annotations" in layout.describe()


def test_one_hot_npy(tmp_path: Path) -> None:
    one_hot(tmp_path)
    assert everything(found(tmp_path)) == {"a": ("dog",), "b": ("dog", "cat")}
    (tmp_path / "classes.txt").unlink()
    assert "write the names to classes.txt" in message(tmp_path)
    assert everything(found(tmp_path, classes=("cat", "dog"))) == {"a": ("cat",), "b": ("cat", "dog")}


def test_folders_of_classes(tmp_path: Path) -> None:
    class_folders(tmp_path)
    touch(tmp_path, "dog/more/x.png", "loose.png")
    write(tmp_path, "cat/notes.txt", "x")
    layout = found(tmp_path)
    assert layout.kind == "imagefolder"
    assert layout.classes == CLASSES
    assert tags_of(layout.train())["dog/more/x"] == ("dog",)
    assert layout.untagged == ("loose",)
    assert layout.describe() == (
        f"{tmp_path}: folders of classes, 3 classes (bird, cat, dog); 25 images to train on, 6 for validation "
        "(set aside here by tags, seed 0), 1 without tags left out, no masks"
    )


def test_folders_of_classes_below_images_or_the_stated_folder(tmp_path: Path) -> None:
    class_folders(tmp_path / "one", "images/")
    assert "cat/0" in everything(found(tmp_path / "one"))
    class_folders(tmp_path / "two", "deep/er/")
    touch(tmp_path / "two", "other/x.png")
    assert "cat/0" in everything(found(tmp_path / "two", image_dir="deep/er"))


def test_folders_of_splits(tmp_path: Path) -> None:
    class_folders_of_sides(tmp_path)
    layout = found(tmp_path)
    assert layout.classes == CLASSES
    assert set(tags_of(layout.train())) == {f"train/{c}/{i}" for c in CLASSES for i in range(10)}
    assert set(tags_of(layout.validation())) == {f"Valid/{c}/{i}" for c in CLASSES for i in range(10)}
    assert "30 in a test split left out" in layout.describe()
    shutil.rmtree(tmp_path / "Valid")
    layout = found(tmp_path)
    assert (len(layout.train()), len(layout.validation())) == (24, 6)


def test_a_class_may_be_named_train(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.png", "bus/a.png")
    assert found(tmp_path).classes == ("bus", "train")
    shutil.rmtree(tmp_path / "bus")
    assert found(tmp_path).classes == ("train",)


def test_split_stated_by_files_columns_subsets_and_folders(tmp_path: Path) -> None:
    for name in ("column", "cvat", "folders"):
        touch(tmp_path / name, *(f"images/{side}/{i}.jpg" for side in ("train", "val") for i in range(3)))
    coco_sides(tmp_path / "files")
    rows = [(f"{side}/{i}.jpg", side) for side in ("train", "val") for i in range(3)]
    write(tmp_path / "column", "tags.csv", "file,tags,split\n" + "".join(f"{n},cat,{s}\n" for n, s in rows))
    xml = "".join(f'<image name="{n}" subset="{s}"><tag label="cat"/></image>' for n, s in rows)
    write(tmp_path / "cvat", "annotations.xml", f"<annotations>{xml}</annotations>")
    write(tmp_path / "folders", "tags.csv", "file,tags\n" + "".join(f"{n},cat\n" for n, _ in rows))
    for name in ("files", "column", "cvat", "folders"):
        layout = found(tmp_path / name)
        assert set(layout.train().names) == {"train/0", "train/1", "train/2"}, name
        assert set(layout.validation().names) == {"val/0", "val/1", "val/2"}, name
        assert "(as the data says)" in layout.describe()
    assert found(tmp_path / "files").classes == ("cat", "dog")
    write(tmp_path / "column", "tags.csv", "file,tags,split\ntrain/0.jpg,cat,later\n")
    assert "line 2: the split is 'later'; write" in message(tmp_path / "column")


def test_metadata_in_split_folders(tmp_path: Path) -> None:
    metadata_sides(tmp_path)
    layout = found(tmp_path)
    assert layout.kind == "hf"
    assert tags_of(layout.train()) == {"train/a": ("cat",), "train/b": ()}
    assert tags_of(layout.validation()) == {"validation/a": ("cat",), "validation/b": ()}


def test_split_made_here(tmp_path: Path) -> None:
    table(tmp_path)
    layout, again = found(tmp_path), found(tmp_path)
    train, val = layout.train().names, layout.validation().names
    assert (len(train), len(val)) == (24, 6)
    assert set(train) | set(val) == {f"{i:02d}" for i in range(30)}
    assert again.validation().names == val
    lines = (tmp_path / "tags.csv").read_text().splitlines()
    write(tmp_path, "tags.csv", "\n".join([lines[0], *reversed(lines[1:])]))
    assert set(found(tmp_path).validation().names) == set(val)
    assert any(set(found(tmp_path, split_seed=seed).validation().names) != set(val) for seed in (1, 2))
    assert len(found(tmp_path, split_fraction=0.5).validation()) == 15
    for keys in ({"split_fraction": 0.0}, {"val_list": ""}):
        assert not found(tmp_path, **keys).has_validation
        assert len(found(tmp_path, **keys).train()) == 30
    with refused("validation", "data.split_fraction is 0"):
        found(tmp_path, split_fraction=0.0).validation()


def test_other_lists(tmp_path: Path) -> None:
    table(tmp_path)
    write(tmp_path, "some.txt", "03\n01.png\n")
    assert found(tmp_path).train(list_file="some.txt").names == ("03", "01")
    write(tmp_path, "some.txt", "03\nx\n")
    with refused("some.txt: ", "'x' (1 of 2 ", "; correct"):
        found(tmp_path).train(list_file="some.txt")


def test_class_list_with_colors(tmp_path: Path) -> None:
    table(tmp_path)
    write(tmp_path, "classes.txt", "dog #ff8000\n\nbird,1,2,3\ncat\nzebra fish #0000ff\n")
    layout = found(tmp_path)
    assert layout.classes == ("dog", "bird", "cat", "zebra fish")
    assert layout.colors == {"dog": (255, 128, 0), "bird": (1, 2, 3), "zebra fish": (0, 0, 255)}
    assert found(tmp_path, classes=CLASSES).classes == CLASSES
    write(tmp_path, "classes.txt", "dog\nbird\n")
    assert "image '01': unknown tag 'cat'; allowed: dog" in message(tmp_path)
    write(tmp_path, "classes.txt", "dog,1,2,300\n")
    assert "class 'dog' has the color 1,2,300; give" in message(tmp_path)


def test_class_subset(tmp_path: Path) -> None:
    table(tmp_path)
    layout = found(tmp_path, class_subset=("dog", "bird"))
    assert layout.classes == ("dog", "bird")
    assert len(layout.train()) + len(layout.validation()) == 20
    # A network may have been trained on more classes than these tags ever meet, unless the classes are stated.
    assert everything(found(tmp_path, class_subset=("yak", "dog")))["02"] == ("dog",)
    assert "unknown class 'yak'" in message(tmp_path, class_subset=("yak",), classes=CLASSES)


@pytest.mark.parametrize("folder", ["masks", "SegmentationClassAug", "SegmentationClass"])
def test_masks_beside(tmp_path: Path, folder: str) -> None:
    with_masks(tmp_path, folder)
    layout = found(tmp_path)
    assert layout.has_masks
    assert f"masks in {folder}" in layout.describe()
    images = layout.masked()
    assert images.names == layout.validation().names
    assert images.mask(0).tolist() == [[0, 1, 2, 3, 255, 0]] * 4
    assert images.has_tags(0)
    only_dog = found(tmp_path, class_subset=("dog",)).masked()
    assert only_dog.mask(0).tolist() == [[0, 255, 255, 1, 255, 0]] * 4


def test_masks_follow_the_folders_of_the_images(tmp_path: Path) -> None:
    class_folders(tmp_path)
    for path in ("masks/cat/1.png", "masks/dog/1.png", "masks/bird/1.png"):
        write_index_png(tmp_path / path, np.zeros((4, 6), dtype=np.uint8))
    layout = found(tmp_path)
    assert layout.classes == CLASSES
    write(tmp_path, "l.txt", "cat/1\ndog/1\n")
    assert layout.masked(list_file="l.txt").mask(1).shape == (4, 6)
    shutil.rmtree(tmp_path / "masks")
    write_index_png(tmp_path / "masks" / "1.png", np.zeros((4, 6), dtype=np.uint8))
    with refused("1.png: ", "/1'", "would share this mask"):
        found(tmp_path).masked(list_file="l.txt")


def test_scoring_without_masks(tmp_path: Path) -> None:
    layout = found(table(tmp_path))
    assert not layout.has_masks
    assert layout.has_validation
    assert "masks: no folder of masks; put" in said(layout.masked)
    (tmp_path / "masks").mkdir()
    with refused("masks: no ", ".png (6 of 6 ", "; add"):
        found(tmp_path).masked()
    with_masks(tmp_path / "more")
    with refused("class 'yak'", "mask values"):
        found(tmp_path / "more", class_subset=("yak", "dog")).masked()


@pytest.mark.parametrize(("make", "folder"), [(voc, "SegmentationClassAug"), (with_masks, "masks")])
def test_training_has_no_way_to_the_masks(tmp_path: Path, make: Callable[[Path], Any], folder: str) -> None:
    def masks_of(images: TaggedImages) -> list[object]:
        return [item for item in reachable(images) if isinstance(item, (str, Path)) and f"/{folder}" in f"/{item}"]

    make(tmp_path / "set")
    layout = found(tmp_path / "set")
    for images in (layout.train(), layout.validation()):
        assert type(images) is TaggedImages
        assert not [name for name in dir(images) if "mask" in name]
        assert not masks_of(images)
        assert folder.encode() not in pickle.dumps(images)
    assert isinstance(layout.masked(), MaskedImages)
    assert masks_of(layout.masked())  # the search does find them


@pytest.mark.parametrize("make", [with_masks, lambda root: (class_folders(root), with_masks(root))])
def test_masks_are_not_even_listed_for_training(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path)
    with Opened.recorded() as paths:
        found(tmp_path).train()
    assert paths
    assert not [path for path in paths if f"{path}/".startswith(f"{tmp_path}/masks/")]
    with Opened.recorded() as paths:
        found(tmp_path).masked()
    assert [path for path in paths if f"{path}/".startswith(f"{tmp_path}/masks/")]


def test_the_stated_mask_folder_is_no_class(tmp_path: Path) -> None:
    class_folders(tmp_path)
    write_index_png(tmp_path / "truth" / "cat" / "0.png", np.zeros((4, 6), dtype=np.uint8))
    assert found(tmp_path).classes == (*CLASSES, "truth")
    assert found(tmp_path, mask_dir="truth").classes == CLASSES


def test_voc_lists_win(tmp_path: Path) -> None:
    voc(tmp_path)
    shutil.move(tmp_path / "lists", tmp_path / "aside")
    assert found(tmp_path).kind == "table"
    shutil.move(tmp_path / "aside", tmp_path / "lists")
    layout = found(tmp_path)
    assert layout.kind == "voc"
    assert layout.describe() == (
        f"{tmp_path}: VOC layout, 3 classes (bird, cat, dog); 3 images to train on (lists/train.txt), 1 image for "
        "validation (lists/val.txt), tags from tags.csv, masks in SegmentationClassAug"
    )
    assert layout.train().names == ("00", "01", "02")
    assert layout.validation().names == layout.masked().names == ("03",)
    assert layout.has_masks
    assert layout.has_validation
    assert found(tmp_path, layout="table").kind == "table"
    assert found(table(tmp_path / "other"), layout="voc", image_dir="images").kind == "voc"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"layout": "coco"}, "no COCO instances here; set data.tags"),
        ({"layout": "hf"}, "no metadata.jsonl or metadata.csv here"),
        ({"layout": "cvat", "tags": "tags.csv"}, "not CVAT export; correct data.layout"),
        ({"tags": "none.csv"}, "none.csv: no such tags"),
        ({"image_dir": "none"}, "none: no such folder; set data.image_dir"),
        ({"root": "none"}, "none: no such folder; set data.root"),
    ],
)
def test_wrong_settings(tmp_path: Path, keys: dict[str, Any], expected: str) -> None:
    assert expected in said(open_data, replace(DataConfig(root=str(table(tmp_path))), **keys))


def test_nothing_is_found(tmp_path: Path) -> None:
    assert "no tags found; put a tags.csv" in message(tmp_path)
    touch(tmp_path, "images/a.jpg")
    assert "no tags found" in message(tmp_path)
    assert "no images found" in message(tmp_path, layout="imagefolder")
    touch(tmp_path, "JPEGImages/a.jpg")
    shutil.rmtree(tmp_path / "images")
    with refused("lists/train.txt: ", "data.train_list"):
        found(tmp_path).train()


def test_two_files_of_tags(tmp_path: Path) -> None:
    table(tmp_path)
    shutil.copy(tmp_path / "tags.csv", tmp_path / "tags.tsv")
    assert "tags.csv and tags.tsv may both" in message(tmp_path)
    assert found(tmp_path, tags="tags.csv").kind == "table"


def entry_message(root: Path, image: str) -> str:
    write(root, "tags.json", {image: ["cat"]})
    return message(root, tags="tags.json")


OUTSIDE = ("../../x.jpg", "/etc/passwd.jpg", "a/../../b.png", "..\\..\\x.jpg", "C:\\x.jpg", "..", "/../tags.csv")


@pytest.mark.parametrize("image", [*OUTSIDE, "//x/y.png", "file:///etc/passwd.jpg"])
def test_paths_that_lead_out_are_never_opened(tmp_path: Path, image: str) -> None:
    table(tmp_path / "set")
    touch(tmp_path, "b.png", "x.jpg")
    with Opened.recorded() as paths:
        assert f"has no image {image!r} (1 of 1 images missing)" in entry_message(tmp_path / "set", image)
    assert not [path for path in paths if not path.startswith(str(tmp_path / "set"))]


FOREIGN = (
    "..\\..\\media\\cats\\p0.jpg", "/data/projects/cats/p0.jpg", "C:\\me\\cats\\P0.JPG",
    "\\\\server\\share\\cats\\p0.jpg", "x/../../cats/p0.png", "http://a.b/cats/p0.jpg?x=1",
    "https://a.b/cats%2Fp0.jpg?sign=a/b.png", "s3://pets/cats/p0.jpg", "gs://b/cats/p0.jpg", "cats/p0.jpg?v=2",
    "/data/local-files/?d=x/cats/p0.jpg", "https://a.b/get?width=9&file=cats/p0.jpg", "file:///C:/me/cats/p0.jpg",
    "/data/upload/3/cats/0a1b2c3d-p0.jpg", "..\\media\\upload\\4\\cats\\f78f7-p0.jpg",
)  # fmt: skip


@pytest.mark.parametrize("image", FOREIGN)
def test_names_from_elsewhere_are_looked_up_by_their_last_parts(tmp_path: Path, image: str) -> None:
    touch(tmp_path, "images/cats/p0.jpg", "images/dogs/p0.jpg", "images/p0.jpg")
    write(tmp_path, "tags.json", {image: ["cat"]})
    assert list(everything(found(tmp_path))) == ["cats/p0"]


def test_names_from_elsewhere_fit_one_image_or_none(tmp_path: Path) -> None:
    touch(tmp_path, "images/cats/p0.jpg", "images/dogs/p0.jpg", "images/one.jpg")
    assert "'/x/birds/p0.jpg' may be 'cats/p0.jpg' or 'dogs/p0.jpg'" in entry_message(tmp_path, "/x/birds/p0.jpg")
    assert "has no image 'https://a.b/c.jpg' (1 of 1 images missing), and afa fetches none; add" in entry_message(
        tmp_path, "https://a.b/c.jpg"
    )
    # A date is no prefix of an upload, unless the path says that this is one.
    for image in ("20260101-one.jpg", "/x/20260101-one.jpg"):
        assert "images missing" in entry_message(tmp_path, image)
    write(tmp_path, "tags.json", {"/x/one.jpg": ["cat"], "/y/one.jpg": ["dog"]})
    assert "'/y/one.jpg' is 'one.jpg', which" in message(tmp_path)


@pytest.mark.parametrize(
    "image",
    ["00.png", "00", "./00.png", "images/00.png", "00.PNG", "00.jpg", "{folder}/00.png", "{root}/images/00.png"],
)
def test_what_may_be_written_for_an_image(tmp_path: Path, image: str) -> None:
    table(tmp_path)
    write(tmp_path, "tags.json", {image.format(folder=tmp_path / "images", root=tmp_path): ["cat"]})
    assert everything(found(tmp_path, tags="tags.json")) == {"00": ("cat",)}


def test_folders_may_be_left_out_where_that_is_clear(tmp_path: Path) -> None:
    touch(tmp_path, "images/x/a.jpg", "images/y/a.jpg", "images/y/z/b.jpg", "images/c.jpg", "images/C.png")
    write(tmp_path, "tags.json", {"b.jpg": ["cat"], "x\\a.jpg": ["cat"]})
    assert set(everything(found(tmp_path))) == {"y/z/b", "x/a"}
    assert "'a.jpg' may be 'x/a.jpg' or 'y/a.jpg'" in entry_message(tmp_path, "a.jpg")
    assert "'x/b.jpg' (1 of 1 images missing); add" in entry_message(tmp_path, "x/b.jpg")


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ("x.png,cat\n01.png,dog\ny.png,cat\n", ("line 3: ", "images", "'x.png' (2 of 4", "data.image_dir")),
        ("images/00.png,dog\n", ("'images/00.png' is '00.png', which", "line 2 has too; keep one entry of it")),
    ],
)
def test_missing_and_repeated_images(tmp_path: Path, rows: str, parts: tuple[str, ...]) -> None:
    table(tmp_path)
    path = write(tmp_path, "tags.csv", f"file,tags\n00.png,cat\n{rows}")
    with refused(path, *parts):
        found(tmp_path)


@pytest.mark.parametrize(("written", "stem"), [("{}", "{:04d}"), ("{}.0", "{:03d}"), ("{}.jpg", "{:02d}")])
def test_zeros_that_a_spreadsheet_took(tmp_path: Path, written: str, stem: str) -> None:
    touch(tmp_path, *(f"images/{stem.format(i)}.jpg" for i in range(4)))
    write(tmp_path, "tags.csv", "file,tags\n" + "".join(f"{written.format(i)},cat\n" for i in range(4)))
    with refused(repr(written.format(0)), "(4 of 4 images missing) but", stem.format(0), "spreadsheet", "as text"):
        found(tmp_path)
    write(tmp_path, "tags.csv", "file,tags\n9,cat\n")
    assert "a spreadsheet seems" not in message(tmp_path)


def test_missing_images_are_left_out_and_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    table(tmp_path)
    path = write(tmp_path, "tags.csv", "file,tags\nx.png,cat\n00.png,dog\ny.png,cat\n01.png,dog\n")
    assert "leave them out by --skip-missing" in message(tmp_path)
    opened = found(tmp_path, skip_missing=True)
    assert everything(opened) == {"00": ("dog",), "01": ("dog",)}
    assert opened.notes == (f"{tmp_path / 'images'}: left out tags of missing images: 2 (such as 'x.png')",)
    path.write_text("file,tags\nx.png,cat\n")
    assert "'x.png' (1 of 1 images missing)" in message(tmp_path, skip_missing=True)


def test_class_lists_that_differ_are_joined_by_name(tmp_path: Path) -> None:
    sides = {"train": {10: "cat", 11: "dog", 12: "ant"}, "val": {0: "dog", 1: "cat", 2: "owl"}}
    for side, kinds in sides.items():
        touch(tmp_path, *(f"{side}/{side}{n}.jpg" for n in range(3)))
        coco = {
            "images": [{"id": n, "file_name": f"{side}{n}.jpg"} for n in range(3)],
            "annotations": [{"image_id": n, "category_id": kind} for n, kind in enumerate(kinds)],
            "categories": [{"id": kind, "name": name} for kind, name in kinds.items()],
        }
        write(tmp_path, f"annotations/instances_{side}.json", coco)
    opened = found(tmp_path)
    assert opened.classes == ("cat", "dog", "ant", "owl")
    assert tags_of(opened.train()) == {"train/train0": ("cat",), "train/train1": ("dog",), "train/train2": ("ant",)}
    assert tags_of(opened.validation()) == {"val/val0": ("dog",), "val/val1": ("cat",), "val/val2": ("owl",)}
    # What only one file lists was not looked for in the images of the other.
    assert [opened.train().targets(n).tolist() for n in range(2)] == [[1, 0, 0, -1], [0, 1, 0, -1]]
    assert opened.validation().targets(0).tolist() == [0, 1, -1, 0]
    only = (
        "instances_train.json: class 'ant' is only listed here",
        "instances_val.json: class 'owl' is only listed here",
    )
    assert all(part in note for part, note in zip(only, opened.notes, strict=True))


def test_unicode_forms_meet(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "größe é.jpg") for form in ("NFC", "NFD"))
    assert composed != decomposed
    for on_disk, written in ((composed, decomposed), (decomposed, composed)):
        root = tmp_path / str(len(on_disk))
        touch(root, f"images/{on_disk}")
        write(root, "tags.json", {written: ["cat"]})
        assert list(everything(found(root))) == [on_disk.removesuffix(".jpg")]


def test_names_that_would_meet_on_another_system(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/A.jpg", "images/b.jpg", "images/b.png")
    write(tmp_path, "tags.csv", "file,tags\na.jpg,cat\nA.jpg,dog\n")
    assert "'a.jpg' and 'A.jpg' differ in case" in message(tmp_path)
    write(tmp_path, "tags.csv", "file,tags\na.jpg,cat\nb.png,dog\n")
    assert set(everything(found(tmp_path))) == {"a", "b"}
    assert found(tmp_path).train().image_path(1).name in ("a.jpg", "b.png")
    write(tmp_path, "tags.csv", "file,tags\nb,dog\n")
    assert "image 'b' may be 'b.jpg' or 'b.png'" in message(tmp_path)
    (tmp_path / "images").rename(tmp_path / "dog")
    (tmp_path / "dog" / "A.jpg").unlink()
    assert "'dog/b.jpg' and 'dog/b.png' have" in message(tmp_path, layout="imagefolder")


def test_names_with_line_breaks(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a\nb.png", "dog/c.png")
    assert "'cat/a\\nb.png' has control characters; rename" in message(tmp_path)


def test_links_in_a_circle_end_and_links_to_folders_are_followed(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "a.png", "deep/b.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "deep" / "again").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "me").symlink_to(root, target_is_directory=True)
    (root / "cat" / "broken.png").symlink_to(tmp_path / "nowhere")
    assert set(everything(found(root))) == {"cat/a", "cat/deep/b"}


def test_one_walk_and_no_look_at_single_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 listed images: as many folders are listed as there are, and nothing is asked of single files."""
    folders, each = 20, 1000
    rows = []
    for d in range(folders):
        folder = tmp_path / "images" / f"{d:02d}"
        folder.mkdir(parents=True)
        for i in range(each):
            os.close(os.open(folder / f"{i:04d}.jpg", os.O_CREAT))
            rows.append(f'{{"file_name": "{d:02d}/{i:04d}.jpg", "tags": ["c{(d * i) % 7}"]}}')
    write(tmp_path, "tags.jsonl", "\n".join(rows))
    calls: list[str] = []
    for name in ("stat", "lstat", "scandir", "listdir", "open"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=original, n=name, **k: (calls.append(n), f(*a, **k))[1])
    layout = found(tmp_path)
    assert len(layout.train()) + len(layout.validation()) == folders * each
    assert calls.count("scandir") + calls.count("listdir") < folders + 20
    assert len(calls) < 5 * folders


@pytest.mark.parametrize(
    ("images", "files", "kind", "doubt"),
    [
        (
            ("train/a.jpg",),
            (),
            "imagefolder",
            "taken for folders of classes of which one is named 'train', and could also",
        ),
        (("cat/a.jpg", "labels/b.jpg"), (), "imagefolder", "is named 'labels', and could also be images whose tags"),
        (("cat/a.jpg", "dog/b.jpg"), ("my.xlsx",), "imagefolder", "elsewhere ('my.xlsx' is not read: save it as CSV"),
        (
            ("cat/a.jpg", "dog/b.jpg"),
            ("my.csv",),
            "table",
            "in my.csv, and could also be folders of classes (cat, dog); if",
        ),
        (
            ("images/a.jpg", "images/b.jpg"),
            ("tags.csv", "labels.csv"),
            "table",
            "could also be that in labels.csv; if so, set",
        ),
        (("cat/a.jpg", "dog/b.jpg"), (), "imagefolder", None),
        (("cat/a.jpg", "dog/b.jpg"), ("tags.csv",), "table", None),
        (("images/a.jpg", "images/b.jpg"), ("my.csv",), "table", None),
        (("train/a.jpg", "val/b.jpg"), ("my.csv",), "table", None),
    ],
)
def test_what_else_a_folder_may_be(
    tmp_path: Path, images: tuple[str, ...], files: tuple[str, ...], kind: str, doubt: str | None
) -> None:
    touch(tmp_path, *images)
    for name in files:
        write(tmp_path, name, "file,tags\na.jpg,cat\nb.jpg,dog\n")
    opened = found(tmp_path)
    assert opened.kind == kind
    assert len(opened.notes) == (doubt is not None)
    assert all(str(tmp_path) in note and doubt is not None and doubt in note for note in opened.notes)
    assert found(tmp_path, layout=kind, tags=files[0] if kind == "table" else "").classes == opened.classes
    warned = [problem for problem in check_fast(opened, Config()) if problem.message in opened.notes]
    assert [problem.severity for problem in warned] == ["warning"] * len(opened.notes)


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg")
    write(tmp_path, "labels.xlsx", "PK")
    assert "no tags found; put a tags.csv" in message(tmp_path)
    assert "set data.tags ('labels.xlsx' is not read: save it as CSV in UTF-8)" in message(tmp_path)


def test_labelme_may_be_yolo_too(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg")
    write(tmp_path, "images/a.json", {"shapes": [{"label": "cat"}], "imagePath": "a.jpg"})
    write(tmp_path, "data.yaml", "names: [dog]\n")
    opened = found(tmp_path)
    assert opened.classes == ("cat",)
    assert [note for note in opened.notes if "could also be YOLO labels; if so, set data.layout" in note]


def test_every_layout_of_the_configuration_is_known() -> None:
    kinds = set(get_args(LayoutName))
    assert kinds - {"auto", "voc", "imagefolder", "hf", "shards"} == {reader.layout for reader in READERS.values()}
