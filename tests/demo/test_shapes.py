import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afa import runtime
from afa.data.palette import voc_palette
from afa.demo import write
from afa.demo.shapes import DEFAULT_STYLE, SHAPE_CLASSES, Scene, ShapesStyle, draw_shapes
from afa.demo.write import write_shapes
from afa.errors import AfaError
from afa.runtime import showing_progress

FLAT = ShapesStyle(
    num_objects=(1, 1),
    num_distractors=(0, 0),
    object_margin=0.4,
    background_contrast=0.0,
    shading=0.0,
    noise=0.0,
)
"""One whole object on a plain background."""


def draw_many(
    count: int,
    *,
    image_size: int = 64,
    classes: tuple[str, ...] = SHAPE_CLASSES,
    style: ShapesStyle = DEFAULT_STYLE,
) -> list[Scene]:
    rngs = (np.random.default_rng([7, i]) for i in range(count))
    return [draw_shapes(rng, image_size, classes=classes, style=style) for rng in rngs]


def read_all(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "data"
    write_shapes(root, num_train=12, num_val=5, image_size=64, seed=3)
    return root


def test_folder_is_voc_style(folder):
    names = {split: (folder / "lists" / f"{split}.txt").read_text().split() for split in ("train", "val")}
    assert (len(names["train"]), len(names["val"])) == (12, 5)
    assert tuple((folder / "classes.txt").read_text().split()) == SHAPE_CLASSES
    assert not set(names["train"]) & set(names["val"])
    everything = sorted(names["train"] + names["val"])
    assert sorted(p.stem for p in (folder / "JPEGImages").glob("*.jpg")) == everything
    assert sorted(p.stem for p in (folder / "SegmentationClassAug").glob("*.png")) == everything
    for name in everything:
        with Image.open(folder / "JPEGImages" / f"{name}.jpg") as image:
            assert (image.mode, image.size) == ("RGB", (64, 64))
        with Image.open(folder / "SegmentationClassAug" / f"{name}.png") as mask:
            assert (mask.mode, mask.size) == ("P", (64, 64))
            assert mask.getpalette()[: 3 * 21] == voc_palette()[:21].ravel().tolist()


def test_tags_are_the_classes_in_the_mask(folder):
    with open(folder / "lists" / "tags.csv", newline="") as file:
        tags = {row["image"]: row["tags"].split(" ") for row in csv.DictReader(file)}
    assert len(tags) == 17
    for name, present in tags.items():
        with Image.open(folder / "SegmentationClassAug" / f"{name}.png") as mask:
            values = np.unique(np.asarray(mask))
        assert present == [SHAPE_CLASSES[value - 1] for value in values if value > 0]


def test_images_are_those_of_draw_shapes(folder):
    scene = draw_shapes(np.random.default_rng([3, 1, 4]), 64)
    with Image.open(folder / "SegmentationClassAug" / "val_00004.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask), scene.mask)
    with Image.open(folder / "JPEGImages" / "val_00004.jpg") as image:
        error = np.abs(np.asarray(image).astype(float) - scene.image)
    assert error.mean() < 4  # JPEG


def test_same_parameters_give_same_bytes(folder, tmp_path):
    write_shapes(tmp_path / "again", num_train=12, num_val=5, image_size=64, seed=3)
    assert read_all(tmp_path / "again") == read_all(folder)


def test_an_image_depends_on_seed_split_and_index_alone(folder, tmp_path):
    write_shapes(tmp_path / "fewer", num_train=4, num_val=1, image_size=64, seed=3)
    write_shapes(tmp_path / "other", num_train=4, num_val=1, image_size=64, seed=4)
    whole, fewer, other = read_all(folder), read_all(tmp_path / "fewer"), read_all(tmp_path / "other")
    images = [path for path in fewer if path.endswith((".jpg", ".png"))]
    assert len(images) == 10
    for path in images:
        assert fewer[path] == whole[path]
        assert fewer[path] != other[path]
    assert whole["JPEGImages/train_00000.jpg"] != whole["JPEGImages/val_00000.jpg"]


def test_classes_are_balanced():
    scenes = draw_many(300)
    for i, name in enumerate(SHAPE_CLASSES):
        assert 0.28 < np.mean([name in scene.visible for scene in scenes]) < 0.5
        assert 0.28 < np.mean([(scene.mask == i + 1).any() for scene in scenes]) < 0.5
    assert 0.1 < np.mean([(scene.mask > 0).mean() for scene in scenes]) < 0.3


def test_mask_values_follow_the_order_of_the_classes():
    for scene in draw_many(20, classes=("cross", "disk")):
        expected = {value for value, name in ((1, "cross"), (2, "disk")) if name in scene.visible}
        assert set(np.unique(scene.mask)) - {0} == expected


@pytest.mark.parametrize("name", SHAPE_CLASSES)
def test_mask_is_exact(name):
    # without texture, a pixel is a mixture of two colors: background and object, by how much of it is covered
    style = dataclasses.replace(FLAT, texture_contrast=(0.0, 0.0))
    for scene in draw_many(5, classes=(name,), style=style):
        image = scene.image.astype(float)
        outside = image[0, 0]
        inside = np.median(image[scene.mask == 1], axis=0)
        share = (image - outside) @ (inside - outside) / np.sum((inside - outside) ** 2)
        clear = np.abs(share - 0.5) > 0.03  # rounding to 8 bits
        assert clear.mean() > 0.98
        np.testing.assert_array_equal((share > 0.5)[clear], (scene.mask == 1)[clear])
        assert ((share > 0.05) & (share < 0.95)).any()  # edges are smooth


@pytest.mark.parametrize("name", SHAPE_CLASSES)
def test_texture_fills_the_object(name):
    for scene in draw_many(5, image_size=128, classes=(name,), style=FLAT):
        brightness = scene.image.astype(float).mean(axis=2)
        rows, columns = np.nonzero(scene.mask)
        upper, left = rows < np.median(rows), columns < np.median(columns)
        for part in (upper & left, upper & ~left, ~upper & left, ~upper & ~left):
            assert brightness[rows[part], columns[part]].std() > 8


def test_occlusion_happens_and_is_limited():
    assert all(list(scene.visible.values()) == [1.0] for scene in draw_many(10, style=FLAT))  # an object alone
    scenes = draw_many(100)
    visible = np.array([share for scene in scenes for share in scene.visible.values()])
    assert visible.max() == 1
    assert np.mean(visible < 0.9) > 0.1
    assert visible.min() >= DEFAULT_STYLE.min_visible
    for scene in scenes:
        counts = np.bincount(scene.mask.ravel())[1:]
        assert counts[counts > 0].min() >= DEFAULT_STYLE.min_visible_pixels


def test_distractors_are_drawn_as_background():
    assert {scene.num_distractors for scene in draw_many(50)} == {0, 1, 2}
    style = dataclasses.replace(FLAT, num_distractors=(2, 2))
    with_distractors, without = draw_many(20, style=style), draw_many(20, style=FLAT)

    def foreign_colors(scene: Scene) -> float:
        """Share of pixels labeled background that have not the background's color (the most frequent one)."""
        colors, counts = np.unique(scene.image[scene.mask == 0], axis=0, return_counts=True)
        assert len(colors) > 0
        return float(1 - counts.max() / counts.sum())

    assert min(map(foreign_colors, with_distractors)) > max(map(foreign_colors, without))


def test_existing_data_set_is_reused(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_shapes(folder, num_train=12, num_val=5, image_size=64, seed=3)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    "change", [{"num_train": 13}, {"image_size": 48}, {"seed": 4}, {"style": FLAT}, {"classes": ("disk",)}]
)
def test_data_set_with_other_parameters_is_refused(folder, change):
    before = read_all(folder)
    with pytest.raises(AfaError, match=r"shapes\.json: .*parameters: remove"):
        write_shapes(folder, **{"num_train": 12, "num_val": 5, "image_size": 64, "seed": 3, **change})
    assert read_all(folder) == before


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(AfaError, match="no generated data set: choose"):
        write_shapes(tmp_path, num_train=1, num_val=1)
    with pytest.raises(AfaError, match="holds no generated data set"):
        write_shapes(tmp_path / "thesis.txt", num_train=1, num_val=1)
    assert read_all(tmp_path) == {"thesis.txt": b"precious"}


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(path: Path, label: np.ndarray) -> None:
        raise AfaError("disk full")

    monkeypatch.setattr(write, "write_index_png", fail)
    with pytest.raises(AfaError, match="disk full"):
        write_shapes(tmp_path / "data", num_train=1, num_val=1)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_write_at_once(folder, tmp_path, monkeypatch):
    def write_after_the_other(path: Path, label: np.ndarray) -> None:
        monkeypatch.undo()
        write_shapes(tmp_path / "data", num_train=12, num_val=5, image_size=64, seed=3)
        write.write_index_png(path, label)

    monkeypatch.setattr(write, "write_index_png", write_after_the_other)
    write_shapes(tmp_path / "data", num_train=12, num_val=5, image_size=64, seed=3)
    assert read_all(tmp_path / "data") == read_all(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AfaError, match=r"file/data: cannot be written.*choose"):
        write_shapes(tmp_path / "file" / "data", num_train=1, num_val=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train": 0}, "num_train .* 0: .*at least 1"),
        ({"num_val": -1}, "num_val .* -1: .*at least 1"),
        ({"image_size": 16}, "image_size .* 16: .*at least 32"),
        ({"seed": -1}, "seed .* -1: .*at least 0"),
        ({"classes": ()}, r"classes .* \[\]: choose from disk"),
        ({"classes": ("disk", "horse")}, r"\['disk', 'horse'\]: choose"),
        ({"classes": ("disk", "disk")}, r"\['disk', 'disk'\]: choose .*once"),
    ],
)
def test_wrong_parameters_are_refused(tmp_path, change, message):
    with pytest.raises(AfaError, match=message):
        write_shapes(tmp_path / "data", **{"num_train": 1, "num_val": 1, **change})
    assert list(tmp_path.iterdir()) == []


def test_style_that_shows_no_object_is_refused():
    with pytest.raises(AfaError, match=r"32 pixels: .*larger"):
        draw_shapes(np.random.default_rng(0), 32, style=ShapesStyle(object_size=(0.05, 0.1)))


def test_progress_goes_to_stderr(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "_TOLD_SECONDS", -1.0)
    (tmp_path / "quiet").mkdir()  # an empty folder is filled
    with showing_progress(False):
        write_shapes(tmp_path / "quiet", num_train=1, num_val=1, image_size=32)
    assert (tmp_path / "quiet" / "JPEGImages" / "val_00000.jpg").is_file()
    assert capsys.readouterr() == ("", "")
    write_shapes(tmp_path / "loud", num_train=1, num_val=1, image_size=32)
    out, err = capsys.readouterr()
    assert out == ""
    assert "generating 1/2" in err
