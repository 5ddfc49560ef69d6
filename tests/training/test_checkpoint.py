"""Checkpoints: whole or not at all, whatever happens while they are written; and what broken ones answer."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from afa.errors import AfaError
from afa.runs.run import Run
from afa.training import checkpoint as checkpoint_module
from afa.training.checkpoint import (
    load_checkpoint,
    save_checkpoint,
    save_weights,
)
from mistakes import refused


def network_of(value: float) -> nn.Module:
    network = nn.Linear(50, 50)
    nn.init.constant_(network.weight, value)
    nn.init.constant_(network.bias, value)
    return network


def save(run: Path, step: int) -> Path:
    """Save a checkpoint whose weights all are its step, with a state larger than the weights."""
    state = {"optimizer": {"state": torch.full((10_000,), float(step))}, "scaler": {}, "seconds": 1.5}
    return save_checkpoint(run, step=step, network=network_of(step), state=state)


def assert_good(folder: Path | None, step: int) -> None:
    assert folder is not None
    assert folder.name == f"step_{step:08d}"
    network = network_of(-1.0)
    state = load_checkpoint(folder, network)
    assert state["step"] == step
    assert (state["optimizer"]["state"] == step).all()
    assert all((parameter == step).all() for parameter in network.parameters())


def entries(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_round_trip(tmp_path: Path) -> None:
    folder = save(tmp_path, 500)
    assert folder == tmp_path / "checkpoints" / "step_00000500"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "training_state.pt"}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000500\n"
    assert Run(tmp_path).latest_checkpoint() == folder
    assert Run(tmp_path).newest_weights() == folder / "model.safetensors"
    assert_good(folder, 500)
    state = torch.load(folder / "training_state.pt", weights_only=True)
    assert state.keys() == {"optimizer", "scaler", "seconds", "step"}


def test_the_last_two_are_kept_and_nothing_else(tmp_path: Path) -> None:
    for step in (5, 90, 100, 20_000):
        save(tmp_path, step)
    assert entries(tmp_path) == {"step_00000100", "step_00020000", "latest"}
    assert_good(Run(tmp_path).latest_checkpoint(), 20_000)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000005" / "junk").touch()
    save(tmp_path, 5)
    assert_good(Run(tmp_path).latest_checkpoint(), 5)
    assert not (tmp_path / "checkpoints" / "step_00000005" / "junk").exists()


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert Run(tmp_path).latest_checkpoint() is None


@pytest.mark.parametrize("missing", ["model.safetensors", "training_state.pt", "step_00000020"])
def test_what_is_not_complete_is_no_checkpoint(tmp_path: Path, missing: str) -> None:
    save(tmp_path, 10)
    folder = save(tmp_path, 20)
    if missing == folder.name:
        folder.rename(folder.with_name(".partial_00000020"))
    else:
        (folder / missing).unlink()
    assert_good(Run(tmp_path).latest_checkpoint(), 10)
    # The next save clears what a killed one left behind.
    save(tmp_path, 30)
    assert not any(name.startswith(".partial") for name in entries(tmp_path))


# --- A disk that refuses ---


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing_writer(*_: Any, **__: Any) -> None:
    raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed\nframe #0: ...")


def silent_failure(*_: Any, **__: Any) -> None:
    raise OSError


@pytest.mark.parametrize(
    ("name", "failure", "reason"),
    [
        ("torch.save", full_disk, "No space left on device"),
        ("torch.save", failing_writer, "file write failed"),
        ("torch.save", silent_failure, "OSError"),
        ("save_file", full_disk, "No space left on device"),
        ("_sync", full_disk, "No space left on device"),
    ],
)
@pytest.mark.parametrize("earlier", [(), (10,), (10, 20)])
def test_last_good_checkpoint_survives_a_failed_write(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    failure: Callable[..., None],
    reason: str,
    earlier: tuple[int, ...],
) -> None:
    for step in earlier:
        save(tmp_path, step)
    before = entries(tmp_path) if earlier else set()
    target = (torch, "save") if name == "torch.save" else (checkpoint_module, name)
    monkeypatch.setattr(*target, failure)
    with pytest.raises(AfaError) as caught:
        save(tmp_path, 30)
    message = str(caught.value)
    good = f"the last good one is step_{earlier[-1]:08d}" if earlier else "there is none yet"
    assert "step_00000030: cannot write" in message
    assert reason in message
    assert message.endswith(f"{good}; free space, then --resume")
    assert "\n" not in message
    assert entries(tmp_path) == before
    monkeypatch.undo()
    if earlier:
        assert_good(Run(tmp_path).latest_checkpoint(), earlier[-1])
    save(tmp_path, 30)
    assert_good(Run(tmp_path).latest_checkpoint(), 30)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let the system refuse to write files beyond a size, as it refuses on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # Python's default: writes fail with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The weights take 10,200 bytes, the training state 40,000.
@pytest.mark.parametrize("num_bytes", [4_000, 20_000], ids=["in the weights", "in the training state"])
def test_last_good_checkpoint_survives_a_real_failed_write(tmp_path: Path, num_bytes: int) -> None:
    save(tmp_path, 10)
    with largest_file(num_bytes), pytest.raises(AfaError, match=r"cannot write .*step_00000010"):
        save(tmp_path, 20)
    assert entries(tmp_path) == {"step_00000010", "latest"}
    assert_good(Run(tmp_path).latest_checkpoint(), 10)


def test_final_weights_survive_a_real_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(path, network_of(1.0))
    good = path.read_bytes()
    with largest_file(4_000), pytest.raises(AfaError, match=r"model\.safetensors: cannot .*--resume"):
        save_weights(path, network_of(2.0))
    assert path.read_bytes() == good
    assert list(tmp_path.iterdir()) == [path]
    save_weights(path, network_of(2.0))
    assert path.read_bytes() != good


# --- A kill at any moment ---


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it, so no cleaning up happens."""


WRITES = {
    (checkpoint_module, "save_file"),
    (checkpoint_module, "write_whole"),
    (checkpoint_module, "_sync"),
    (torch, "save"),
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "replace"),
    (shutil, "rmtree"),
}


def test_a_kill_between_any_two_writes_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill before each write of a checkpoint in turn; each time the old or the new one is whole, and saving goes on."""
    outcomes = []
    for moment in range(100):
        run = tmp_path / str(moment)
        save(run, 10)
        save(run, 20)
        count = 0
        with monkeypatch.context() as patch:
            for owner, name in WRITES:
                original = getattr(owner, name)

                def counted(*arguments: Any, original: Any = original, moment: int = moment, **settings: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count > moment:
                        raise Killed
                    return original(*arguments, **settings)

                patch.setattr(owner, name, counted)
            try:
                save(run, 30)
            except Killed:
                outcomes.append(int((Run(run).latest_checkpoint() or run).name.removeprefix("step_")))
                assert_good(Run(run).latest_checkpoint(), outcomes[-1])
            else:
                break
        # What a resumed run does next.
        save(run, 30)
        assert_good(Run(run).latest_checkpoint(), 30)
        assert len(entries(run)) == 3
    assert {20, 30} == set(outcomes)
    assert outcomes == sorted(outcomes)
    assert len(outcomes) > 8


# --- Broken files ---


def test_broken_training_state_is_one_line(tmp_path: Path) -> None:
    save(tmp_path, 10)
    folder = save(tmp_path, 20)
    path = folder / "training_state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with refused(f"{path}: broken", "delete step_00000020"):
        load_checkpoint(folder, network_of(0.0))
    shutil.rmtree(folder)
    assert_good(Run(tmp_path).latest_checkpoint(), 10)


def test_training_state_of_something_else_is_one_line(tmp_path: Path) -> None:
    folder = save(tmp_path, 20)
    torch.save([1, 2], folder / "training_state.pt")
    with pytest.raises(AfaError, match=r"training_state\.pt: .*step_00000020"):
        load_checkpoint(folder, network_of(0.0))


class Pickled:
    """Something that only an unsafe load would bring back."""


def test_training_state_cannot_run_code(tmp_path: Path) -> None:
    folder = save(tmp_path, 20)
    torch.save({"step": 20, "optimizer": Pickled()}, folder / "training_state.pt")
    with refused("broken training state", "delete step_00000020") as caught:
        load_checkpoint(folder, network_of(0.0))
    assert "weights_only" not in str(caught.value)


def test_weights_of_another_network_are_one_line(tmp_path: Path) -> None:
    folder = save(tmp_path, 20)
    with pytest.raises(AfaError, match=r"model\.safetensors: 'bias' .*\(50,\)"):
        load_checkpoint(folder, nn.Linear(50, 49))
