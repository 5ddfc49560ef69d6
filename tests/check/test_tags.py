"""What tags, counts and lists tell, without opening an image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from afa.check.tags import check_fast
from afa.config import load_config
from afa.data.open import open_data
from afa.data.palette import write_index_png

CATS_AND_DOGS = ["cat"] * 20 + ["dog"] * 20


def write_table(root: Path, tags: list[str], *, split: list[str] | None = None) -> None:
    """A tags.csv with one entry for each text of tags, and empty files for images: none may be opened."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    sides = split or ["train"] * len(tags)
    rows = [f"{i}.jpg,{text},{side}\n" for i, (text, side) in enumerate(zip(tags, sides, strict=True))]
    (root / "tags.csv").write_text("file,tags,split\n" + "".join(rows), encoding="utf-8")
    for i in range(len(tags)):
        (root / "images" / f"{i}.jpg").touch()


def found(root: Path, **keys: Any) -> list[str]:
    """Problems in words, errors first, without the note that nothing will be scored."""
    config = load_config(None, {"data.root": str(root), "data.split_fraction": 0, **keys})
    problems = [f"{problem.severity}: {problem.message}" for problem in check_fast(open_data(config.data), config)]
    assert not any("\n" in text for text in problems)
    return [text for text in problems if "will be scored" not in text]


@pytest.mark.parametrize(
    ("tags", "patterns"),
    [
        (CATS_AND_DOGS + ["cat dog"] * 4, []),
        (["cat"] * 30, [r"warning: all 30 training images have the same tags \(cat\)"]),
        (["cat person"] * 20 + ["dog person"] * 20, ["warning: all 40 training images have class 'person'"]),
        (
            ["horse rider"] * 20 + ["rider"] * 10 + ["dog"] * 20,
            ["warning: class 'horse' never appears without 'rider' .20 images.: .*with 'horse' and without 'rider'"],
        ),
        (
            ["horse rider"] * 30 + ["rider"] * 10 + ["horse"] * 2 + ["dog"] * 20,
            ["warning: class 'horse' is without 'rider' in only 2 of its 32 training images"],
        ),
        (["horse rider"] * 30 + ["rider"] * 10 + ["horse"] * 3 + ["dog"] * 20, []),
        (
            ["horse rider"] * 20 + ["dog"] * 20,
            [
                "warning: .*tags.csv: 'horse' and 'rider' always come together, in this order: is that one name?",
                "warning: classes 'horse' and 'rider' are in the same 20 .*make them one class",
            ],
        ),
        (
            ["cat dog owl"] * 3 + CATS_AND_DOGS + ["owl"] * 20,
            ["note: training images with all 3 classes: 3; .*check their tags"],
        ),
    ],
)
def test_what_tags_tell(tags: list[str], patterns: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.open", lambda *_: pytest.fail("opened an image"))
    write_table(tmp_path, tags)
    for text, pattern in zip(found(tmp_path), patterns, strict=True):
        assert re.match(pattern, text), text


def test_thin_classes_are_counted_by_how_thin_they_are(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\nfox\nelk\n", encoding="utf-8")
    write_table(tmp_path, ["cat"] * 20 + ["dog"] * 19 + ["owl"] * 4)
    assert [text.partition("; ")[0] for text in found(tmp_path)] == [
        "warning: no training image has fox, elk: never learned",
        "warning: fewer than 5 training images: owl 4: not learned",
        "warning: fewer than 20 training images: dog 19: hardly learned",
    ]


@pytest.mark.parametrize(("limit", "lost"), [(0, ""), (1, "cat, dog"), (2, "")])
def test_classes_that_a_limit_leaves_without_an_image_are_named(tmp_path: Path, limit: int, lost: str) -> None:
    write_table(tmp_path, ["cat dog"] * 20 + ["cat"] * 20 + ["dog"] * 20 + ["owl"] * 20)
    told = [text for text in found(tmp_path, **{"train.max_images": limit, "train.seed": 1}) if "max_images" in text]
    if lost:
        assert told[0].startswith(f"warning: train.max_images is {limit}, too few for {lost}: ")
        assert told[0].endswith("; raise it to 3 or more, or give more --minutes")
    assert len(told) == bool(lost)


def test_untagged_images_are_counted_and_many_of_them_are_a_warning(tmp_path: Path) -> None:
    write_table(tmp_path, CATS_AND_DOGS)
    (tmp_path / "images" / "extra.jpg").touch()
    assert found(tmp_path) == ["note: 1 image without tags left out (extra); tag them to use them"]
    for i in range(40):
        (tmp_path / "images" / f"more{i}.jpg").touch()
    assert found(tmp_path)[0].startswith("warning: 41 images without tags left out")


def test_a_batch_beyond_the_images_and_a_class_without_validation_images_are_noted(tmp_path: Path) -> None:
    write_table(tmp_path, ["cat"] * 25 + ["dog"] * 20, split=["val"] * 5 + ["train"] * 40)
    batch, absent = found(tmp_path, **{"schedule.batch_size": 64})
    assert batch.startswith("note: schedule.batch_size is 64, with 40 training images")
    assert absent == "note: no image for validation has dog: nothing tells how well it is learned"


def test_images_on_both_lists_and_what_opening_refuses(tmp_path: Path) -> None:
    names = [f"i{i}" for i in range(50)]
    for folder in ("lists", "JPEGImages", "SegmentationClassAug"):
        (tmp_path / folder).mkdir()
    (tmp_path / "classes.txt").write_text("cat\ndog\n", encoding="utf-8")
    (tmp_path / "lists" / "train.txt").write_text("\n".join(names[:45]), encoding="utf-8")
    (tmp_path / "lists" / "val.txt").write_text("\n".join(names[43:]), encoding="utf-8")
    rows = [f"{name},{'cat' if i % 2 else 'dog'}\n" for i, name in enumerate(names)]
    (tmp_path / "lists" / "tags.csv").write_text("image,tags\n" + "".join(rows), encoding="utf-8")
    for name in names:
        Image.new("RGB", (6, 4)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
    (error,) = [text for text in found(tmp_path) if text.startswith("error")]
    assert "no i43.png (7 of 7" in error  # there is a folder of masks, without masks
    for name in names[43:]:
        write_index_png(tmp_path / "SegmentationClassAug" / f"{name}.png", np.zeros((4, 6), dtype=np.uint8))
    (warning,) = found(tmp_path)
    assert re.match(r"warning: 2 images to train on and for validation alike \(i43, i44\): .* one of the", warning)
    (tmp_path / "lists" / "train.txt").unlink()
    assert "train.txt: no such list" in found(tmp_path)[0]
