"""The loop: what a run folder holds, what it refuses, how it stops, and that no NaN reaches the weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from afa.config import config_to_toml, load_config
from afa.data.dataset import TaggedImages
from afa.data.open import open_data
from afa.runs.run import Run
from afa.runtime import interrupts
from afa.training import engine as engine_module
from afa.training import loop as loop_module
from afa.training.schedule import learning_rate
from afa.training.step import StepLosses, compute_losses
from mistakes import refused
from tiny import NO_DROPOUT, assert_same_weights, final_weights, tiny_config, train_tiny


def around_each_step(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Any], Any]) -> None:
    """Hand `change` the number of each step (from 0) and its forward function, and use the one that it returns."""
    count = -1

    def changed(forward: Any, *arguments: Any, **settings: Any) -> StepLosses:
        nonlocal count
        count += 1
        return compute_losses(change(count, forward), *arguments, **settings)

    monkeypatch.setattr(loop_module, "compute_losses", changed)


# --- What a run leaves ---


def test_run_folder_of_training(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, {"train.eval_steps": 2, "train.eval_images": 3, "loss.energy_weight": 10})
    result = train_tiny(config, tmp_path / "deep" / "run")
    run = tmp_path / "deep" / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.toml", "classes.txt", "metrics.jsonl", "checkpoints", "model.safetensors", "environment.json"
    }  # fmt: skip
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_00000004", "step_00000006", "latest"}
    assert load_config(run / "config.toml") == config
    assert (run / "classes.txt").read_text() == (tiny_data / "classes.txt").read_text()
    assert result.classes == tuple((tiny_data / "classes.txt").read_text().split())
    assert not result.network.training
    state = result.network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in final_weights(run).items())

    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    assert [line["phase"] for line in trained] == ["cls", "cls", "initial", "initial", "refined", "refined"]
    loss_weights = (config.loss.segmentation_weight, config.loss.affinity_weight, config.loss.energy_weight)
    for line in trained:
        assert line.keys() == {
            "kind", "step", "phase", "loss", "cls_loss", "seg_loss", "aff_loss", "reg_loss", "learning_rate",
            "images_per_second", "seconds",
        }  # fmt: skip
        parts = (
            weight * (line[key] or 0)
            for weight, key in zip(loss_weights, ("seg_loss", "aff_loss", "reg_loss"), strict=True)
        )
        assert line["loss"] == pytest.approx(line["cls_loss"] + sum(parts))
        for key in ("seg_loss", "aff_loss", "reg_loss"):
            assert (line[key] is None) == (line["phase"] == "cls"), key
        assert line["images_per_second"] > 0
    assert [line["learning_rate"] for line in trained] == [learning_rate(step, config.schedule) for step in range(6)]
    seconds = [line["seconds"] for line in trained]
    assert seconds == sorted(seconds)
    assert result.seconds >= seconds[-1]

    # Every second step but the last, which is evaluated as a whole afterwards; before the clock goes on.
    evaluated = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evaluated] == [2, 4]
    assert [line["kind"] for line in lines[2:4]] == ["eval", "train"]
    for line in evaluated:
        assert line.keys() == {"kind", "step", "labels", "protocol", "miou", "num_images", "seconds"}
        assert (line["labels"], line["protocol"], line["num_images"]) == ("seg", "single", 3)


def test_logged_losses_are_means_since_the_last_line(tiny_data: Path, tmp_path: Path) -> None:
    for log_steps in (1, 2):
        train_tiny(tiny_config(tiny_data, {"train.log_steps": log_steps}), tmp_path / str(log_steps))
    single, double = (Run(tmp_path / str(steps)).metrics() for steps in (1, 2))
    assert [line["step"] for line in double] == [2, 4, 6]
    for key in ("cls_loss", "seg_loss", "aff_loss"):
        pairs = [(single[i][key], single[i + 1][key]) for i in (0, 2, 4)]
        means = [None if pair[0] is None else pytest.approx(sum(pair) / 2) for pair in pairs]
        assert [line[key] for line in double] == means
    assert_same_weights(tmp_path / "1", tmp_path / "2")


def test_the_seed_is_what_makes_runs_differ(tiny_data: Path, tmp_path: Path) -> None:
    keys = {"schedule.max_steps": 1}
    torch.rand(7)  # whatever was drawn before
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_tiny(tiny_config(tiny_data, keys | {"train.seed": seed}), tmp_path / name)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    a, c = final_weights(tmp_path / "a"), final_weights(tmp_path / "c")
    assert not torch.equal(a["classifier.weight"], c["classifier.weight"])


@pytest.mark.parametrize("loss", [0.5, 0.3])
def test_an_affinity_that_has_learnt_nothing_is_told_once(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loss: float
) -> None:
    def constant(affinity: Tensor, *_: Any, **__: Any) -> Tensor:
        return 0 * affinity.sum() + loss

    monkeypatch.setattr("afa.training.step.affinity_loss", constant)
    train_tiny(tiny_config(tiny_data), tmp_path / "run")
    told = [line for line in capsys.readouterr().err.splitlines() if "the affinity has learnt nothing" in line]
    assert len(told) == (1 if loss == 0.5 else 0)
    assert all("step 5:" in line and "loss 0.50" in line and "another --train.seed" in line for line in told)


def test_evaluation_on_the_way_changes_nothing(tiny_data: Path, tmp_path: Path) -> None:
    train_tiny(tiny_config(tiny_data), tmp_path / "without")
    train_tiny(tiny_config(tiny_data, {"train.eval_steps": 1, "train.eval_images": 2}), tmp_path / "with")
    assert_same_weights(tmp_path / "without", tmp_path / "with")


# --- What it refuses ---


def test_an_existing_run_is_not_overwritten(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_tiny(tiny_config(tiny_data), run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with refused(f"{run}: ", "--resume", "--out"):
        train_tiny(tiny_config(tiny_data), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schedule.max_steps", 8),
        ("schedule.refined_steps", 4),
        ("schedule.learning_rate", 0.5),
        ("schedule.batch_size", 8),
        ("train.seed", 3),
        ("train.precision", "bf16"),
        ("augment.flip_probability", 0.25),
        ("pseudo.iterations", 3),
        ("model.decoder_width", 8),
        ("data.train_list", "lists/val.txt"),
    ],
)
def test_resuming_with_other_settings_names_the_key(tiny_data: Path, tmp_path: Path, key: str, value: Any) -> None:
    config = tiny_config(tiny_data)
    section, name = key.split(".")
    old = getattr(getattr(config, section), name)
    (tmp_path / "config.toml").write_text(config_to_toml(config))
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    with refused(f"{tmp_path}: ", f"{key} = {old}, not {value}; resume", "--out"):
        train_tiny(tiny_config(tiny_data, {key: value}), tmp_path, resume=True)


def test_what_ended_before_its_first_step_is_started_anew(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(config_to_toml(tiny_config(tiny_data, {"schedule.batch_size": 3})))
    (tmp_path / "metrics.jsonl").write_text("")
    train_tiny(tiny_config(tiny_data, {"schedule.max_steps": 1}), tmp_path)
    with refused(f"{tmp_path}: holds a run already"):
        train_tiny(tiny_config(tiny_data, {"schedule.max_steps": 1}), tmp_path)


def test_resuming_elsewhere_and_with_other_logging_is_fine(tiny_data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_data, moved)
    train_tiny(tiny_config(tiny_data), tmp_path / "run")
    keys = {"data.workers": 1, "train.log_steps": 5, "train.save_steps": 4, "train.eval_images": 7}
    train_tiny(tiny_config(moved, keys), tmp_path / "run", resume=True)
    assert load_config(tmp_path / "run" / "config.toml").data.root == str(moved)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line_and_the_run_can_go_on(tiny_data: Path, tmp_path: Path, workers: int) -> None:
    root, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_data, root)
    config = tiny_config(root, {"data.workers": workers, "schedule.max_steps": 4, "train.save_steps": 1})
    # Not in the first batches, so that there is something to go on from.
    batches = loop_module.train_batches(open_data(config.data).train(), config)
    name = list(batches)[3].names[0]
    path = next((root / "JPEGImages").glob(f"{name}.*"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with refused(path):
        train_tiny(config, run)
    assert (Run(run).latest_checkpoint() or run).name == "step_00000003"
    path.write_bytes(whole)
    train_tiny(config, run, resume=True)
    train_tiny(config, tmp_path / "straight")
    assert_same_weights(run, tmp_path / "straight")


def test_images_that_can_reach_masks_never_enter_training(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TaggedImages] = []
    make = loop_module.train_batches

    def recorded(images: TaggedImages, *arguments: Any, **settings: Any) -> Any:
        seen.append(images)
        return make(images, *arguments, **settings)

    monkeypatch.setattr(loop_module, "train_batches", recorded)
    train_tiny(tiny_config(tiny_data, {"schedule.max_steps": 1}), tmp_path)
    assert [type(images) for images in seen] == [TaggedImages]
    assert not any("mask" in name for name in dir(seen[0]))


# --- How it stops ---


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    def change(now: int, forward: Any) -> Any:
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)
        return forward

    around_each_step(monkeypatch, change)


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    config = tiny_config(tiny_data, {"data.workers": workers, "train.save_steps": 100})
    train_tiny(config, tmp_path / "straight")
    run = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with refused("step 3 of 6; ", "--resume"):
            train_tiny(config, run)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (Run(run).latest_checkpoint() or run).name == "step_00000003"
    assert not (run / "model.safetensors").exists()
    train_tiny(config, run, resume=True)
    assert_same_weights(run, tmp_path / "straight")
    assert [line["step"] for line in Run(run).metrics()] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Python's own handler: a shell starts what it runs in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_the_second_ctrl_c_interrupts_at_once() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with interrupts() as asked_to_stop:
        assert not asked_to_stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked_to_stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


# --- Not finite ---


def spoil(kind: str, forward: Any) -> Any:
    """A forward pass that gives NaN: in its logits alone, or from the pixels on, through every batch statistic."""

    def spoiled(image: Tensor, segmentation: bool, affinity: bool) -> Any:
        if kind == "pixels":
            image = image * float("nan")
        output = forward(image, segmentation, affinity)
        output.image_logits.mul_(float("nan"))
        return output

    return spoiled


@pytest.mark.parametrize(
    ("kind", "bad_step", "grad_clip"), [("logits", 0, 0.0), ("logits", 3, 1.0), ("pixels", 3, 0.0)]
)
def test_a_step_that_is_not_finite_leaves_no_trace(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bad_step: int, grad_clip: float
) -> None:
    snapshots: list[dict[str, Tensor]] = []

    def change(step: int, forward: Any) -> Any:
        network = forward.__self__.network
        snapshots.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return spoil(kind, forward) if step == bad_step else forward

    around_each_step(monkeypatch, change)
    train_tiny(tiny_config(tiny_data, NO_DROPOUT | {"schedule.grad_clip": grad_clip}), tmp_path)
    for name, before in snapshots[bad_step].items():
        assert torch.equal(before, snapshots[bad_step + 1][name]), name
    changed = [name for name, before in snapshots[bad_step + 1].items() if not torch.equal(before, snapshots[-1][name])]
    assert len(changed) > 10  # and the run went on
    assert all(tensor.isfinite().all() for tensor in final_weights(tmp_path).values())
    lines = Run(tmp_path).metrics()
    assert [line["step"] for line in lines if line["cls_loss"] is None] == [bad_step + 1]


def test_a_run_that_stays_not_finite_gives_up(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_module.MAX_SKIPPED_STEPS == 50
    monkeypatch.setattr(engine_module, "MAX_SKIPPED_STEPS", 2)
    # One bad step, two in a row, then three: only the last is one too many.
    around_each_step(
        monkeypatch, lambda step, forward: spoil("logits", forward) if step in (1, 3, 4, 6, 7, 8) else forward
    )
    steps = {"schedule.max_steps": 12, "schedule.cls_steps": 12, "schedule.refined_steps": 12}
    config = tiny_config(tiny_data, steps)
    with refused("last 3 steps up to step 8 ", "lower schedule.learning_rate", "--precision fp32"):
        train_tiny(config, tmp_path)
    checkpoint = Run(tmp_path).latest_checkpoint()
    assert checkpoint is not None
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in final_weights(tmp_path).values())


def test_half_precision_trains(tiny_data: Path, tmp_path: Path) -> None:
    keys = {"schedule.max_steps": 2, "schedule.cls_steps": 1, "schedule.refined_steps": 1}
    train_tiny(tiny_config(tiny_data, keys | {"train.precision": "fp16"}), tmp_path / "fp16")
    train_tiny(tiny_config(tiny_data, keys), tmp_path / "fp32")
    half, full = (Run(tmp_path / name).metrics() for name in ("fp16", "fp32"))
    assert [line["phase"] for line in half] == ["cls", "initial"]
    # The first step, before any update, is the same loss but for rounding.
    assert half[0]["cls_loss"] == pytest.approx(full[0]["cls_loss"], rel=0.05)
    assert half[0]["cls_loss"] != full[0]["cls_loss"]
    weights = final_weights(tmp_path / "fp16")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values() if tensor.is_floating_point())
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_gray_images_of_one_color_train(tmp_path: Path) -> None:
    """No structure at all: every image the same gray, so CAMs, kernels and walks divide by next to nothing."""
    for folder in ("JPEGImages", "lists"):
        (tmp_path / folder).mkdir()
    for name in "abcd":
        Image.new("RGB", (40, 40), (128, 128, 128)).save(tmp_path / "JPEGImages" / f"{name}.png")
    (tmp_path / "lists" / "train.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "lists" / "tags.csv").write_text("image,tags\na,cat\nb,dog\nc,cat\nd,cat dog\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    config = tiny_config(tmp_path, {"data.val_list": "", "augment.scale_min": 0.1, "augment.scale_max": 3.0})
    train_tiny(config, tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in final_weights(tmp_path / "run").values())
    lines = Run(tmp_path / "run").metrics()
    assert all(line["loss"] is not None for line in lines)
