"""The benchmark of the energy loss runs, and tells its share of a training step."""

from __future__ import annotations

import re

import pytest
import torch

import energy as bench


def test_energy_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        bench.main(["--size", "64", "--batch", "2", "--repeats", "1", "--step", "mit_tiny"])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    alone, step, share = (float(re.search(r"([\d.]+) (?:ms|%)", line)[1]) for line in lines[1:4])  # type: ignore[index]
    assert lines[-1].endswith("% of a training step")
    assert share == pytest.approx(100 * alone / step, abs=0.1)
