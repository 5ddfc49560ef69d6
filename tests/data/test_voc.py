"""The layout of PASCAL VOC: lists, their tags and masks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afa.config import DataConfig
from afa.data.classes import VOC_CLASSES
from afa.data.dataset import MaskedImages, TaggedImages
from afa.data.open import open_data
from afa.data.palette import write_index_png
from layouts import touch, write
from mistakes import refused, said

NAMES = ("a", "b", "c")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images of 6x4 pixels; the mask of each has every stored value from 0 to 3, and 255."""
    root = tmp_path / "set"
    for name in NAMES:
        touch(root, f"JPEGImages/{name}.png")
        write_mask(root, name, np.array([[0, 1, 2, 3, 255, 0]] * 4))
    write(root, "lists/train.txt", "a\nb\nc\n")
    write(root, "lists/val.txt", "c\na\n")
    write(root, "lists/tags.csv", "image,tags\na,bird dog\nb,cat\nc,dog\n")
    write(root, "classes.txt", "bird\ncat\ndog\n")
    return root


@pytest.fixture
def data(root: Path) -> DataConfig:
    return DataConfig(root=str(root))


def write_mask(root: Path, name: str, label: np.ndarray) -> None:
    write_index_png(root / "SegmentationClassAug" / f"{name}.png", label.astype(np.uint8))


def train(data: DataConfig) -> TaggedImages:
    return open_data(data).train()


def masked(data: DataConfig) -> MaskedImages:
    return open_data(data).masked()


def test_training_images(data: DataConfig, root: Path) -> None:
    images = train(data)
    assert images.classes == ("bird", "cat", "dog")
    assert images.names == ("a", "b", "c")
    assert len(images) == 3
    assert images.image_path(1) == root / "JPEGImages" / "b.png"
    assert images.image(1).shape == (4, 6, 3)
    assert [images.tags(index).tolist() for index in range(3)] == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert images.tags(0).dtype == np.float32
    images.tags(0)[:] = 5
    assert images.tags(0).tolist() == [1, 0, 1]


def test_scored_images(data: DataConfig) -> None:
    images = masked(data)
    assert images.names == ("c", "a")
    assert images.has_tags(1)
    assert images.tags(1).tolist() == [1, 0, 1]
    mask = images.mask(0)
    assert mask.dtype == np.uint8
    assert mask.tolist() == [[0, 1, 2, 3, 255, 0]] * 4


def test_other_lists(data: DataConfig, root: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("\ufeff\n  b.JPG \r\n\n")
    assert open_data(data).train(list_file=str(tmp_path / "one.txt")).names == ("b",)
    assert open_data(data).train(list_file="lists/val.txt").names == ("c", "a")
    assert open_data(data).masked(list_file="lists/train.txt").names == ("a", "b", "c")


def test_voc_classes_are_the_default(data: DataConfig, root: Path) -> None:
    (root / "classes.txt").unlink()
    images = train(data)
    assert images.classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert train(replace(data, classes=("dog", "cat", "bird"))).tags(0).tolist() == [1, 0, 1]


def test_suffix_in_any_case_and_images_in_folders(data: DataConfig, root: Path) -> None:
    (root / "JPEGImages" / "a.png").rename(root / "JPEGImages" / "a.PNG")
    (root / "JPEGImages" / "more").mkdir()
    shutil.copy(root / "JPEGImages" / "b.png", root / "JPEGImages" / "more" / "d.png")
    write(root, "lists/train.txt", "a\nmore/d\n")
    write(root, "lists/tags.csv", "image,tags\na,dog\nmore/d.png,cat\n")
    images = train(data)
    assert images.image_path(0).name == "a.PNG"
    assert images.image_path(1) == root / "JPEGImages" / "more" / "d.png"


def test_two_files_of_one_name(data: DataConfig, root: Path) -> None:
    shutil.copy(root / "JPEGImages" / "b.png", root / "JPEGImages" / "b.jpg")
    assert "b.jpg and b.png have the same name; keep" in said(train, data)


def test_class_subset(data: DataConfig, root: Path) -> None:
    subset = replace(data, class_subset=("dog", "bird"))
    write(root, "lists/train.txt", "a\nc\n")
    images = train(subset)
    assert images.classes == ("dog", "bird")
    assert [images.tags(index).tolist() for index in range(2)] == [[1, 1], [1, 0]]
    scored = masked(subset)
    assert scored.classes == ("dog", "bird")
    assert scored.mask(0).tolist() == [[0, 2, 255, 1, 255, 0]] * 4
    assert scored.tags(0).tolist() == [1, 0]


def test_class_subset_leaves_an_image_without_tag(data: DataConfig) -> None:
    text = said(train, replace(data, class_subset=("dog", "bird")))
    assert "train.txt: image 'b' has no tag of data.class_subset (1 of 3 images); use" in text
    scored = masked(replace(data, class_subset=("cat",)))
    assert scored.has_tags(0)
    assert scored.tags(0).tolist() == [0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"root": ""}, "data.root is empty; set it"),
        ({"image_dir": "nowhere"}, "nowhere: no such folder; set data.image_dir"),
        ({"train_list": ""}, "data.train_list is empty; name a text file"),
        ({"train_list": "nowhere.txt"}, "nowhere.txt: no such list; set data.train_list"),
        ({"class_subset": ("dgo",)}, "data.class_subset: unknown class 'dgo'; did you mean dog?"),
        ({"class_subset": ("dog", "dog")}, "data.class_subset: class 'dog' is there twice"),
        ({"classes": ("dog", "background")}, "data.classes: leave 'background' out"),
        ({"classes": ("dog", "bird")}, "image 'b': unknown tag 'cat'; allowed: dog, bird"),
        ({"classes": ("dog", "cat", "bird", *map(str, range(252)))}, "255 classes, and 254 is the limit"),
    ],
)
def test_wrong_settings(data: DataConfig, change: dict[str, object], expected: str) -> None:
    assert expected in said(train, replace(data, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "train.txt: the list is empty; write"),
        (b" \n\n", "train.txt: the list is empty"),
        (b"a\nb\na.jpg\nb\n", "train.txt: image 'a' is there twice (2"),
        (b"a\nx\nb\ny\n", "'x' (2 of 4 names missing); correct the list, add"),
        (b"a\n../JPEGImages/b\n", "'../JPEGImages/b' (1 of 2"),
        (b"\xff\xfe\x00", "train.txt: not a text file in UTF-8"),
    ],
)
def test_wrong_lists(data: DataConfig, root: Path, content: bytes, expected: str) -> None:
    (root / "lists" / "train.txt").write_bytes(content)
    assert expected in said(train, data)


def test_training_image_without_tags(data: DataConfig, root: Path) -> None:
    write(root, "lists/tags.csv", "image,tags\na,dog\n")
    with refused("tags.csv: image 'b' has no tags (2 of 3", "train.txt); tag it"):
        train(data)


def test_tags_are_searched_in_order(data: DataConfig, root: Path) -> None:
    for name in NAMES:
        write(root, f"Annotations/{name}.xml", "<annotation><object><name>bird</name></object></annotation>")
    np.save(root / "cls_labels_onehot.npy", dict.fromkeys(NAMES, np.array([0, 1, 0])))  # type: ignore[arg-type]
    assert train(data).tags(2).tolist() == [0, 0, 1]
    assert train(replace(data, tags="Annotations")).tags(2).tolist() == [1, 0, 0]
    (root / "lists" / "tags.csv").unlink()
    assert train(data).tags(2).tolist() == [0, 1, 0]
    (root / "cls_labels_onehot.npy").unlink()
    assert train(data).tags(2).tolist() == [1, 0, 0]
    shutil.rmtree(root / "Annotations")
    assert "no tags; set data.tags" in said(train, data)


def test_evaluation_needs_no_tags(data: DataConfig, root: Path) -> None:
    write(root, "lists/tags.csv", "image,tags\na,dog\n")
    images = masked(data)
    assert [images.has_tags(index) for index in range(2)] == [False, True]
    assert "tags.csv: no entry for image 'c'; add" in said(images.tags, 0)
    (root / "lists" / "tags.csv").unlink()
    images = masked(data)
    assert not images.has_tags(1)
    assert images.mask(1).shape == (4, 6)
    assert "(no tags file): no entry for image 'a'" in said(images.tags, 1)


def test_evaluation_needs_masks(data: DataConfig, root: Path) -> None:
    (root / "SegmentationClassAug" / "a.png").unlink()
    assert "no a.png (1 of 2" in said(masked, data)
    shutil.rmtree(root / "SegmentationClassAug")
    with refused("SegmentationClassAug: no folder of masks; put", "set data.mask_dir"):
        masked(data)
    assert "data.val_list is empty" in said(masked, replace(data, val_list=""))


def test_mask_has_the_size_of_the_upright_image(data: DataConfig, root: Path) -> None:
    write_mask(root, "c", np.zeros((6, 4)))
    with refused("mask is 4x6 ", "c.png 6x4; give"):
        masked(data).mask(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(root / "JPEGImages" / "c.png", exif=exif)
    images = masked(data)
    assert images.mask(0).shape == images.image(0).shape[:2]
    write_mask(root, "c", np.zeros((4, 6)))
    with refused("mask is 6x4 ", "c.png 4x6"):
        images.mask(0)


def test_mask_beyond_the_classes(data: DataConfig, root: Path) -> None:
    write_mask(root, "c", np.full((4, 6), 4))
    for chosen in (data, replace(data, class_subset=("dog",))):
        with refused("c.png: ", "value 4; use ", "1 to 3"):
            masked(chosen).mask(0)
