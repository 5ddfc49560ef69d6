"""What is chosen for a folder, what is said of it, and that stated keys win."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, Dinov2WithRegistersConfig, SegformerConfig

from afa.config import Config, load_config
from afa.data.open import open_data
from afa.data.order import Order
from afa.errors import AfaError
from afa.model.registry import BACKBONES, backbone_of
from afa.runs import auto as defaults
from afa.runs.auto import BACKBONE, Pace, choose_defaults
from afa.runtime import resolve_precision
from mistakes import refused

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def write_table(root: Path, num_images: int, *, masks: bool = False) -> Path:
    """A data set whose images are never opened."""
    (root / "images").mkdir(parents=True)
    rows = ["file,tags"]
    for number in range(num_images):
        (root / "images" / f"{number}.jpg").touch()
        rows.append(f"{number}.jpg,{'cat' if number % 2 else 'dog'}")
    (root / "tags.csv").write_text("\n".join(rows))
    if masks:
        (root / "masks").mkdir()
    return root


def choose(
    root: Path, keys: dict[str, Any] | None = None, *, device: torch.device = CPU, **options: Any
) -> tuple[Config, list[str]]:
    stated = {"data.root": str(root)} | (keys or {})
    config, lines = choose_defaults(open_data(load_config(None, stated).data), device, stated, **options)
    assert all("\n" not in line for line in lines)
    return config, list(lines)


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub answers, and any GPU is a recent one."""
    monkeypatch.setattr(defaults, "can_fetch", lambda hub_id: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def pace(image: float, step: float) -> Any:
    """Stands for a measurement: a machine of a known pace."""
    return lambda config, num_classes, device: Pace(image, step)


DINO = {"model.backbone": "dinov2_small_reg"}


def test_four_lines(tmp_path: Path) -> None:
    _, lines = choose(write_table(tmp_path / "pets", 100), measure=pace(0.6, 0.5))
    data, encoder, schedule, scores = lines
    assert data.startswith(f"data: {tmp_path / 'pets'}: table of tags in tags.csv, 2 classes (cat, dog); 80 images")
    assert encoder.startswith(f"encoder: {BACKBONE} from {BACKBONES[BACKBONE].weights} (MIT), frozen; the class names")
    assert "--model.weights FOLDER" in encoder
    assert schedule.startswith("schedule: 300 steps of 8 images of 384 pixels, 30 epochs of 80 images; about 4 min")
    assert schedule.endswith("; more time would buy nothing that was tried")
    assert scores.startswith("scores: F1 of the tags")
    assert "mIoU" in choose(write_table(tmp_path / "masked", 20, masks=True))[1][3]
    assert "none" in choose(tmp_path / "pets", {"data.split_fraction": 0})[1][3]


def test_four_lines_of_an_encoder_that_learns(tmp_path: Path) -> None:
    encoder, schedule = choose(write_table(tmp_path / "pets", 100), DINO)[1][1:3]
    weights = "facebook/dinov2-with-registers-small (Apache-2.0)"
    assert encoder.startswith(f"encoder: dinov2_small_reg from {weights}, its first 6 blocks")
    assert schedule.startswith("schedule: 400 steps of 8 crops of 336 pixels in ")
    assert ": 40 epochs of 80 images (" in schedule


@pytest.mark.parametrize(
    ("minutes", "image", "side", "steps", "images"),
    [
        (None, 0.6, 384, 800, 1600),  # 20 min for the images, 7 for the steps
        (None, 2.4, 384, 800, 933),  # all images would take more than an hour
        (500.0, 0.6, 384, 800, 1600),
        (25.0, 0.6, 384, 800, 1433),
        (13.0, 0.6, 384, 480, 500),
        (10.0, 0.6, 320, 648, 500),
        (1.0, 0.6, 224, 300, 500),  # too little for anything
    ],
)
def test_size_steps_and_images_follow_from_the_time(
    tmp_path: Path, minutes: float | None, image: float, side: int, steps: int, images: int
) -> None:
    """1,600 images to train on and 400 to score, by their tags alone; a step takes half a second at 384 pixels."""
    root = write_table(tmp_path / "pets", 2000)
    config, lines = choose(root, minutes=minutes, measure=pace(image, 0.5))
    assert config.augment.crop_size == side
    assert config.schedule.max_steps == pytest.approx(steps, abs=1)
    assert config.train.max_images == pytest.approx(images if images < 1600 else 0, abs=1)
    assert config.evaluation.short_side == round(0.75 * side)
    area = (side / 384) ** 2
    taken = ((images + 400) * image + config.schedule.max_steps * 0.5) * area / 60
    assert f"about {taken:.0f} min here" in lines[2]
    assert ("more than" in lines[2]) == (taken > (60 if minutes is None else minutes) + 0.1)
    if "would buy" in lines[2] and "would buy nothing" not in lines[2]:
        enough = float(lines[2].split("--minutes ")[1].split()[0])
        larger = choose(root, minutes=enough, measure=pace(image, 0.5))[0]
        assert (larger.augment.crop_size, larger.schedule.max_steps, larger.train.max_images) == (384, 800, 0)


def test_a_plan_pays_for_the_images_of_its_batches_alone(tmp_path: Path) -> None:
    """16,000 images to train on would take 53 minutes; 4,000 to score take 13."""
    root = write_table(tmp_path / "pets", 20_000)
    config, lines = choose(root, minutes=60.0, measure=pace(0.2, 0.5))
    assert (config.augment.crop_size, config.schedule.max_steps, config.train.max_images) == (384, 800, 0)
    assert f"about {((6400 + 4000) * 0.2 + 400) / 60:.0f} min here: 21 for the features" in lines[2]


@pytest.mark.parametrize(("stated", "trained"), [(1000, 1000), (0, 1600)])
def test_the_time_is_kept_with_the_images_that_are_stated(tmp_path: Path, stated: int, trained: int) -> None:
    """1,600 images to train on and 400 to score; 500 images would fit at the largest size."""
    keys = {"train.max_images": stated}
    config, lines = choose(write_table(tmp_path / "pets", 2000), keys, minutes=13.0, measure=pace(0.6, 0.5))
    assert config.train.max_images == stated
    area = (config.augment.crop_size / 384) ** 2
    taken = ((trained + 400) * 0.6 + config.schedule.max_steps * 0.5) * area / 60
    assert taken <= 13.1
    assert f"about {taken:.0f} min here" in lines[2]
    assert f"of {f'{stated:,} of ' if stated else ''}1,600 images" in lines[2]


def test_images_without_any_class_take_their_time_too(tmp_path: Path) -> None:
    """1,600 images to train on, half of them with a class; 500 of both fit."""
    root = write_table(tmp_path / "pets", 2000)
    table = root / "tags.csv"
    table.write_text(table.read_text().replace(",dog", ",none"))
    config, lines = choose(root, minutes=13.0, measure=pace(0.6, 0.5))
    order = Order(open_data(config.data).train(), config)
    kept = len(order.taken(config.schedule.max_steps))
    assert kept == pytest.approx(500, abs=2)
    assert f"{500:,} of 1,600 images" in lines[2]
    assert 200 < config.train.max_images < 300


def test_minutes_need_a_frozen_encoder(tmp_path: Path) -> None:
    with refused("--minutes is 30", "dinov2_small_reg", "--schedule.max_steps"):
        choose(write_table(tmp_path / "pets", 10), DINO, minutes=30)


@pytest.mark.parametrize(
    ("num_images", "device", "steps"),
    [(10, CPU, 300), (100, CPU, 400), (2000, CPU, 1000), (2000, GPU, 2000), (200, GPU, 800)],
)
def test_steps_grow_with_the_images(tmp_path: Path, num_images: int, device: torch.device, steps: int) -> None:
    schedule = choose(write_table(tmp_path / "pets", num_images), DINO, device=device)[0].schedule
    assert schedule.max_steps == steps
    assert 0 < schedule.warmup_steps < schedule.cls_steps < schedule.refined_steps < steps


def test_the_device_decides_the_size(tmp_path: Path) -> None:
    root = write_table(tmp_path / "pets", 100)
    small, large = (choose(root, DINO, device=device)[0] for device in (CPU, GPU))
    assert (small.model.freeze_blocks, large.model.freeze_blocks) == (6, 6)
    assert (small.augment.crop_size, small.schedule.batch_size) == (336, 8)
    assert (large.augment.crop_size, large.schedule.batch_size) == (448, 8)
    assert (large.train.precision, small.train.precision) == ("bf16", resolve_precision(CPU, "auto"))


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_every_encoder_gets_settings_that_fit(tmp_path: Path, backbone: str, device: torch.device) -> None:
    config = choose(write_table(tmp_path / "pets", 10), {"model.backbone": backbone}, device=device)[0]
    assert (config.model.backbone, config.model.weights) == (backbone, BACKBONES[backbone].weights)
    stride = 16 if backbone.startswith("mit_") else BACKBONES[backbone].size.patch  # type: ignore[union-attr]
    frozen = config.model.classifier == "text"  # then the view is rounded to whole patches
    assert frozen or config.augment.crop_size % stride == 0
    assert config.augment.crop_size <= 512


def test_stated_keys_win_and_the_rest_follows(tmp_path: Path) -> None:
    root = write_table(tmp_path / "pets", 100)
    config, lines = choose(
        root, DINO | {"schedule.max_steps": "1_000", "augment.crop_size": "224", "model.pooling": "gap"}
    )
    assert (config.schedule.max_steps, config.schedule.cls_steps, config.schedule.refined_steps) == (1000, 200, 450)
    assert (config.augment.crop_size, config.model.pooling) == (224, "gap")
    assert "1,000 steps of 8 crops of 224 pixels" in lines[2]
    assert choose(root, DINO | {"schedule.batch_size": 4})[0].schedule.max_steps == 800
    with pytest.raises(AfaError, match=r"unknown key schedule\.steps"):
        choose(root, {"schedule.steps": 3})
    unknown = choose(root, {"model.backbone": "vgg"})[
        0
    ].model.backbone  # refused, with the known ones, when it is built
    assert unknown == "vgg"


def test_weights_that_cannot_be_had_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "can_fetch", lambda hub_id: False)
    root = write_table(tmp_path / "pets", 10)
    with pytest.raises(AfaError, match=r"^openai/clip\S+: .*--model\.weights"):
        choose(root)
    stated = {"data.root": str(root)}
    layout = open_data(load_config(None, stated).data)
    assert choose_defaults(layout, CPU, stated, need_weights=False)[0].model.backbone == BACKBONE
    config, lines = choose(root, {"model.weights": ""})
    assert (config.preset, config.model.backbone, config.model.weights) == ("demo", "mit_tiny", "")
    assert "random weights" in lines[1]


def test_the_encoder_is_told_from_its_weights(tmp_path: Path) -> None:
    configs = {
        "dinov2_base_reg": Dinov2WithRegistersConfig(patch_size=14),
        "clip_b16": CLIPConfig(vision_config={"patch_size": 16}),
        "mit_b0": SegformerConfig(),
        "mit_b2": SegformerConfig(hidden_sizes=[64, 128, 320, 512], depths=[3, 4, 6, 3]),
    }
    for name, stored in configs.items():
        folder = tmp_path / name
        stored.save_pretrained(folder)
        assert backbone_of(str(folder)) == name
    for name, spec in BACKBONES.items():
        if spec.weights:
            assert backbone_of(spec.weights) == name
    assert backbone_of("somewhere/mit_b3.pth") == "mit_b3"
    assert backbone_of("someone/something") is None
    for content in ("[]", "{", '{"model_type": "clip", "vision_config": {"hidden_size": []}}', '{"model_type": 3}'):
        (tmp_path / "config.json").write_text(content)
        assert backbone_of(str(tmp_path)) is None
    root = write_table(tmp_path / "pets", 10)
    assert choose(root, {"model.weights": str(tmp_path / "mit_b2")})[0].model.backbone == "mit_b2"


def test_the_cache_answers_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    asked: list[str] = []

    def refuse(url: str, **_: Any) -> None:
        asked.append(url)
        raise OSError("no network in tests")

    monkeypatch.setattr(defaults.huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(defaults.huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    assert not defaults.can_fetch("someone/something")
    assert len(asked) == 1
    monkeypatch.setattr(defaults.huggingface_hub, "try_to_load_from_cache", lambda *_: "config.json")
    assert defaults.can_fetch("someone/something")
    assert len(asked) == 1
