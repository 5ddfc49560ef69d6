"""Runs side by side: which are one row, what stands beside the paper's figures, and whether its order holds here."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from afa.cli import main
from afa.config import config_to_toml, load_config
from afa.report.compare import Column, broken_orders, compare_runs, render_text, table_rows, write_comparison
from afa.report.paper_tables import PAPER_TABLES, find_table
from mistakes import refused


def make_run(folder: Path, keys: dict[str, Any] | None = None, **evaluations: Any) -> Path:
    """A finished run whose evaluations are the given figures; a number stands for a plain evaluation of that kind."""
    (folder / "evaluation").mkdir(parents=True)
    (folder / "config.toml").write_text(config_to_toml(load_config(None, keys or {})))
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "model.safetensors").touch()
    (folder / "environment.json").write_text(json.dumps({"device": "a GPU", "steps": 900, "seconds_train": 60.0}))
    for name, figures in evaluations.items():
        plain = {"labels": name, "protocol": "single", "num_images": 50, "per_class": {}}
        changed = figures if isinstance(figures, dict) else {"miou": figures}
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(plain | changed))
    return folder


def test_runs_that_differ_by_their_seed_alone_are_one_row(tmp_path: Path) -> None:
    values = [40.0, 43.0, 41.5]
    runs = [
        make_run(tmp_path / f"seed{i}", {"train.seed": i, "data.workers": i}, seg=value, **{"cam": 30.0} if i else {})
        for i, value in enumerate(values)
    ]
    groups = compare_runs([*runs, make_run(tmp_path / "other", {"model.pooling": "gap"}, seg=20.0)])
    assert [group.runs for group in groups] == [("seed0", "seed1", "seed2"), ("other",)]
    single = Column("seg", "", "single", "val")
    assert groups[0].scores == {
        single: (pytest.approx(41.5), pytest.approx(statistics.stdev(values)), 3),
        Column("cam", "", "", "val"): (30.0, 0.0, 2),
    }
    assert groups[1].scores[single].spread is None
    text = render_text(groups)
    assert re.search(r"^seed0 +41\.5 ± 1\.5 +30\.0 ± 0\.0 +50 +mit_b1 +900 +3 +a GPU$", text, flags=re.MULTILINE)
    assert re.search(r"^other +20\.0 +– +50 +mit_b1 +900 +1 +a GPU$", text, flags=re.MULTILINE)


def test_runs_on_other_data_are_other_rows(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, {"data.root": name}, seg=40.0) for name in ("cats", "dogs")]
    assert [group.runs for group in compare_runs(runs)] == [("cats",), ("dogs",)]


def test_table_has_the_papers_order_and_figures(tmp_path: Path) -> None:
    labels = {"AFA": 50.0, "w/o AFA": 30.0, "prop. with MHSA": 41.0, "w/o propagation": 40.0, "mine": 60.0}
    runs = [
        make_run(tmp_path / f"run{i}", {"train.label": f"table3: {name}"}, propagated=miou)
        for i, (name, miou) in enumerate(labels.items())
    ]
    groups = compare_runs(runs)
    lines = table_rows(groups, PAPER_TABLES[2])
    assert [(line.name, line.here["val"].mean, line.paper.get("val")) for line in lines] == [
        ("w/o AFA", 30.0, 54.2),
        ("w/o propagation", 40.0, 64.4),
        ("prop. with MHSA", 41.0, 55.9),
        ("AFA", 50.0, 66.5),
        ("mine", 60.0, None),
    ]
    count, broken = broken_orders(lines)
    assert count == 6
    assert broken == ["prop. with MHSA (41.0) is not below w/o propagation (40.0); paper: 55.9, 64.4"]
    text = render_text(groups)
    assert text.startswith("Table 3: propagation, pseudo labels\n")
    assert re.search(r"^w/o propagation +40\.0 +64\.4 +– +66\.3 ", text, flags=re.MULTILINE)
    assert "order as in the paper: 5 of 6 pairs\n" in text


def test_further_rows_of_the_same_run(tmp_path: Path) -> None:
    cam = make_run(
        tmp_path / "cam",
        {"train.label": "Table 4: cam"},
        cam={"miou": 40.0, "list": "lists/train_animals.txt"},
        cam_par={"labels": "cam", "miou": 45.0, "refinement": "par", "list": "lists/train_animals.txt"},
    )
    full = make_run(
        tmp_path / "full",
        {"train.label": "table2: PAR + AFA + reg"},
        seg=60.0,
        crf={"labels": "seg", "miou": 62.0, "protocol": "multiscale+crf"},
    )
    groups = compare_runs([cam, full])
    for table, split, expected in (
        (4, "train", [("CAM", 40.0, {"train": 48.2}), ("PAR", 45.0, {"train": 52.9})]),
        (2, "val", [("PAR AFA reg", 60.0, {"val": 63.8}), ("PAR AFA reg CRF", 62.0, {"val": 66.0})]),
    ):
        lines = table_rows(groups, PAPER_TABLES[table - 1])
        assert [(line.name, line.here[split].mean, line.paper) for line in lines] == expected


def test_masks_as_supervision_are_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "full", {"train.supervision": "masks"})
    assert compare_runs([run])[0].name == "full (trained on masks)"


def test_written_page_and_json(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", {"train.label": "table3: AFA"}, propagated=50.0),
        make_run(tmp_path / "b", {"train.label": "<b>"}, seg=40.0),
    ]
    page = write_comparison(compare_runs(runs), tmp_path / "new" / "out").read_text()
    assert "Table 3: propagation, pseudo labels" in page
    assert "here: 50.0\npaper: 66.5" in page  # the chart's tooltip
    assert "<b></th>" not in page
    assert "&lt;b&gt;" in page
    written = json.loads((tmp_path / "new" / "out" / "compare.json").read_text())
    common = {"backbone": "mit_b1", "steps": 900, "complete": True, "num_images": None, "machine": "a GPU"}
    plain = {"refinement": "", "split": "val", "spread": None, "num_runs": 1}
    paper = {"table": 3, "paper": {"train": 68.7, "val": 66.5}}
    propagated = plain | {"labels": "propagated", "protocol": "", "mean": 50.0}
    seg = plain | {"labels": "seg", "protocol": "single", "mean": 40.0}
    assert written == [
        common | paper | {"name": "AFA", "runs": ["a"], "figures": [propagated]},
        common | {"name": "<b>", "table": None, "paper": None, "runs": ["b"], "num_images": 50, "figures": [seg]},
    ]


def test_labels_that_name_no_table() -> None:
    for label in ("", "table3", "table9: AFA", "my table3: AFA", "table3:"):
        assert find_table(label) is None, label
    found = find_table(" TABLE 1 : Top  50% ")
    assert found is not None
    assert (found[0].number, found[0].row(found[1])) == (1, PAPER_TABLES[0].rows[1])


def test_command_and_its_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", seg=40.0)
    assert main(["report", "--compare", str(run), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("Runs\n")
    assert (tmp_path / "out" / "compare.html").is_file()
    for arguments, message in (
        (["report", str(run), str(run)], "several runs are for --compare; add it"),
        (["report", "--compare", str(run), str(run)], "given twice"),
        (["report", str(run), "--data", "x"], "--data is for --figures; add it"),
        (["report", "--compare", str(run), "--figures"], "leave them out with --compare"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    (run / "evaluation" / "seg.json").write_text("{}")
    with refused("seg.json", "afa evaluate --json"):
        compare_runs([run])
