"""The pass over a list: figures against numpy, tags, shards, and the messages of its errors."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, distributed, multiprocessing, nn

from afa.config import Config, DataConfig, EvaluationConfig, ModelConfig, PseudoConfig
from afa.data.dataset import MaskedImages
from afa.data.open import open_data
from afa.data.palette import write_index_png
from afa.errors import AfaError
from afa.evaluation import evaluate as evaluate_module
from afa.evaluation.evaluate import (
    BATCH_PIXELS,
    EvaluationResult,
    evaluate,
    first_images,
    group_by_size,
    resolve_batch_size,
)
from afa.model.network import AfaNetwork
from afa.runs.network import build_network
from afa.runtime import Processes, read_ahead
from afa.types import IMAGE_MEAN, IMAGE_STD, NetworkOutput
from mistakes import refused

CLASSES = ("cat", "dog", "horse")
# Per image: the class that its color says, its tags, and the classes of the four quarters of its mask.
IMAGES: dict[str, tuple[int, str, tuple[int, int, int, int]]] = {
    "a": (1, "cat", (1, 1, 0, 255)),
    "b": (2, "dog", (2, 0, 0, 0)),
    "c": (0, "cat dog", (0, 0, 0, 1)),
    "d": (2, "cat", (1, 1, 1, 2)),
    "e": (1, "cat", (1, 1, 1, 1)),
}


class ColorNetwork(nn.Module):
    """Predicts for every pixel the class c of the image's red value, 60 * c, and tags it so."""

    num_classes = 3
    text = None

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.num_calls = 0

    def forward(self, image: Tensor, *, segmentation: bool, affinity: bool) -> NetworkOutput:
        assert not self.training
        self.num_calls += 1
        red = (image[:, 0] * IMAGE_STD[0] + IMAGE_MEAN[0]) * 255 / 60
        distance = -(red[:, None] - torch.arange(4.0).view(1, 4, 1, 1)).abs()
        image_logits = distance[:, 1:].mean((2, 3)) + 0.5
        return NetworkOutput(image_logits, distance[:, 1:], seg_logits=distance[:, :, ::4, ::4])


def write_voc(
    root: Path, examples: dict[str, tuple[np.ndarray, np.ndarray, str]], *, tags: bool = True
) -> MaskedImages:
    """Images by name, each with its mask and tags."""
    for folder in ("JPEGImages", "SegmentationClassAug", "lists"):
        (root / folder).mkdir(parents=True)
    for name, (pixels, mask, _) in examples.items():
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.png")
        write_index_png(root / "SegmentationClassAug" / f"{name}.png", mask)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    (root / "lists" / "val.txt").write_text("\n".join(examples))
    if tags:
        rows = [f"{name},{words}" for name, (_, _, words) in examples.items()]
        (root / "lists" / "tags.csv").write_text("\n".join(["image,tags", *rows]))
    return open_data(DataConfig(root=str(root))).masked()


def write_data(root: Path, *, tags: bool = True) -> MaskedImages:
    examples = {}
    for i, (name, (color, words, quarters)) in enumerate(IMAGES.items()):
        height, width = 40 + 4 * i, 60 - 4 * i
        pixels = np.full((height, width, 3), 60 * color, dtype=np.uint8)
        examples[name] = (pixels, mask_of(height, width, quarters), words)
    return write_voc(root, examples, tags=tags)


def mask_of(height: int, width: int, quarters: tuple[int, int, int, int]) -> np.ndarray:
    grid = np.array(quarters, dtype=np.uint8).reshape(2, 2)
    return grid.repeat(height // 2, 0).repeat(width // 2, 1)


def run(images: MaskedImages, **settings: Any) -> EvaluationResult:
    config, limit = settings.pop("config", Config()), settings.pop("limit", None)
    evaluation = replace(config.evaluation, **{key: settings.pop(key) for key in ("protocol",) if key in settings})
    config = replace(config, evaluation=evaluation)
    return evaluate(ColorNetwork(), first_images(images, limit), config, **settings)  # type: ignore[arg-type]


def expected_matrix(names: list[str]) -> np.ndarray:
    matrix = np.zeros((4, 4), dtype=np.int64)
    for i, (name, (color, _, quarters)) in enumerate(IMAGES.items()):
        for label in quarters if name in names else ():
            if label != 255:
                matrix[label, color] += (20 + 2 * i) * (30 - 2 * i)
    return matrix


@pytest.mark.parametrize("protocol", ["single", "multiscale"])
def test_segmentation_figures(tmp_path: Path, protocol: str) -> None:
    result = run(write_data(tmp_path), protocol=protocol)
    matrix = expected_matrix(list(IMAGES))
    np.testing.assert_array_equal(result.matrix, matrix)
    assert result.to_json()["confusion"] == matrix.tolist()
    correct = matrix.diagonal()
    ious = 100 * correct[:3] / (matrix.sum(0) + matrix.sum(1) - correct)[:3]
    assert result.miou == pytest.approx(ious.mean())
    assert result.per_class == {
        "background": pytest.approx(ious[0]),
        "cat": pytest.approx(ious[1]),
        "dog": pytest.approx(ious[2]),
        "horse": None,
    }
    assert (result.protocol, result.labels, result.num_images) == (protocol, "seg", 5)
    # Classifier: a cat, b dog, c nothing, d dog, e cat -> 3 hits of 4 found and 6 true tags.
    assert result.extras == {"tag_f1": pytest.approx(100 * 2 * 3 / (4 + 6))}


def test_json_has_the_promised_keys_rounded(tmp_path: Path) -> None:
    result = run(write_data(tmp_path), limit=2)
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert list(written) == [
        "miou", "per_class", "protocol", "labels", "supervision", "num_images", "seconds", "tag_f1",
        "confusion", "images",
    ]  # fmt: skip
    assert written["supervision"] == "weakly supervised (image tags)"
    assert written["num_images"] == 2
    assert written["miou"] == round(result.miou, 2) != result.miou
    assert list(written["per_class"]) == ["background", *CLASSES]
    assert written["per_class"]["horse"] is None
    np.testing.assert_array_equal(result.matrix, expected_matrix(["a", "b"]))
    keys = ("image", "iou", "accuracy", "truth", "prediction", "share")
    rows = (("a", 33.33, 66.67, "background", "cat", 33.33), ("b", 12.5, 25.0, "background", "dog", 75.0))
    assert written["images"] == [dict(zip(keys, row, strict=True)) for row in rows]


def test_one_pass_per_image_and_the_mode_is_restored(tmp_path: Path) -> None:
    network = ColorNetwork().train()
    images = write_data(tmp_path)
    evaluate(network, images, Config())  # type: ignore[arg-type]
    assert network.training
    assert network.num_calls == len(IMAGES)


def test_masks_without_labeled_pixels_give_null(tmp_path: Path) -> None:
    images = write_data(tmp_path)
    write_index_png(tmp_path / "SegmentationClassAug" / "a.png", np.full((40, 60), 255, dtype=np.uint8))
    result = run(images, limit=1)
    assert math.isnan(result.miou)
    assert result.to_json()["miou"] is None


def fake_pseudo_labels(monkeypatch: pytest.MonkeyPatch, value: int) -> list[dict[str, Any]]:
    """Let pseudo labels be `value` on the left half and background on the right."""
    calls: list[dict[str, Any]] = []

    def pseudo_labels(
        network: object, images: list[Tensor], tags: list[np.ndarray], config: Config, **settings: Any
    ) -> Iterator[Tensor]:
        for image, image_tags in zip(images, tags, strict=True):
            calls.append({"tags": image_tags.tolist(), "config": config, **settings})
            label = torch.zeros(image.shape[:2], dtype=torch.int64)
            label[:, : image.shape[1] // 2] = value
            yield label

    monkeypatch.setattr(evaluate_module, "pseudo_labels", pseudo_labels)
    return calls


@pytest.mark.parametrize("labels", ["cam", "propagated"])
def test_cam_labels_get_the_true_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str) -> None:
    calls = fake_pseudo_labels(monkeypatch, 1)
    config = replace(Config(), pseudo=PseudoConfig(iterations=3))
    result = run(write_data(tmp_path), labels=labels, config=config, refine=True, limit=2)
    assert [call["tags"] for call in calls] == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert {(call["kind"], call["refine"]) for call in calls} == {(labels, True)}
    assert all(call["config"] == config for call in calls)
    # Quarters of a: 1 1 / 0 ignored against 1 0 / 1 0; of b: 2 0 / 0 0 against the same.
    first, second = 20 * 30, 22 * 28
    expected = [[second * 2, first + second, 0, 0], [first, first, 0, 0], [0, second, 0, 0], [0, 0, 0, 0]]
    assert result.matrix.tolist() == expected
    assert result.extras == {}
    assert result.labels == labels


def test_uncertain_pixels_are_not_scored_but_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pseudo_labels(monkeypatch, 255)
    result = run(write_data(tmp_path), labels="refined", limit=1)
    # Quarters of a: 1 1 / 0 ignored. The right half is decided, as background: one wrong, one ignored.
    assert result.matrix.sum() == result.matrix[1, 0] == 20 * 30
    assert result.extras == {"coverage": pytest.approx(100 / 3)}


def test_real_pseudo_labels_are_scored(tmp_path: Path) -> None:
    network = tiny_network()
    images = write_data(tmp_path)
    result = evaluate(network, first_images(images, 2), Config(), labels="propagated")
    assert result.matrix.sum() == expected_matrix(["a", "b"]).sum()
    assert result.matrix[:, 3].sum() == 0  # No image is tagged horse.


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"labels": "mask"}, ["labels is 'mask'; use", "seg, cam, propagated, initial, refined"]),
        ({"protocol": "crf"}, ["protocol is 'crf'; use", "single, multiscale, single+crf, multiscale+crf"]),
        ({"limit": 0}, ["no image to evaluate; give"]),
    ],
)
def test_wrong_settings(tmp_path: Path, settings: dict[str, Any], parts: list[str]) -> None:
    with refused(*parts):
        run(write_data(tmp_path), **settings)


def test_without_tags_only_the_segmentation_is_scored(tmp_path: Path) -> None:
    images = write_data(tmp_path, tags=False)
    result = run(images)
    assert (result.num_images, result.extras) == (5, {"tag_f1": None})
    with refused("no entry for image 'a'"):
        run(images, labels="cam")


def test_other_classes(tmp_path: Path) -> None:
    images = write_data(tmp_path)
    network = ColorNetwork()
    network.num_classes = 20
    with refused("20 classes", "data set 3; evaluate"):
        evaluate(network, images, Config())  # type: ignore[arg-type]


def test_broken_or_missing_masks_are_one_line(tmp_path: Path) -> None:
    images = write_data(tmp_path)
    (tmp_path / "SegmentationClassAug" / "c.png").write_bytes(b"not a png")
    with refused("c.png: not an image"):
        run(images)
    with refused(f"{tmp_path / 'nowhere'}: ", "data.mask_dir"):
        open_data(DataConfig(root=str(tmp_path), mask_dir="nowhere")).masked()


def test_read_ahead_keeps_order_and_delivers_errors_at_their_place() -> None:
    def read(index: int) -> int:
        if index == 7:
            raise AfaError("seven")
        return index * index

    results: list[tuple[int, object]] = []
    for index, reading in read_ahead(read, range(30)):
        error = reading.exception()
        results.append((index, str(error) if error else reading.result()))
    assert results == [(i, "seven" if i == 7 else i * i) for i in range(30)]


def write_sizes(root: Path, sizes: list[tuple[int, int]]) -> MaskedImages:
    """Random images and masks of the given sizes, each with one tag."""
    rng, values = np.random.default_rng(0), np.array([0, 1, 2, 3, 255], dtype=np.uint8)
    return write_voc(
        root,
        {
            str(i): (rng.integers(0, 256, (*size, 3), dtype=np.uint8), rng.choice(values, size), CLASSES[i % 3])
            for i, size in enumerate(sizes)
        },
    )


def tiny_network() -> AfaNetwork:
    torch.manual_seed(0)
    return build_network(ModelConfig(backbone="mit_tiny", weights="", decoder_width=8), 3)


@pytest.mark.parametrize("labels", ["seg", "cam", "refined"])
def test_batches_give_the_figures_of_single_images(tmp_path: Path, labels: str) -> None:
    network = tiny_network()
    images = write_sizes(tmp_path, [(40, 50), (50, 40), (40, 50), (64, 33), (40, 50), (50, 40), (40, 50)])
    settings: dict[str, Any] = {"labels": labels}
    sizes: list[int] = []
    network.backbone.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    one = evaluate(network, images, Config(evaluation=EvaluationConfig(batch_size=1)), **settings)
    count = len(sizes)
    three = evaluate(network, images, Config(evaluation=EvaluationConfig(batch_size=3)), **settings)
    np.testing.assert_array_equal(three.matrix, one.matrix)
    assert three.extras == one.extras
    assert three.num_images == one.num_images == 7
    # 40x50: three and one; 50x40: two; 64x33: one. For pseudo labels all are enlarged to 64x64: three, three, one.
    assert (len(sizes) - count) / count == pytest.approx((4 if labels == "seg" else 3) / 7)


def sizes_of(item: tuple[int, tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return (item[1],)


def test_groups_are_of_one_size_and_lose_nothing() -> None:
    rng = np.random.default_rng(0)
    items = [(i, (100, 100 + int(rng.integers(6)))) for i in range(200)]
    groups = list(group_by_size(iter(items), sizes=sizes_of, batch_size=4))
    assert sorted(item for group in groups for item in group) == items
    assert all(len({size for _, size in group}) == 1 for group in groups)
    assert all(1 <= len(group) <= 4 for group in groups)
    assert sum(len(group) == 4 for group in groups) > 0.8 * len(groups)


def test_rare_sizes_neither_wait_forever_nor_crowd_out_the_others() -> None:
    # Every third image is of a size of its own.
    items = [(i, (100, 100 + (i if i % 3 == 0 else 0))) for i in range(1, 301)]
    taken = 0

    def source() -> Iterator[tuple[int, tuple[int, int]]]:
        nonlocal taken
        for item in items:
            taken += 1
            yield item

    common: list[int] = []
    done = 0
    for group in group_by_size(source(), sizes=sizes_of, batch_size=4):
        done += len(group)
        assert taken - done < 16, "more than four batches wait"
        assert taken - group[0][0] <= 48, "the oldest image waits too long"
        if group[0][1] == (100, 100):
            common.append(len(group))
    assert done == 300
    assert set(common) == {4}


def test_large_images_come_in_smaller_batches_and_one_at_a_time_goes_at_once() -> None:
    side = int(BATCH_PIXELS**0.5)
    for size, expected in (((side, side), 8), ((side // 4, side), 8), ((side, 2 * side), 4), ((9 * side, side), 1)):
        items = [(i, size) for i in range(8)]
        groups = list(group_by_size(items, sizes=sizes_of, batch_size=8))
        assert [len(group) for group in groups] == [expected] * (8 // expected)
    source = iter([(i, (i + 1, 1)) for i in range(10)])
    groups_of_one = group_by_size(source, sizes=sizes_of, batch_size=1)
    assert next(groups_of_one) == [(0, (1, 1))]
    assert next(source) == (1, (2, 1))


def test_automatic_batch_size() -> None:
    assert resolve_batch_size(0, torch.device("cpu")) == 1
    assert resolve_batch_size(0, torch.device("cuda", 1)) == 8
    assert resolve_batch_size(3, torch.device("cuda")) == 3


def _score_shard(rank: int, root: str) -> None:
    distributed.init_process_group("gloo", f"file://{root}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    result = run(open_data(DataConfig(root=root)).masked(), processes=Processes(rank, 2))
    Path(root, f"rank{rank}.json").write_text(json.dumps([result.matrix.tolist(), result.to_json()]))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    alone = run(write_data(tmp_path))
    multiprocessing.spawn(_score_shard, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in (0, 1):
        matrix, written = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert matrix == alone.matrix.tolist()
        assert {**written, "seconds": 0} == {**alone.to_json(), "seconds": 0}
