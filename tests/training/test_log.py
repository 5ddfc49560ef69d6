"""metrics.jsonl: appended line by line, mended after a kill, valid JSON whatever the losses are."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from afa.runs.run import Run
from afa.training import log as metrics_module
from afa.training.log import MetricsLog


def line(step: int, kind: str = "train", **values: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, **values}


def steps(path: Path) -> list[int]:
    return [json.loads(text)["step"] for text in path.read_text().splitlines()]


def test_lines_are_appended_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0, tensorboard=False)
    written = [line(1, loss=0.5, seg_loss=None), line(2, kind="eval", miou=12.5)]
    for number, one in enumerate(written, start=1):
        log.write(one)
        assert Run(tmp_path).metrics() == written[:number]
    log.close()


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind": "train", "step": 3}', "\0\0\0\0", "[1]", '"text"'])
def test_a_torn_last_line_is_dropped_when_a_run_resumes(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line(step)) + "\n" for step in (1, 2)) + torn)
    log = MetricsLog(tmp_path, resume_step=2, tensorboard=False)
    assert steps(path) == [1, 2]
    log.write(line(3))
    log.write(line(4))
    assert steps(path) == [1, 2, 3, 4]


def test_lines_after_the_resumed_step_are_dropped_to_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line(step, kind)) + "\n" for step in (1, 2, 3, 4) for kind in ("train", "eval")))
    MetricsLog(tmp_path, resume_step=2, tensorboard=False)
    assert steps(path) == [1, 1, 2, 2]


def test_a_fresh_run_starts_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line(7)) + "\n")
    MetricsLog(tmp_path, resume_step=0, tensorboard=False)
    assert path.read_text() == ""
    assert Run(tmp_path / "absent").metrics() == []


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0, tensorboard=False)
    log.write(line(1, loss=float("nan"), cls_loss=float("inf"), learning_rate=0.5))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse) == line(
        1, loss=None, cls_loss=None, learning_rate=0.5
    )


class Writer:
    """What TensorBoard's writer is called with."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(str(tmp_path / "tensorboard"))
    monkeypatch.setattr(metrics_module, "_tensorboard_writer", lambda folder: writer)
    log = MetricsLog(tmp_path, resume_step=0, tensorboard=True)
    log.write(line(3, phase="cls", loss=0.5, seg_loss=None, aff_loss=float("nan")))
    log.write(line(4, kind="eval", labels="seg", miou=60.0))
    log.close()
    assert writer.scalars == [("train/loss", 0.5, 3), ("eval/seg_miou", 60.0, 4)]
    assert writer.closed


def test_without_tensorboard_only_the_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = MetricsLog(tmp_path, resume_step=0, tensorboard=True)
    log.write(line(1, loss=0.5))
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
