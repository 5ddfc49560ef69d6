"""Folders as people and tools really leave them: suffixes, depths, masks and numbers of classes beyond the usual."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from afa.check.tags import check_fast
from afa.config import DataConfig, load_config
from afa.data.open import DataSet, open_data
from afa.errors import AfaError
from layouts import CLASSES, class_folders, table, touch, voc, with_masks, write
from mistakes import refused, said


def found(root: Path, **keys: Any) -> DataSet:
    return open_data(DataConfig(root=str(root), **keys))


def stored_masks(root: Path, folder: str, values: list[int], name: str = "{}") -> None:
    """Masks of the images of `table`, with these values side by side."""
    (root / folder).mkdir()
    for i in range(30):
        Image.fromarray(np.array([[*values, *[0] * (6 - len(values))]] * 4, dtype=np.uint8)).save(
            root / folder / f"{name.format(f'{i:02d}')}.png"
        )


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "mpo", "heic", "jxl"])
def test_no_class_vanishes_by_the_suffix_of_its_images(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, *(f"cat/{i}.jpg" for i in range(10)), *(f"dog/{i}.{suffix}" for i in range(10)))
    data = found(tmp_path)
    assert data.classes == ("cat", "dog")
    assert len(data.tagged()) == 20


def test_what_is_passed_over_is_counted_by_suffix(tmp_path: Path) -> None:
    class_folders(tmp_path)
    for name in ("cat/0.cr2", "cat/1.CR2", "dog/x.psd", "owl/0.cr2", "cat/notes.txt", "owl/Thumbs.db"):
        write(tmp_path, name, "x")
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "eel").mkdir()
    data = found(tmp_path)
    assert data.classes == CLASSES
    end = "3 .cr2 files passed over, 1 .psd file passed over, 1 broken link passed over, "
    assert data.describe().endswith(f"{end}no image in the folder 'eel', no image in the folder 'owl'")
    problems = check_fast(data, load_config(None, {"data.root": str(tmp_path)}))
    warned = [problem.message for problem in problems if problem.severity == "warning"]
    assert any("no image in the folder 'owl'; convert" in message for message in warned)


@pytest.mark.parametrize("make", [table, voc])
def test_passed_over_in_other_layouts(tmp_path: Path, make: Any) -> None:
    make(tmp_path)
    assert "passed over" not in found(tmp_path).describe()
    folder = "JPEGImages" if make is voc else "images"
    write(tmp_path, f"{folder}/a.cr2", "x")
    assert found(tmp_path).describe().endswith(", 1 .cr2 file passed over")


def test_litter_is_no_class_and_no_image(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{kind}/{i}.jpg" for kind in ("cat", "dog") for i in range(8)))
    touch(tmp_path, "cat/@eaDir/0.jpg/SYNOFILE_THUMB_M.jpg", "dog/.ipynb_checkpoints/0-checkpoint.jpg", "@eaDir/1.jpg")
    data = found(tmp_path)
    assert data.classes == ("cat", "dog")
    assert len(data.tagged()) == 16
    assert data.remarks == ()


def test_more_classes_than_masks_hold(tmp_path: Path) -> None:
    touch(tmp_path, *(f"c{k:03d}/a{i}.jpg" for k in range(300) for i in range(2)))
    with refused(tmp_path, "300 classes", "254", "data.class_subset"):
        found(tmp_path)
    data = found(tmp_path, class_subset=("c299", "c000"))
    assert data.classes == ("c299", "c000")
    assert len(data.tagged()) == 4


def test_masks_of_a_subset_of_very_many_classes(tmp_path: Path) -> None:
    table(tmp_path)
    stored_masks(tmp_path, "masks", [0, 1, 2, 254, 255])
    names = [*CLASSES, *(f"c{k:03d}" for k in range(297))]
    write(tmp_path, "classes.txt", "\n".join(names))
    masked = found(tmp_path, class_subset=("c250", "cat", "bird", "dog")).masked()
    assert masked.mask(0)[0].tolist() == [0, 3, 2, 1, 255, 0]


def test_white_masks_are_asked_about(tmp_path: Path) -> None:
    table(tmp_path)
    stored_masks(tmp_path, "masks", [0, 255])
    with refused(tmp_path / "masks", "0 and 255 alone", "is it class 'bird'?", "data.mask_values to 0,255"):
        found(tmp_path).masked().check_values()
    masked = found(tmp_path, mask_values=(0, 255)).masked()
    masked.check_values()
    assert masked.mask(0)[0].tolist() == [0, 1, 0, 0, 0, 0]
    # One mask with a class says that 255 means what it always means.
    Image.fromarray(np.full((4, 6), 2, np.uint8)).save(tmp_path / "masks" / f"{masked.names[-1]}.png")
    masked = found(tmp_path).masked()
    masked.check_values()
    assert masked.mask(0)[0].tolist() == [0, 255, 0, 0, 0, 0]


def test_masks_without_any_class_are_no_reason_to_ask(tmp_path: Path) -> None:
    table(tmp_path)
    stored_masks(tmp_path, "masks", [0])
    found(tmp_path).masked().check_values()


def test_stated_mask_values(tmp_path: Path) -> None:
    table(tmp_path)
    stored_masks(tmp_path, "masks", [0, 38, 75, 113, 255])
    with refused("the mask has value 38; use 0", "data.mask_values"):
        found(tmp_path).masked().mask(0)
    masked = found(tmp_path, mask_values=(0, 38, 75, 113)).masked()
    assert masked.mask(0)[0].tolist() == [0, 1, 2, 3, 255, 0]
    subset = found(tmp_path, mask_values=(0, 38, 75, 113), class_subset=("dog",)).masked()
    assert subset.mask(0)[0].tolist() == [0, 255, 255, 1, 255, 0]
    for values in ((0, 1, 1), (0, 1, 2, 3, 4)):
        with refused("data.mask_values is 0,1,", "different values", "3 classes"):
            found(tmp_path, mask_values=values).masked()


@pytest.mark.parametrize("name", ["{}_mask", "mask-{}", "{}.gt", "seg of {}"])
def test_masks_that_are_all_named_alike_are_found(tmp_path: Path, name: str) -> None:
    table(tmp_path)
    stored_masks(tmp_path, "masks", [0, 1, 2, 3, 255], name)
    data = found(tmp_path)
    masked = data.masked()
    assert len(masked) == len(data.validation())
    assert masked.mask(0)[0].tolist() == [0, 1, 2, 3, 255, 0]


@pytest.mark.parametrize("names", [["m{}"], ["{}_mask", "{}_edge"]])
def test_masks_of_unclear_names_are_named(tmp_path: Path, names: list[str]) -> None:
    table(tmp_path)
    for i, name in enumerate(names):
        stored_masks(tmp_path, f"masks{i}", [0, 1], name)
    (tmp_path / "masks0").rename(tmp_path / "masks")
    for path in (tmp_path / "masks1").glob("*.png"):
        path.rename(tmp_path / "masks" / path.name)
    there = sorted(path.name for path in (tmp_path / "masks").iterdir())[0]
    with refused(tmp_path / "masks", "have no mask", f"'{there}' is there: name masks as their images"):
        found(tmp_path).masked()


def break_images(root: Path, *names: str) -> None:
    for name in names:
        (root / "images" / name).write_bytes(b"\xff\xd8 no more")


def test_broken_images_are_left_out_where_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_masks(tmp_path)
    keys = {"split_seed": 1}
    whole = found(tmp_path, **keys)
    first, other = whole.train().names[0], whole.masked().names[0]
    break_images(tmp_path, f"{first}.png", f"{other}.png")
    data = found(tmp_path, **keys)
    data.leave_out_broken()
    assert first in data.train().names  # the default: an error when it is read
    assert "cannot be read" in said(data.train().image, 0) or "not an image" in said(data.train().image, 0)
    data = found(tmp_path, skip_broken=True, **keys)
    data.leave_out_broken()
    assert data.train().names == whole.train().names[1:]
    assert data.masked().names == whole.masked().names[1:]
    assert len(data.tagged()) == 28
    assert "2 broken images of 30 left out (first: " in capsys.readouterr().err


def test_a_missing_image_is_not_a_broken_one(tmp_path: Path) -> None:
    table(tmp_path)
    data = found(tmp_path, skip_broken=True)
    (tmp_path / "images" / "00.png").unlink()
    with pytest.raises(AfaError, match="no such image"):
        data.leave_out_broken()


def test_nothing_is_left_if_all_images_are_broken(tmp_path: Path) -> None:
    table(tmp_path)
    break_images(tmp_path, *(f"{i:02d}.png" for i in range(30)))
    data = found(tmp_path, skip_broken=True)
    data.leave_out_broken()
    with refused(tmp_path, "no image with a tag to train on"):
        data.train()
