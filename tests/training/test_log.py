"""metrics.jsonl: appended line by line, mended after a kill, valid JSON whatever the losses are."""

import json
from pathlib import Path
from typing import Any

import pytest

from afa.runs.run import Run
from afa.training.log import MetricsLog


def line(step: int, kind: str = "train", **values: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, **values}


def steps(path: Path) -> list[int]:
    return [json.loads(text)["step"] for text in path.read_text().splitlines()]


def test_lines_are_appended_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0)
    written = [line(1, loss=0.5, seg_loss=None), line(2, kind="eval", miou=12.5)]
    for number, one in enumerate(written, start=1):
        log.write(one)
        assert Run(tmp_path).metrics() == written[:number]
    log.close()


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind": "train", "step": 3}', "\0\0\0\0", "[1]", '"text"'])
def test_a_torn_last_line_is_dropped_when_a_run_resumes(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line(step)) + "\n" for step in (1, 2)) + torn)
    log = MetricsLog(tmp_path, resume_step=2)
    assert steps(path) == [1, 2]
    log.write(line(3))
    log.write(line(4))
    assert steps(path) == [1, 2, 3, 4]


def test_lines_after_the_resumed_step_are_dropped_to_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line(step, kind)) + "\n" for step in (1, 2, 3, 4) for kind in ("train", "eval")))
    MetricsLog(tmp_path, resume_step=2)
    assert steps(path) == [1, 1, 2, 2]


def test_a_fresh_run_starts_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line(7)) + "\n")
    MetricsLog(tmp_path, resume_step=0)
    assert path.read_text() == ""
    assert Run(tmp_path / "absent").metrics() == []


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0)
    log.write(line(1, loss=float("nan"), cls_loss=float("inf"), learning_rate=0.5))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse) == line(
        1, loss=None, cls_loss=None, learning_rate=0.5
    )
