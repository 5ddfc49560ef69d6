"""The latency benchmark runs, and prints both medians and the ratio."""

import re

import pytest

import predict as bench


def test_latency_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--size", "64", "--backbone", "mit_tiny", "--repeats", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "100.000 % of the labels are equal"
    assert [line.split("  ")[0] for line in lines[2:5]] == ["network", "predictor", "predictor, scores"]
    assert re.fullmatch(r"\d+\.\d\dx", lines[-1])
