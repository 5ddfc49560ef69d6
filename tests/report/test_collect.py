"""What report.json says of a run."""

import json
import subprocess
from pathlib import Path

import pytest

from afa.report import collect
from afa.report.collect import collect_report
from afa.runs.run import Run
from mistakes import refused


def write_lines(run: Path, *lines: object) -> None:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text)


def test_finished_run_gives_every_key(full: Path) -> None:
    report = collect_report(full)
    expected = {"miou": 71.25, "cam_miou": 60.0, "propagated_miou": 65.0, "tag_f1": 88.0, "complete": True}
    expected |= {"seconds_train": 307.0, "steps": 40, "device": "cpu", "torch": "2.13.0", "run": "my<run>"}
    expected |= {"classes": ["cat", "dog & <b>"], "images_per_second": 40 * 8 / 307, "num_parameters": 700_000}
    assert {key: report[key] for key in expected} == expected
    assert report["config"]["schedule"]["max_steps"] == 40
    assert report["per_class"]["cam"]["cat"] == 60.0
    assert report["confusion"] == [[80, 15, 5], [10, 30, 0], [0, 0, 0]]
    assert [[each["image"] for each in report[side]] for side in ("worst", "best")] == [["<i>", "a"], ["a", "<i>"]]
    assert report["latest"]["step"] == 40
    json.dumps(report, allow_nan=False)


def test_what_a_bare_run_does_not_tell_is_none(bare: Path) -> None:
    report = collect_report(bare)
    keys = ("miou", "cam_miou", "propagated_miou", "tag_f1", "seconds_train", "steps", "device", "torch", "commit")
    assert {report[key] for key in (*keys, "images_per_second")} == {None}
    assert not report["complete"]


def test_killed_run_counts_as_far_as_its_log_reaches(bare: Path) -> None:
    write_lines(bare, {"kind": "train", "step": 10, "seconds": 5.0}, {"kind": "train", "step": 20, "seconds": 9.0})
    report = collect_report(bare)
    assert (report["steps"], report["seconds_train"], report["complete"]) == (20, 9.0, False)


def test_torn_and_repeated_lines(bare: Path) -> None:
    losses = [{"kind": "train", "step": step, "loss": loss} for step, loss in ((1, 3.0), (2, 9.0), (2, 2.0))]
    scores = [{"kind": "eval", "step": 2, "labels": kind, "miou": miou} for kind, miou in (("seg", 5.0), ("cam", 6.0))]
    torn = '{"kind": "train", "st{"kind": "train", "step": 3}'
    write_lines(bare, *losses[:2], torn, *scores, losses[2], '{"kind": "train", "step": 4, "loss": NaN}', torn[:9])
    lines = Run(bare).metrics()
    found = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    assert found == [(1, 3.0), (2, 2.0), (4, None)]
    assert [line["miou"] for line in lines if line["kind"] == "eval"] == [5.0, 6.0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "not valid JSON"),
        ("[1]", "holds list, not a JSON object"),
        ('{"miou": "x"}', "not what afa evaluate --json writes"),
        ('{"miou": 5, "per_class": {"cat": true}}', "not what afa evaluate --json writes"),
        ('{"confusion": [[1], [1, 2]]}', "not what afa evaluate --json writes"),
        ('{"images": [{"image": "a"}]}', "not what afa evaluate --json writes"),
        ('{"images": [7]}', "not what afa evaluate --json writes"),
        ('{"images": null}', "not what afa evaluate --json writes"),
        ('{"images": [{"image": "a", "iou": 3}]}', "not what afa evaluate --json writes"),
        ('{"confusion": 3}', "not what afa evaluate --json writes"),
        ('{"confusion": [3]}', "not what afa evaluate --json writes"),
        ('{"confusion": [[null]]}', "not what afa evaluate --json writes"),
        ('{"num_images": "all"}', "not what afa evaluate --json writes"),
        ('{"miou": 5, "per_class": 5}', "not what afa evaluate --json writes"),
    ],
)
def test_broken_evaluation_file(bare: Path, text: str, found: str) -> None:
    (bare / "evaluation").mkdir()
    (bare / "evaluation" / "cam.json").write_text(text)
    with refused(f"cam.json: {found}", "delete it"):
        collect_report(bare)


def test_commit_is_that_of_our_own_tree_only(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(collect.__file__).resolve().parents[1]

    def answer(top: Path) -> None:
        done = subprocess.CompletedProcess([], 0, stdout=f"{top}\nfeed\n")
        monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)

    answer(package.parents[1])
    assert collect.source_commit() == "feed"
    answer(package.parents[2])
    assert collect.source_commit() is None
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: (_ for _ in ()).throw(FileNotFoundError("git")))
    assert collect.source_commit() is None
