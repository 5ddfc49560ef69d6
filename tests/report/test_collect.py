import json
import subprocess
from pathlib import Path

import pytest

from afa.config import config_to_toml, load_config
from afa.errors import AfaError
from afa.report import collect
from afa.report.collect import collect_report, read_metrics


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder that holds its configuration only."""
    folder = tmp_path / "myrun"
    (folder / "evaluation").mkdir(parents=True)
    config = load_config(None, {"schedule.max_steps": 40, "schedule.cls_steps": 10, "schedule.refined_steps": 20})
    (folder / "config.toml").write_text(config_to_toml(config))
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


def write_lines(run: Path, *lines: object) -> None:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text)


def write_scores(run: Path, kind: str, miou: float, **extras: object) -> None:
    scores = {"miou": miou, "per_class": {"background": 90.0, "cat": miou, "dog": None}, "labels": kind}
    (run / "evaluation" / f"{kind}.json").write_text(
        json.dumps(scores | {"protocol": "single", "num_images": 3, "seconds": 1.0} | extras)
    )


def test_finished_run_gives_every_key(run: Path) -> None:
    write_scores(run, "seg", 71.5, tag_f1=93.0)
    write_scores(run, "cam", 60.0)
    write_scores(run, "propagated", 65.0)
    environment = {"device": "cpu", "torch": "2.13.0", "seconds_train": 80.0, "steps": 40, "num_parameters": 7}
    (run / "environment.json").write_text(json.dumps(environment | {"commit": "abc"}))
    (run / "model.safetensors").touch()
    report = collect_report(run)
    assert (report["miou"], report["cam_miou"], report["propagated_miou"], report["tag_f1"]) == (71.5, 60, 65, 93)
    assert (report["seconds_train"], report["steps"], report["device"], report["torch"]) == (80.0, 40, "cpu", "2.13.0")
    assert report["config"]["schedule"]["max_steps"] == 40
    assert report["classes"] == ["cat", "dog"]
    assert report["per_class"]["cam"]["cat"] == 60.0
    assert report["images_per_second"] == 40 * 8 / 80
    assert (report["complete"], report["run"], report["commit"]) == (True, "myrun", "abc")
    json.dumps(report, allow_nan=False)


def test_what_a_bare_run_does_not_tell_is_none(run: Path) -> None:
    report = collect_report(run)
    keys = ("miou", "cam_miou", "propagated_miou", "tag_f1", "seconds_train", "steps", "device", "torch", "commit")
    assert {key: report[key] for key in keys} == dict.fromkeys(keys)
    assert report["images_per_second"] is None
    assert not report["complete"]


def test_killed_run_counts_as_far_as_its_log_reaches(run: Path) -> None:
    write_lines(run, {"kind": "train", "step": 10, "seconds": 5.0}, {"kind": "train", "step": 20, "seconds": 9.0})
    report = collect_report(run)
    assert (report["steps"], report["seconds_train"], report["complete"]) == (20, 9.0, False)


def test_torn_and_repeated_lines(run: Path) -> None:
    write_lines(
        run,
        {"kind": "train", "step": 1, "loss": 3.0},
        {"kind": "train", "step": 2, "loss": 9.0},
        '{"kind": "train", "st{"kind": "train", "step": 3}',
        {"kind": "eval", "step": 2, "labels": "seg", "miou": 5.0},
        {"kind": "eval", "step": 2, "labels": "cam", "miou": 6.0},
        {"kind": "train", "step": 2, "loss": 2.0},
        '{"kind": "train", "step": 4, "loss": NaN}',
        '{"kind": "train", "step"',
    )
    lines = read_metrics(run)
    assert [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"] == [
        (1, 3.0),
        (2, 2.0),
        (4, None),
    ]
    assert [line["miou"] for line in lines if line["kind"] == "eval"] == [5.0, 6.0]


@pytest.mark.parametrize("make", [False, True])
def test_not_a_run_folder(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "nothing"
    if make:
        folder.mkdir()
    with pytest.raises(AfaError, match=r"nothing: .*`afa train --out`$"):
        collect_report(folder)


@pytest.mark.parametrize(("text", "found"), [("{", "not valid JSON"), ("[1]", "holds list, not a JSON object")])
def test_broken_evaluation_file(run: Path, text: str, found: str) -> None:
    (run / "evaluation" / "cam.json").write_text(text)
    with pytest.raises(AfaError, match=rf"cam\.json: {found}.*delete it$"):
        collect_report(run)


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
