"""The benchmark of the feature cache runs and prints its ratio last."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench" / "cache.py"


def test_table_and_ratio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("bench_cache", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flags = ["--backbone", "dinov2_tiny", "--freeze", "4", "--crop", "64", "--batch", "2", "--images", "3"]
    monkeypatch.setattr(sys, "argv", ["cache.py", *flags, "--rounds", "1", "--device", "cpu"])
    module.main()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:5]}
    assert rows.keys() == {"cls", "initial", "refined"}
    for pixels, cached, ratio in rows.values():
        assert float(cached) / float(pixels) == pytest.approx(float(ratio.rstrip("x")), rel=0.1, abs=0.1)
    assert lines[-1] == rows["refined"][2]
