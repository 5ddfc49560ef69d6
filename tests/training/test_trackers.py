"""TensorBoard and the trackers: what they are told, offline, through their own libraries where those are installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from afa.api import train_and_report
from afa.config import load_config
from afa.evaluation.scores import EvaluationResult
from afa.runs.run import Run
from afa.training import trackers as trackers_module
from afa.training.log import MetricsLog
from afa.training.trackers import Trackers, check_trackers
from mistakes import refused
from tiny import tiny_config, train_tiny


def config_of(*names: str, tensorboard: bool = False) -> Any:
    return load_config(None, {"train.trackers": names, "train.tensorboard": tensorboard})


def opened(run: Path, *names: str, step: int = 0, tensorboard: bool = False) -> MetricsLog:
    trackers = Trackers(Run(run), config_of(*names, tensorboard=tensorboard), resumed=step > 0)
    return MetricsLog(run, resume_step=step, trackers=trackers)


def tell(log: MetricsLog, sheet: Path, *steps: int) -> None:
    """Losses of some steps, and an evaluation with a sheet of examples at the last."""
    for step in steps:
        log.write({"kind": "train", "step": step, "phase": "cls", "loss": 1.0 / step, "seg_loss": None})
    log.write({"kind": "eval", "step": step, "labels": "seg", "protocol": "single", "miou": 50.0})
    log.show(step, sheet=sheet)


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    path = tmp_path / "sheet.png"
    Image.fromarray(np.full((8, 12, 3), 90, np.uint8)).save(path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@contextlib.contextmanager
def installed(name: str) -> Iterator[None]:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    yield


def test_tensorboard_gets_figures_pictures_and_curves_of_the_tags(run: Path, sheet: Path) -> None:
    with installed("tensorboard"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    matrix = np.zeros((3, 3), np.int64)
    tags = np.array([[3.0, -1.0], [-2.0, -2.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 0.0], [1.0, -1.0]])
    per_class = dict.fromkeys(("background", "cat", "dog"), 50.0)
    result = EvaluationResult(50.0, dict(per_class), "single", "seg", 3, 1.0, matrix, tags=tags)
    with opened(run, tensorboard=True) as log:
        tell(log, sheet, 1, 2)
        log.show(2, result=result)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    found = events.Tags()
    assert set(found["scalars"]) == {"train/loss", "eval/seg_miou"}
    assert [(each.step, each.value) for each in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert found["images"] == ["examples"]
    # Of a class that no image is tagged with, there is nothing to draw.
    assert [name for name in found["tensors"] if name.startswith("tags/")] == ["tags/all classes", "tags/cat"]


def test_without_tensorboard_only_the_file_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with opened(run, tensorboard=True) as log:
        log.write({"kind": "train", "step": 1, "loss": 0.5})
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_a_missing_library_is_told_before_anything_is_done(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers_module, "find_spec", lambda name: None)
    with refused("train.trackers names trackio", "pip install trackio, or leave it out"):
        train_and_report(tiny_config(tiny_data, {"train.trackers": ["trackio"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_name_of_a_library_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with refused("train.trackers names a_tracker, which is not installed; pip install a_tracker"):
        check_trackers(["a_tracker"])


def test_unknown_tracker_is_refused() -> None:
    with refused("train.trackers", "comet", "wandb"):
        config_of("comet")


class Broken:
    """A tracker whose network is gone from the second call on."""

    ended: ClassVar[list[bool]] = []

    def __init__(self, run: Run, config: dict[str, Any], resumed: str) -> None:
        self.id = resumed or "new"
        self.calls = 0

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("no route to host\nmany more lines")

    def close(self, *, failed: bool) -> None:
        self.ended.append(failed)


def test_a_tracker_that_fails_is_warned_of_once_and_training_goes_on(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers_module._OPENERS, "wandb", Broken)
    monkeypatch.setattr(trackers_module, "find_spec", lambda name: ModuleSpec(name, None, origin=name))
    result = train_tiny(
        tiny_config(tiny_data, {"train.trackers": ["wandb"], "schedule.max_steps": 4}), tmp_path / "run"
    )
    assert result.log is not None
    result.log.close()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert warnings == [
        "warning: wandb gets no more figures (no route to host); the training goes on without it"
    ]  # fmt: skip
    assert len(Run(tmp_path / "run").metrics()) == 4
    assert Run(tmp_path / "run").tracker_ids() == {"wandb": "new"}


def test_a_tracker_that_does_not_start_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("not logged in\nTraceback")

    monkeypatch.setitem(trackers_module._OPENERS, "mlflow", Broken)
    monkeypatch.setitem(trackers_module._OPENERS, "wandb", refuse)
    monkeypatch.setattr(Broken, "ended", [])
    monkeypatch.setattr(trackers_module, "find_spec", lambda name: ModuleSpec(name, None, origin=name))
    with refused("wandb does not start (not logged in); mend that, or leave it out of train.trackers"):
        opened(run, "mlflow", "wandb")
    assert Broken.ended == [True]


@pytest.mark.filterwarnings("default")
def test_mlflow_goes_on_with_its_run(run: Path, sheet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed("mlflow"):
        import mlflow
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with opened(run, "mlflow") as log:
        tell(log, sheet, 1, 2)
    first = Run(run).tracker_ids()
    with opened(run, "mlflow", step=2) as log:
        tell(log, sheet, 3)
    client = mlflow.MlflowClient()
    (experiment,) = [each for each in client.search_experiments() if each.name == "afa"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert {"mlflow": found.info.run_id} == first == Run(run).tracker_ids()
    assert found.info.status == "FINISHED"
    assert [each.step for each in client.get_metric_history(found.info.run_id, "train/loss")] == [1, 2, 3]
    assert found.data.params["pseudo.affinity_radius"] == "8"
    assert [each.path for each in client.list_artifacts(found.info.run_id, "examples")] == [
        "examples/00000002.png", "examples/00000003.png"
    ]  # fmt: skip


@pytest.mark.filterwarnings("default")
def test_trackio_goes_on_with_its_run(run: Path, sheet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the library is imported
    with installed("trackio"):
        from trackio import context_vars
        from trackio.sqlite_storage import SQLiteStorage
    with opened(run, "trackio") as log:
        tell(log, sheet, 1, 2)
    context_vars.current_run.set(None)
    with opened(run, "trackio", step=2) as log:
        tell(log, sheet, 3)
    name = Run(run).tracker_ids()["trackio"]
    assert [each for each in SQLiteStorage.get_runs("afa") if each == name] == [name]
    losses = [each["train/loss"] for each in SQLiteStorage.get_logs("afa", name) if "train/loss" in each]
    assert losses == [1.0, 0.5, pytest.approx(1 / 3)]


@pytest.mark.filterwarnings("default")
def test_wandb_goes_on_with_its_run(run: Path, sheet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed("wandb"):
        import wandb
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with opened(run, "wandb") as log:
        tell(log, sheet, 1, 2)
    with opened(run, "wandb", step=2) as log:
        tell(log, sheet, 3)
    name = Run(run).tracker_ids()["wandb"]
    files = sorted((run / "wandb").glob("offline-run-*"))
    assert len(files) == 2
    assert all(each.name.endswith(f"-{name}") for each in files)
    assert list(files[0].rglob("examples*.png"))
    assert wandb.run is None
