"""A run that was stopped, anywhere and any way, ends with the weights of one that was not, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from afa.config import Config
from afa.errors import AfaError
from afa.runs.run import Run
from afa.training import loop as loop_module
from afa.training.checkpoint import load_checkpoint
from tiny import assert_same_weights, final_weights, start_python, tiny_config, tiny_flags, train_tiny

DROPOUT = {"model.drop_path": 0.3, "model.decoder_dropout": 0.2}
EVERY_STEP = {"train.save_steps": 1}


class Crash(BaseException):
    """Ends a run at once, like a kill: nothing in the package catches it."""


def run_until_saved(monkeypatch: pytest.MonkeyPatch, config: Config, run: Path, *, step: int, resume: bool) -> None:
    """Train until the checkpoint of `step` is written, and crash."""
    save = loop_module.save_checkpoint

    def save_and_crash(*arguments: Any, **settings: Any) -> Path:
        folder = save(*arguments, **settings)
        if settings["step"] == step:
            raise Crash
        return folder

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "save_checkpoint", save_and_crash)
        with pytest.raises(Crash):
            train_tiny(config, run, resume=resume)


@pytest.fixture(scope="module")
def straight(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    run = tmp_path_factory.mktemp("straight")
    train_tiny(tiny_config(tiny_data, DROPOUT | EVERY_STEP), run)
    return run


@pytest.mark.parametrize("workers", [0, 1])
def test_stopping_after_every_single_step_changes_nothing(
    tiny_data: Path, tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    config = tiny_config(tiny_data, DROPOUT | EVERY_STEP | {"data.workers": workers})
    for step in range(1, 6):
        torch.rand(step)  # no random state of the process leaks in
        run_until_saved(monkeypatch, config, tmp_path, step=step, resume=step > 1)
    result = train_tiny(config, tmp_path, resume=True)
    assert_same_weights(tmp_path, straight)
    lines, others = Run(tmp_path).metrics(), Run(straight).metrics()
    timed = ("seconds", "images_per_second")
    assert [{key: line[key] for key in line if key not in timed} for line in lines] == [
        {key: line[key] for key in line if key not in timed} for line in others
    ]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert result.seconds >= seconds[-1]


def test_two_steps_and_two_steps_are_four(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the checkpoint and the crash more steps were done, which are done again."""
    config = tiny_config(tiny_data, DROPOUT | {"schedule.max_steps": 4, "train.save_steps": 2})
    train_tiny(config, tmp_path / "straight")
    steps = []
    compute = loop_module.compute_losses

    def counted(*arguments: Any, **settings: Any) -> Any:
        steps.append(settings["phase"].name)
        if len(steps) == 4:
            raise Crash
        return compute(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "compute_losses", counted)
        with pytest.raises(Crash):
            train_tiny(config, tmp_path / "run")
        assert (Run(tmp_path / "run").latest_checkpoint() or tmp_path).name == "step_00000002"
        train_tiny(config, tmp_path / "run", resume=True)
    assert steps == ["cls", "cls", "initial", "initial", "initial", "initial"]
    assert_same_weights(tmp_path / "run", tmp_path / "straight")


def test_resuming_what_is_finished_or_not_begun(
    tiny_data: Path, tmp_path: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tiny_data, DROPOUT | EVERY_STEP)
    run = tmp_path / "run"
    train_tiny(config, run, resume=True)
    told = f"{run}: has no checkpoint to resume; the training starts with its first step\n"
    assert capsys.readouterr().err.startswith(told)
    assert_same_weights(run, straight)
    log = (run / "metrics.jsonl").read_bytes()
    train_tiny(config, run, resume=True)
    assert_same_weights(run, straight)
    assert (run / "metrics.jsonl").read_bytes() == log


def test_resuming_from_the_checkpoint_before_a_broken_one(tiny_data: Path, tmp_path: Path, straight: Path) -> None:
    config = tiny_config(tiny_data, DROPOUT | EVERY_STEP)
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "checkpoints" / "step_00000006" / "training_state.pt").write_bytes(b"torn")
    with pytest.raises(AfaError, match=r"step_00000006/tr.*: broken .*before$"):
        train_tiny(config, run, resume=True)
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    (run / "model.safetensors").unlink()
    train_tiny(config, run, resume=True)
    assert_same_weights(run, straight)


def test_a_checkpoint_of_another_network_is_one_line(tiny_data: Path, tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    config_path = run / "config.toml"
    config_path.write_text(config_path.read_text().replace("decoder_width = 16", "decoder_width = 8"))
    config = tiny_config(tiny_data, DROPOUT | EVERY_STEP | {"model.decoder_width": 8})
    with pytest.raises(AfaError, match=r"model\.safetensors: 'decoder\..*network"):
        train_tiny(config, run, resume=True)


def test_the_state_of_a_checkpoint_is_whole(straight: Path, tiny_data: Path) -> None:
    """The last checkpoint holds the final weights, the step and AdamW's moments, without any pickled code."""
    folder = Run(straight).latest_checkpoint()
    assert folder is not None
    network = train_network(tiny_data)
    state = load_checkpoint(folder, network)
    assert state["step"] == 6
    assert state["seconds"] > 0
    moments = state["optimizer"]["state"]
    assert {int(one["step"]) for one in moments.values()} == {6, 4}  # the decoder learns from the third step on
    weights = final_weights(straight)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def train_network(tiny_data: Path) -> torch.nn.Module:
    config = tiny_config(tiny_data, DROPOUT)
    num_classes = len((tiny_data / "classes.txt").read_text().split())
    return loop_module.build_network(config.model, num_classes)


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_weights(tiny_data: Path, tmp_path: Path) -> None:
    """SIGKILL at a random moment; what it left is resumed in this process."""
    keys = DROPOUT | EVERY_STEP | {"schedule.max_steps": 16}
    run = tmp_path / "run"
    latest = run / "checkpoints" / "latest"
    step, delay = random.randrange(1, 9), random.uniform(0, 0.08)
    print(f"killed {delay:.3f} s after step {step} was saved")  # shown when the test fails
    process = start_python(["-m", "afa", *tiny_flags(tiny_data, keys), "--out", str(run)])
    try:
        while not latest.exists() or latest.read_text() < f"step_{step:08d}":
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        time.sleep(delay)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "model.safetensors").exists()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4')  # a torn line, which only a rare moment leaves
    config = tiny_config(tiny_data, keys)
    train_tiny(config, run, resume=True)
    train_tiny(config, tmp_path / "straight")
    assert_same_weights(run, tmp_path / "straight")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 17))
