"""The ablations on generated images: rows train what their files say, and what is done is not done again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ablations as bench
from afa.config import load_config
from afa.report.paper_tables import PAPER_TABLES
from afa.runs.network import build_network


def test_rows_are_those_of_the_paper() -> None:
    tables = {table.number: table for table in PAPER_TABLES}
    for row in bench.ROWS:
        paper = tables[row.table].row(row.name)
        assert paper is not None
        assert row.paper in (paper.train, paper.val)
        assert row.labels == tables[row.table].labels
    assert {(row.table, row.name) for row in bench.ROWS} == {
        (table.number, row.name) for table in PAPER_TABLES if table.number < 6 for row in table.rows
    }


def test_rows_are_the_demo_with_the_keys_of_their_file(tmp_path: Path) -> None:
    demo = load_config(preset="demo")

    def config(name: str) -> Any:
        return bench.row_config(name, root=tmp_path, weights="encoder", seed=1, steps=200)

    full = config("table2/par_afa_reg")
    assert (full.schedule.max_steps, full.schedule.cls_steps, full.schedule.refined_steps) == (200, 20, 60)
    assert full.pseudo == demo.pseudo
    assert full.loss.energy_weight > 0
    assert full.model.weights == "encoder"
    assert config("table2/par_afa").loss == demo.loss
    baseline = config("table2/baseline")
    assert (baseline.pseudo.refinement, baseline.pseudo.propagation) == ("none", "none")
    assert (baseline.loss.affinity_weight, baseline.loss.energy_weight) == (0, 0)
    assert config("table1/gmp").model.pooling == "gmp"
    assert config("table5/rrm").pseudo.refinement == "crf"
    assert config("table5/full_supervision").train.supervision == "masks"
    names = {row.config: bench.run_name(config(row.config)) for row in bench.ROWS}
    assert names["table4/cam"] == names["table2/baseline"]
    assert len(set(names.values())) == 13


def test_finished_runs_and_scores_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[tuple[Path, bool]] = []
    pretrained: list[Path] = []

    def train(config: Any, run: Path, *, resume: bool, progress: bool) -> None:
        trained.append((run, resume))
        (run / "evaluation").mkdir(parents=True, exist_ok=True)
        for labels in ("seg", "cam", "propagated"):
            (run / "evaluation" / f"{labels}.json").write_text(json.dumps({"miou": 50.0 + config.train.seed}))
        (run / "report.json").write_text('{"miou": 50.0}')

    def pretrain(config: Any, data: Any, run: Path, **_: Any) -> Any:
        pretrained.append(run)
        assert config.schedule.cls_steps == config.schedule.max_steps == 7
        return SimpleNamespace(network=build_network(config.model, 5))

    monkeypatch.setattr(bench, "train_and_report", train)
    monkeypatch.setattr(bench, "train", pretrain)
    monkeypatch.setattr(bench, "write_shapes", lambda root, **_: None)
    monkeypatch.setattr(bench, "open_data", lambda data: None)
    command = ["--out", str(tmp_path), "--seeds", "2", "--steps", "10", "--tables", "1", "3"]
    command += ["--pretraining-steps", "7"]
    assert bench.main(command) == 0
    assert len(trained) == 2 * 9
    assert not any(resume for _, resume in trained)
    lines = capsys.readouterr().out.splitlines()
    assert "| 3 | AFA | propagated | 66.5 | 50.5 ± 0.7 | 2 |" in lines
    assert "| 3 | AFA > w/o propagation | +2.1 | +0.0 ± 0.0 | 0 of 2 |" in lines
    assert lines == (tmp_path / "table.md").read_text().splitlines()
    # A run that was killed goes on; finished ones stay.
    killed = trained[0][0]
    (killed / "report.json").unlink()
    (killed / "config.toml").touch()
    assert bench.main(command) == 0
    assert trained[18:] == [(killed, True)]
    assert len(pretrained) == 1
    weights = load_config(None, {"model.weights": str(tmp_path / "pretraining7" / "encoder")}, preset="demo").model
    assert build_network(weights, 5).backbone.channels == (16, 32, 64, 128)


def test_orderings_are_those_of_the_papers_figures() -> None:
    rows = {(row.table, row.name): row for row in bench.ROWS}
    for table, better, worse in bench.ORDERINGS:
        first, second = rows[table, better], rows[table, worse]
        assert first.paper > second.paper
    scores = {row: [row.paper, row.paper] for row in bench.ROWS}
    lines = bench.orderings_text(scores).splitlines()[2:]
    assert len(lines) == len(bench.ORDERINGS)
    assert all(line.endswith("| 2 of 2 |") for line in lines)
