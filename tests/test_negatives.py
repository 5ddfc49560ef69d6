"""Images that are known to hold none of the classes: read from every format, split, trained on and scored."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from afa.api import check_data, run_demo, train_and_report
from afa.config import Config, DataConfig, PseudoConfig, ScheduleConfig, TrainConfig
from afa.data.dataset import TaggedImages
from afa.data.open import DataSet, open_data
from afa.data.order import Order
from afa.evaluation.protocols import pseudo_labels
from afa.losses.classification import classification_loss
from afa.pseudo.pipeline import training_labels
from afa.types import NetworkOutput
from layouts import touch, write
from mistakes import refused
from tiny import tiny_config

COCO = {
    "images": [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("abc")],
    "annotations": [{"image_id": 0, "category_id": 1}],
    "categories": [{"id": 0, "name": "Background"}, {"id": 1, "name": "crack"}],
}
TASKS = [
    {"data": {"image": "a.jpg"}, "annotations": [{"result": [{"value": {"choices": ["crack"]}}]}]},
    {"data": {"image": "b.jpg"}, "annotations": [{"result": []}]},
    {"data": {"image": "c.jpg"}, "annotations": [{"result": [], "was_cancelled": True}]},
    {"data": {"image": "d.jpg"}, "annotations": []},
]
CVAT = '<annotations><image name="a.jpg"><tag label="crack"/></image><image name="b.jpg"/></annotations>'


def opened(root: Path, *images: str, **keys: Any) -> DataSet:
    touch(root, *images)
    return open_data(DataConfig(root=str(root), val_list="", **keys))


def negatives(data: DataSet) -> list[str]:
    train = data.train()
    return [name for name, negative in zip(train.names, train.negative, strict=True) if negative]


@pytest.mark.parametrize(
    ("place", "content", "none", "unlabeled"),
    [
        ("tags.csv", "file,tags\na.jpg,crack\nb.jpg,\nc.jpg,none\n", ["b", "c"], ["d"]),
        ("tags.csv", "file,label\na.jpg,crack\nb.jpg,Background\n", ["b"], ["c", "d"]),
        ("tags.csv", "file,crack\na.jpg,1\nb.jpg,0\nc.jpg,?\n", ["b"], ["c", "d"]),
        ("tags.csv", "file,crack,background\na.jpg,1,0\nb.jpg,0,1\nc.jpg,-1,0\n", ["b"], ["c", "d"]),
        ("tags.csv", "file,tags\na.jpg,crack\nb.jpg,\nc.jpg,?\nd.jpg,NaN\n", ["b"], ["c", "d"]),
        ("tags.csv", "file,label\na.jpg,crack\nb.jpg,None\nc.jpg,-1\nd.jpg,null\n", ["b"], ["c", "d"]),
        ("tags.json", {"a.jpg": ["crack"], "b.jpg": [], "c.jpg": None}, ["b"], ["c", "d"]),
        ("tags.json", {"a.jpg": "crack", "b.jpg": "none", "c.jpg": -1, "d.jpg": [None]}, ["b"], ["c", "d"]),
        ("tags.jsonl", '{"file": "a.jpg", "crack": 1}\n{"file": "b.jpg", "crack": 0}\n'
         '{"file": "c.jpg", "crack": null}\n{"file": "d.jpg"}', ["b"], ["c", "d"]),
        ("tags.json", [{"file": "a.jpg", "objects": {"category": ["crack"]}}, {"file": "b.jpg", "objects": []},
         {"file": "c.jpg", "objects": {"bbox": []}}], ["b"], ["c", "d"]),
        ("tags.jsonl", '{"file": "a.jpg", "tags": ["crack"]}\n{"file": "b.jpg", "tags": []}\n{"file": "c.jpg"}', ["b"],
         ["c", "d"]),
        ("instances.json", COCO, ["b", "c"], ["d"]),
        ("project-1.json", TASKS, ["b"], ["c", "d"]),
        ("annotations.xml", CVAT, ["b"], ["c", "d"]),
    ],
)  # fmt: skip
def test_what_files_state(tmp_path: Path, place: str, content: Any, none: list[str], unlabeled: list[str]) -> None:
    write(tmp_path, place, content)
    data = opened(tmp_path, *(f"images/{name}.jpg" for name in "abcd"))
    assert data.classes == ("crack",)
    assert negatives(data) == none
    assert list(data.untagged) == unlabeled
    assert f"{len(none)} of them without any class" in data.describe()


@pytest.mark.parametrize(("folder", "keys"), [("background", {}), ("good", {"negatives": ("good",)})])
def test_a_folder_of_negatives(tmp_path: Path, folder: str, keys: dict[str, Any]) -> None:
    data = opened(tmp_path, "crack/a.jpg", f"{folder}/b.jpg", **keys)
    assert data.classes == ("crack",)
    assert negatives(data) == [f"{folder}/b"]


@pytest.mark.parametrize("content", ["a.jpg,crack\nb.jpg,rust;?\n", "a.jpg,crack\nb.jpg,rust\nb.jpg,?\n"])
def test_a_mark_beside_tags_says_nothing_of_the_other_classes(tmp_path: Path, content: str) -> None:
    write(tmp_path, "tags.csv", f"file,label\n{content}")
    data = opened(tmp_path, "a.jpg", "b.jpg")
    assert data.classes == ("crack", "rust")
    assert [data.tagged().targets(index).tolist() for index in range(2)] == [[1, 0], [-1, 1]]
    write(tmp_path, "classes.txt", "crack\nrust\n?\n")
    assert opened(tmp_path).tagged().targets(1).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (
            "file,tags\na.jpg,none crack\nb.jpg,none\nc.jpg,crack none",
            "line 2: image 'a.jpg' has 'none crack', of",
        ),
        ("file,label\na.jpg,crack\na.jpg,None\nb.jpg,none\nc.jpg,crack\nc.jpg,none", "has 'crack None', of which one"),
        ("file,crack,background\na.jpg,1,1\nb.jpg,0,1\nc.jpg,1,1", ""),
    ],
)
def test_none_beside_a_class_is_said(tmp_path: Path, content: str, note: str) -> None:
    write(tmp_path, "tags.csv", content)
    data = opened(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    assert negatives(data) == ["b"]
    assert len(data.notes) == bool(note)
    assert all(note in each and "taken as 'crack' (2 such images)" in each for each in data.notes)


def test_negatives_without_any_class_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "background/a.jpg", "none/b.jpg")
    with refused(f"{tmp_path}: 0 classes", "data.negatives", "tag at least one image"):
        opened(tmp_path)
    write(tmp_path, "tags.csv", "file,crack,rust\na.jpg,0,1\n")
    with refused("tags.csv: 0 classes", "data.negatives", "tag at least one image"):
        opened(tmp_path, negatives=("rust", "crack"))
    write(tmp_path, "classes.txt", "\n")
    with refused("classes.txt: 0 classes; write one a line"):
        opened(tmp_path)


def test_those_of_a_test_split_are_not_counted(tmp_path: Path) -> None:
    data = opened(tmp_path, "train/crack/a.jpg", "train/none/b.jpg", "val/crack/c.jpg", "test/none/d.jpg")
    assert "1 of them without any class" in data.describe()


def test_a_stated_class_is_a_class_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("crack\nnone")
    data = opened(tmp_path, "crack/a.jpg", "none/b.jpg")
    assert data.classes == ("crack", "none")
    assert negatives(data) == []


def test_lists_of_the_voc_layout_may_name_them(tmp_path: Path) -> None:
    touch(tmp_path, *(f"JPEGImages/{name}.jpg" for name in "abc"))
    (tmp_path / "classes.txt").write_text("crack")
    write(tmp_path, "lists/train.txt", "a\nb")
    write(tmp_path, "lists/tags.csv", "image,tags\na,crack\nb,\n")
    assert negatives(open_data(DataConfig(root=str(tmp_path)))) == ["b"]
    write(tmp_path, "lists/train.txt", "a\nc")
    with refused("tags.csv", "'c'", "no tags"):
        open_data(DataConfig(root=str(tmp_path))).train()


def test_the_check_counts_them_and_asks_about_names(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{folder}/{i}.jpg" for folder in ("crack", "none", "good") for i in range(20)))
    report = check_data(Config(data=DataConfig(root=str(tmp_path))), fast=True)
    assert report["num_negatives"] == 20
    asked = [problem["message"] for problem in report["problems"] if "data.negatives" in problem["message"]]
    assert [message.split(":")[0] for message in asked] == ["class 'good'"]
    config = Config(data=DataConfig(root=str(tmp_path), negatives=("none", "good")))
    report = check_data(config, fast=True)
    assert (report["num_negatives"], [each["name"] for each in report["classes"]]) == (40, ["crack"])
    assert 0.15 <= report["num_validation"] / 60 <= 0.25
    assert all("data.negatives" not in problem["message"] for problem in report["problems"])


def made_images(num_tagged: int, num_negative: int) -> TaggedImages:
    count = num_tagged + num_negative
    names = tuple(str(i) for i in range(count))
    tags = np.zeros((count, 2), dtype=bool)
    tags[np.arange(num_tagged) * count // num_tagged, 1] = True
    return TaggedImages(classes=("x", "y"), names=names, paths=names, tags=tags)


@pytest.mark.parametrize(
    ("negative", "share", "expected"), [(10, 0.5, 0.25), (90, 0.5, 0.5), (90, 0.0, 0.0), (1, 1, 1 / 31)]
)
def test_their_share_of_the_batches_is_bounded(negative: int, share: float, expected: float) -> None:
    images = made_images(30, negative)
    config = Config(schedule=ScheduleConfig(batch_size=6), train=TrainConfig(negative_share=share))
    order = Order(images, config)
    steps = [order.indices(step) for step in range(200)]
    counts = np.array([images.negative[step].sum() for step in steps])
    assert counts.mean() / 6 == pytest.approx(expected, abs=0.01)
    assert counts.max() - counts.min() <= 1
    assert set(np.concatenate(steps).tolist()) >= set(np.flatnonzero(~images.negative).tolist())
    if share:
        assert set(np.concatenate(steps).tolist()) == set(range(len(images)))
    halves = [order.pairs(3, slice(0, 3)), order.pairs(3, slice(3, 6))]
    assert sorted(index for half in halves for _, index in half) == sorted(steps[3].tolist())
    for half in halves:
        assert [bool(images.negative[i]) for _, i in half] == sorted(bool(images.negative[i]) for _, i in half)


def test_negatives_alone_are_refused() -> None:
    images = made_images(1, 3)
    images._tags[:] = 0
    with refused("no image to train on has any of the classes"):
        Order(images, Config())


def test_a_class_that_is_unknown_has_no_loss() -> None:
    logits = torch.randn(3, 2, generator=torch.manual_seed(0), requires_grad=True)
    classification_loss(logits, torch.tensor([[1.0, -1.0], [0.0, 1.0], [-1.0, -1.0]])).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert (logits.grad == 0).tolist() == [[False, True], [False, False], [True, True]]


class Scores:
    """A CAM pass that gives random scores, and remembers how many images it saw."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, image: Tensor, affinity: bool) -> NetworkOutput:
        self.seen.append(len(image))
        scores = torch.nn.functional.avg_pool2d(image[:, :2], 8)
        return NetworkOutput(scores.mean((2, 3)), scores)


def test_their_label_is_background_and_nothing_is_computed_for_it() -> None:
    config = PseudoConfig(scales=(1.0,), mirror=False, propagation="none", dilations=(1, 2))
    image = torch.rand(3, 3, 32, 32, generator=torch.manual_seed(0))
    tags = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    box = torch.tensor([[0, 32, 0, 32], [0, 32, 0, 20], [4, 32, 0, 16]])
    kinds, score = ("initial_label", "refined_label"), Scores()
    labels = training_labels(score, image[:2], tags[:2], box, config=config, want=kinds)
    alone = training_labels(score, image[:2], tags[:2], box[:2], config=config, want=kinds)
    assert set(score.seen) == {2}
    expected = torch.full((32, 32), 255)
    expected[4:, :16] = 0
    for kind in kinds:
        made = getattr(labels, kind)
        assert torch.equal(made[:2], getattr(alone, kind))
        assert torch.equal(made[2], expected)
    only = training_labels(score, image[:0], tags[:0], box[2:], config=config, want=kinds)
    assert only.initial_label is not None
    assert torch.equal(only.initial_label[0], expected)


def test_masks_of_images_without_tags_are_background_without_a_pass() -> None:
    network: Any = torch.nn.Linear(1, 1)  # has a device, and can score nothing
    images = [np.zeros((5, 7, 3), dtype=np.uint8)]
    (label,) = pseudo_labels(network, images, [np.zeros(2, dtype=np.float32)], Config(), kind="refined")
    assert torch.equal(label, torch.zeros(5, 7, dtype=torch.int64))


def test_the_demo_of_one_class_runs(tmp_path: Path) -> None:
    tiny = {"schedule.max_steps": 4, "schedule.cls_steps": 1, "schedule.refined_steps": 2, "train.device": "cpu"}
    run_demo(tmp_path / "run", smoke=True, one_class=True, overrides=tiny | {"train.example_images": 2})
    data = open_data(replace(DataConfig(), root=str(tmp_path / "run" / "data")))
    assert data.classes == ("disk",)
    assert 0.3 < data.train().negative.mean() < 0.7
    assert data.masked().negative.any()


@pytest.mark.slow
def test_a_run_without_masks_on_data_with_negatives_ends_with_its_report(tiny_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root, ignore=shutil.ignore_patterns("SegmentationClassAug"))
    names = (root / "lists" / "val.txt").read_text().split()
    tags = (root / "lists" / "tags.csv").read_text().splitlines()
    tags = [f"{line.split(',')[0]}," if line.split(",")[0] in names[:3] else line for line in tags]
    (root / "lists" / "tags.csv").write_text("\n".join(tags))
    train_and_report(tiny_config(root, {"schedule.max_steps": 1}), tmp_path / "run")
    worth = json.loads((tmp_path / "run" / "worth.json").read_text())
    assert worth["negatives"]["images"] == 3
    assert "hold none of the classes" in (tmp_path / "run" / "report.html").read_text()
