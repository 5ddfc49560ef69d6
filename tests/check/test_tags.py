from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from afa.check.tags import check_fast
from afa.config import Config, load_config
from afa.data.layout import find_layout
from afa.data.palette import write_index_png


def write_table(root: Path, tags: list[str], *, split: list[str] | None = None) -> None:
    """A tags.csv with one entry for each text of tags, and empty files for images: none may be opened."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    sides = split or ["train"] * len(tags)
    rows = [f"{i}.jpg,{text},{side}\n" for i, (text, side) in enumerate(zip(tags, sides, strict=True))]
    (root / "tags.csv").write_text("file,tags,split\n" + "".join(rows), encoding="utf-8")
    for i in range(len(tags)):
        (root / "images" / f"{i}.jpg").touch()


def settings(root: Path, **keys: Any) -> Config:
    return load_config(None, {"data.root": str(root), "data.split_fraction": 0, **keys})


def found(root: Path, **keys: Any) -> dict[str, list[str]]:
    """The messages by severity, without the note that nothing will be scored."""
    config = settings(root, **keys)
    messages: dict[str, list[str]] = {"error": [], "warning": [], "note": []}
    for problem in check_fast(find_layout(config.data), config):
        assert "\n" not in problem.message
        if "will be scored" not in problem.message:
            messages[problem.severity].append(problem.message)
    return messages


def test_sound_tags_have_no_problem_and_no_image_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.open", lambda *_: pytest.fail("opened an image"))
    write_table(tmp_path, ["cat"] * 20 + ["dog"] * 20 + ["cat dog"] * 4)
    assert found(tmp_path) == {"error": [], "warning": [], "note": []}


def test_a_class_that_never_stands_alone_is_named_with_its_partner(tmp_path: Path) -> None:
    write_table(tmp_path, ["horse rider"] * 20 + ["rider"] * 10 + ["dog"] * 20)
    assert found(tmp_path)["warning"] == [
        "class 'horse' never appears without 'rider' (20 images): these two cannot be told apart from tags; "
        "add images with 'horse' and without 'rider'"
    ]


@pytest.mark.parametrize(("alone", "is_named"), [(2, True), (3, False)])
def test_a_class_that_hardly_stands_alone_is_named(tmp_path: Path, alone: int, is_named: bool) -> None:
    write_table(tmp_path, ["horse rider"] * 30 + ["rider"] * 10 + ["horse"] * alone + ["dog"] * 20)
    text = f"class 'horse' is without 'rider' in only {alone} of its {30 + alone} training images"
    assert [text in warning for warning in found(tmp_path)["warning"]] == [True] * is_named


def test_two_classes_in_the_same_images_are_one_problem(tmp_path: Path) -> None:
    write_table(tmp_path, ["horse rider"] * 20 + ["dog"] * 20)
    (warning,) = found(tmp_path)["warning"]
    assert warning.startswith("classes 'horse' and 'rider' are in the same 20")


def test_thin_classes_are_counted_by_how_thin_they_are(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\nfox\nelk\n", encoding="utf-8")
    write_table(tmp_path, ["cat"] * 20 + ["dog"] * 19 + ["owl"] * 4)
    warnings = found(tmp_path)["warning"]
    assert [warning.partition("; ")[0] for warning in warnings] == [
        "no training image has fox, elk: never learned",
        "fewer than 5 training images: owl 4: not learned",
        "fewer than 20 training images: dog 19: hardly learned",
    ]


def test_the_same_tags_everywhere_are_said(tmp_path: Path) -> None:
    write_table(tmp_path, ["cat"] * 30)
    messages = found(tmp_path)
    assert messages["error"] == []
    (warning,) = messages["warning"]
    assert warning.startswith("all 30 training images have the same tags (cat)")


def test_a_class_in_every_image_is_named_and_no_partner_of_others(tmp_path: Path) -> None:
    write_table(tmp_path, ["cat person"] * 20 + ["dog person"] * 20)
    messages = found(tmp_path)
    assert messages["error"] == []
    (warning,) = messages["warning"]
    assert warning.startswith("all 40 training images have class 'person'")


def test_untagged_images_are_counted_and_many_of_them_are_a_warning(tmp_path: Path) -> None:
    write_table(tmp_path, ["cat"] * 20 + ["dog"] * 20)
    (tmp_path / "images" / "extra.jpg").touch()
    assert found(tmp_path)["note"] == ["1 image without tags left out (extra); tag them to use them"]
    for i in range(40):
        (tmp_path / "images" / f"more{i}.jpg").touch()
    assert found(tmp_path)["warning"][0].startswith("41 images without tags left out")


def test_images_with_all_classes_and_a_batch_beyond_the_images_are_noted(tmp_path: Path) -> None:
    write_table(tmp_path, ["cat dog owl"] * 3 + ["cat"] * 20 + ["dog"] * 20 + ["owl"] * 20)
    assert found(tmp_path)["note"] == ["training images with all 3 classes: 3; these tell little, check their tags"]
    notes = found(tmp_path, **{"schedule.batch_size": 64})["note"]
    assert notes[-1].startswith("schedule.batch_size is 64, with 63 training images")


def test_a_class_without_validation_images_is_noted(tmp_path: Path) -> None:
    tags = ["cat"] * 25 + ["dog"] * 20
    write_table(tmp_path, tags, split=["val"] * 5 + ["train"] * 40)
    assert found(tmp_path)["note"] == ["no image for validation has dog: nothing tells how well it is learned"]


def write_voc(root: Path, train: list[str], val: list[str]) -> None:
    for folder in ("lists", "JPEGImages", "SegmentationClassAug"):
        (root / folder).mkdir()
    (root / "classes.txt").write_text("cat\ndog\n", encoding="utf-8")
    (root / "lists" / "train.txt").write_text("\n".join(train), encoding="utf-8")
    (root / "lists" / "val.txt").write_text("\n".join(val), encoding="utf-8")
    names = dict.fromkeys([*train, *val])
    rows = [f"{name},{'cat' if i % 2 else 'dog'}\n" for i, name in enumerate(names)]
    (root / "lists" / "tags.csv").write_text("image,tags\n" + "".join(rows), encoding="utf-8")
    for name in names:
        Image.new("RGB", (6, 4)).save(root / "JPEGImages" / f"{name}.jpg")


def test_images_on_both_lists_are_named(tmp_path: Path) -> None:
    names = [f"i{i}" for i in range(50)]
    write_voc(tmp_path, names[:45], names[43:])
    for name in names[43:]:
        write_index_png(tmp_path / "SegmentationClassAug" / f"{name}.png", np.zeros((4, 6), dtype=np.uint8))
    assert found(tmp_path)["warning"] == [
        "2 images to train on and for validation alike (i43, i44): scores will be too high; take them off one of the "
        "lists"
    ]


def test_what_opening_refuses_is_an_error_with_its_message(tmp_path: Path) -> None:
    names = [f"i{i}" for i in range(50)]
    write_voc(tmp_path, names[:45], names[45:])
    (error,) = found(tmp_path)["error"]  # there is a folder of masks, without masks
    assert "no file for 'i45'" in error
    (tmp_path / "lists" / "train.txt").unlink()
    errors = found(tmp_path)["error"]
    assert "train.txt: no such list" in errors[0]
