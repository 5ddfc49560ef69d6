"""The benchmark of the feature cache runs and prints its ratio last."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import cache as bench
from encoders import write_embeddings


def test_table_and_ratio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = write_embeddings(tmp_path, [*bench.CLASSES, "sky", "grass"], 32)
    flags = ["--backbone", "clip_mini", "--text", str(words), "--crop", "64", "--batch", "2", "--images", "3"]
    monkeypatch.setattr(sys, "argv", ["cache.py", *flags, "--rounds", "1", "--device", "cpu"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:4]}
    assert rows.keys() == {"initial", "refined"}
    for pixels, cached, ratio in rows.values():
        assert float(cached) / float(pixels) == pytest.approx(float(ratio.rstrip("x")), rel=0.1, abs=0.1)
    assert lines[-1] == rows["refined"][2]
