from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afa.config import DataConfig, load_config
from afa.data.classes import VOC_CLASSES
from afa.data.dataset import MaskedImages, TaggedImages
from afa.data.loader import train_batches
from afa.data.open import open_data
from afa.data.palette import write_index_png
from afa.errors import AfaError

TAGS = {"a": "bird dog", "b": "cat", "c": "dog"}


def write_root(root: Path) -> DataConfig:
    """Three images of 6x4 pixels; the mask of each has every stored value from 0 to 3, and 255."""
    for folder in ("JPEGImages", "SegmentationClassAug", "lists"):
        (root / folder).mkdir(parents=True)
    for seed, name in enumerate(TAGS):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.png")
        label = np.array([[0, 1, 2, 3, 255, 0]] * 4, dtype=np.uint8)
        write_index_png(root / "SegmentationClassAug" / f"{name}.png", label)
    (root / "lists" / "train.txt").write_text("a\nb\nc\n")
    (root / "lists" / "val.txt").write_text("c\na\n")
    rows = [f"{name},{tags}" for name, tags in TAGS.items()]
    (root / "lists" / "tags.csv").write_text("\n".join(["image,tags", *rows]))
    (root / "classes.txt").write_text("bird\ncat\ndog\n")
    return DataConfig(root=str(root))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


@pytest.fixture
def data(root: Path) -> DataConfig:
    return write_root(root)


def message(data: DataConfig, *, scored: bool = False) -> str:
    with pytest.raises(AfaError) as caught:
        open_data(data).masked() if scored else open_data(data).train()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_training_images(data: DataConfig, root: Path) -> None:
    images = open_data(data).train()
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
    images = open_data(data).masked()
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
    images = open_data(data).train()
    assert images.classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert open_data(replace(data, classes=("dog", "cat", "bird"))).train().tags(0).tolist() == [1, 0, 1]


def test_suffix_in_any_case_and_images_in_folders(data: DataConfig, root: Path) -> None:
    (root / "JPEGImages" / "a.png").rename(root / "JPEGImages" / "a.PNG")
    (root / "JPEGImages" / "more").mkdir()
    shutil.copy(root / "JPEGImages" / "b.png", root / "JPEGImages" / "more" / "d.png")
    (root / "lists" / "train.txt").write_text("a\nmore/d\n")
    (root / "lists" / "tags.csv").write_text("image,tags\na,dog\nmore/d.png,cat\n")
    images = open_data(data).train()
    assert images.image_path(0).name == "a.PNG"
    assert images.image_path(1) == root / "JPEGImages" / "more" / "d.png"


def test_two_files_of_one_name(data: DataConfig, root: Path) -> None:
    shutil.copy(root / "JPEGImages" / "b.png", root / "JPEGImages" / "b.jpg")
    assert "b.jpg and b.png have the same name; keep" in message(data)


def test_class_subset(data: DataConfig, root: Path) -> None:
    subset = replace(data, class_subset=("dog", "bird"))
    (root / "lists" / "train.txt").write_text("a\nc\n")
    images = open_data(subset).train()
    assert images.classes == ("dog", "bird")
    assert [images.tags(index).tolist() for index in range(2)] == [[1, 1], [1, 0]]
    scored = open_data(subset).masked()
    assert scored.classes == ("dog", "bird")
    assert scored.mask(0).tolist() == [[0, 2, 255, 1, 255, 0]] * 4
    assert scored.tags(0).tolist() == [1, 0]


def test_class_subset_leaves_an_image_without_tag(data: DataConfig) -> None:
    text = message(replace(data, class_subset=("dog", "bird")))
    assert "train.txt: image 'b' has no tag of data.class_subset (1 of 3 images); use" in text
    scored = open_data(replace(data, class_subset=("cat",))).masked()
    assert scored.has_tags(0)
    assert scored.tags(0).tolist() == [0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"root": ""}, "data.root is empty; set it"),
        ({"root": "nowhere"}, "nowhere: no such folder; set data.root"),
        ({"image_dir": "nowhere"}, "nowhere: no such folder; set data.image_dir"),
        ({"train_list": ""}, "data.train_list is empty; name a text file"),
        ({"train_list": "nowhere.txt"}, "nowhere.txt: no such list; set data.train_list"),
        ({"tags": "nowhere.csv"}, "nowhere.csv: no such tags"),
        ({"class_subset": ("dgo",)}, "data.class_subset: unknown class 'dgo'; did you mean dog?"),
        ({"class_subset": ("dog", "dog")}, "data.class_subset: class 'dog' is there twice"),
        ({"classes": ("dog", "background")}, "data.classes: leave 'background' out"),
        ({"classes": ("dog", "bird")}, "image 'b': unknown tag 'cat'; allowed: dog, bird"),
        ({"classes": tuple(map(str, range(255)))}, "data.classes: 255 classes; give 1 to 254"),
    ],
)
def test_wrong_settings(data: DataConfig, change: dict[str, object], expected: str) -> None:
    assert expected in message(replace(data, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "train.txt: the list is empty; write"),
        (" \n\n", "train.txt: the list is empty"),
        ("a\nb\na.jpg\nb\n", "train.txt: image 'a' is there twice (2"),
        ("a\nx\nb\ny\n", "'x' (2 of 4 names missing); correct the list, add"),
        ("a\n../JPEGImages/b\n", "'../JPEGImages/b' (1 of 2"),
    ],
)
def test_wrong_lists(data: DataConfig, root: Path, content: str, expected: str) -> None:
    (root / "lists" / "train.txt").write_text(content)
    assert expected in message(data)


def test_binary_list(data: DataConfig, root: Path) -> None:
    (root / "lists" / "train.txt").write_bytes(b"\xff\xfe\x00")
    assert "train.txt: not a text file in UTF-8" in message(data)


@pytest.mark.parametrize("row", ["", "c,"])
def test_training_image_without_tags(data: DataConfig, root: Path, row: str) -> None:
    (root / "lists" / "tags.csv").write_text(f"image,tags\na,dog\n{row}\n")
    text = message(data)
    assert "tags.csv: image 'b' has no tags (2 of 3" in text
    assert "train.txt); tag it" in text


def test_tags_are_searched_in_order(data: DataConfig, root: Path) -> None:
    annotations = root / "Annotations"
    annotations.mkdir()
    for name in TAGS:
        (annotations / f"{name}.xml").write_text("<annotation><object><name>bird</name></object></annotation>")
    one_hot = {name: np.array([0, 1, 0]) for name in TAGS}
    np.save(root / "cls_labels_onehot.npy", one_hot)  # type: ignore[arg-type]
    assert open_data(data).train().tags(2).tolist() == [0, 0, 1]
    assert open_data(replace(data, tags="Annotations")).train().tags(2).tolist() == [1, 0, 0]
    (root / "lists" / "tags.csv").unlink()
    assert open_data(data).train().tags(2).tolist() == [0, 1, 0]
    (root / "cls_labels_onehot.npy").unlink()
    assert open_data(data).train().tags(2).tolist() == [1, 0, 0]
    shutil.rmtree(annotations)
    assert "no tags; set data.tags" in message(data)


def test_evaluation_needs_no_tags(data: DataConfig, root: Path) -> None:
    (root / "lists" / "tags.csv").write_text("image,tags\na,dog\n")
    images = open_data(data).masked()
    assert [images.has_tags(index) for index in range(2)] == [False, True]
    with pytest.raises(AfaError, match=r"tags\.csv: .*image 'c'; add"):
        images.tags(0)
    (root / "lists" / "tags.csv").unlink()
    images = open_data(data).masked()
    assert not images.has_tags(1)
    assert images.mask(1).shape == (4, 6)
    with pytest.raises(AfaError, match=r"\(no tags file\): no entry for image 'a'"):
        images.tags(1)


def test_evaluation_needs_masks(data: DataConfig, root: Path) -> None:
    (root / "SegmentationClassAug" / "a.png").unlink()
    assert "no a.png (1 of 2" in message(data, scored=True)
    shutil.rmtree(root / "SegmentationClassAug")
    text = message(data, scored=True)
    assert "SegmentationClassAug: no folder of masks; put" in text
    assert "set data.mask_dir" in text
    assert "data.val_list is empty" in message(replace(data, val_list=""), scored=True)


def test_mask_of_another_size(data: DataConfig, root: Path) -> None:
    write_index_png(root / "SegmentationClassAug" / "c.png", np.zeros((6, 4), dtype=np.uint8))
    with pytest.raises(AfaError, match=r"mask is 4x6 .*c\.png 6x4; give"):
        open_data(data).masked().mask(0)


def test_mask_follows_the_upright_image(data: DataConfig, root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(root / "JPEGImages" / "c.png", exif=exif)
    images = open_data(data).masked()
    with pytest.raises(AfaError, match=r"mask is 6x4 .*c\.png 4x6"):
        images.mask(0)
    write_index_png(root / "SegmentationClassAug" / "c.png", np.zeros((6, 4), dtype=np.uint8))
    assert images.mask(0).shape == images.image(0).shape[:2]


def test_mask_beyond_the_classes(data: DataConfig, root: Path) -> None:
    write_index_png(root / "SegmentationClassAug" / "c.png", np.full((4, 6), 4, dtype=np.uint8))
    for chosen in (data, replace(data, class_subset=("dog",))):
        with pytest.raises(AfaError, match=r"c\.png: .*value 4; use .*1 to 3"):
            open_data(chosen).masked().mask(0)


def reachable(value: object) -> set[str]:
    """Every text and path that an object leads to, over attributes, containers and elements."""
    found: set[str] = set()
    seen: set[int] = set()
    queue = [value]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (str, Path)):
            found.add(str(item))
        elif isinstance(item, dict):
            queue += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            queue += list(item)
        elif hasattr(item, "__dict__"):
            queue += list(vars(item).values())
    return found


def test_training_has_no_way_to_the_masks(data: DataConfig) -> None:
    images, scored = open_data(data).train(), open_data(data).masked()
    assert type(images) is TaggedImages
    assert not isinstance(images, MaskedImages)
    assert not [name for name in dir(images) if "mask" in name]
    assert not any(data.mask_dir in text for text in reachable(images))
    assert any(data.mask_dir in text for text in reachable(scored))  # the search does find them
    assert data.mask_dir.encode() not in pickle.dumps(images)


def test_training_never_reads_the_masks(tmp_path: Path) -> None:
    """The same batches with masks, with garbage for masks, and without the folder."""
    config = load_config(
        None, {"data.workers": 0, "augment.crop_size": 32, "schedule.batch_size": 2, "schedule.max_steps": 3}
    )
    outcomes = []
    for case in ("whole", "garbage", "deleted"):
        data = write_root(tmp_path / case)
        masks = tmp_path / case / data.mask_dir
        if case == "garbage":
            for file in masks.iterdir():
                file.write_bytes(b"garbage")
        if case == "deleted":
            shutil.rmtree(masks)
        images = open_data(data).train()
        outcomes.append(list(train_batches(images, config)))
    for other in outcomes[1:]:
        for ours, theirs in zip(outcomes[0], other, strict=True):
            assert ours.names == theirs.names
            assert ours.image.equal(theirs.image)
            assert ours.tags.equal(theirs.tags)
            assert ours.valid_box.equal(theirs.valid_box)
