"""The latency benchmark runs, and prints both medians and the ratio."""

import importlib.util
import re
from pathlib import Path

import pytest


def test_latency_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "bench" / "predict.py"
    spec = importlib.util.spec_from_file_location("bench_predict", path)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.main(["--size", "64", "--backbone", "mit_tiny", "--repeats", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "100.000 % of the labels are equal"
    assert [line.split("  ")[0] for line in lines[2:5]] == ["network", "predictor", "predictor, scores"]
    assert re.fullmatch(r"\d+\.\d\dx", lines[-1])
