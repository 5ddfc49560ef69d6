"""What more images would cost: the arithmetic by hand, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from afa.check.scale import MACHINES, estimate, parse_count, scale_figures
from afa.cli import main
from mistakes import said
from stores import write_shards

REPORT: dict[str, Any] = {
    "images": {
        "read": 600, "seconds": 10.0, "threads": 2, "bytes": 50_000.0,
        "width": {"median": 500.0}, "height": {"median": 375.0},
    },
    "training": {
        "device": "CPU with 2 threads", "batch_size": 8, "steps": 30,
        "phases": [{"steps": 10, "step_seconds": 2.0}, {"steps": 20, "step_seconds": 3.0}],
    },
    "classes": [{}] * 20,
}  # fmt: skip


def test_a_machine_that_measurements_are_known_of() -> None:
    settings: dict[str, Any] = {"predict_rate": 3.0, "parameters": 13_700_000, "crop_size": 512}
    found = estimate(10**8, "H100", REPORT, **settings)
    rate = min(310.0, 30 * 16)  # 600 images in 10 s on 2 threads are 30 a second and core
    assert found["predict"]["hours"] == pytest.approx(10**8 / rate / 3600)
    assert found["predict"]["machines"] == math.ceil(10**8 / rate / 86_400)
    assert found["train_epoch"]["network"] == pytest.approx(MACHINES["H100"].train)
    assert (found["bytes_in"], found["shards"]) == (5e12, math.ceil(5e12 / 2**30))
    assert found["bytes_out"] == pytest.approx(10**8 * 0.0156 * 500 * 375)
    assert found["memory_bytes"] == 10**8 * (40 + 32 + 20)
    slower = estimate(10**8, "h100", REPORT, **settings | {"parameters": 27_400_000, "crop_size": 1024})
    assert slower["predict"]["network"] == pytest.approx(155.0)
    assert slower["train_epoch"]["network"] == pytest.approx(MACHINES["H100"].train / 8)
    faster = estimate(10**8, "H100", REPORT, **settings | {"parameters": 1_000_000, "crop_size": 64})
    assert faster["predict"]["network"] == 310.0


def test_this_machine() -> None:
    found = estimate(1000, "this machine", REPORT, predict_rate=3.0, parameters=1, crop_size=512)
    assert found["predict"] == {"network": 3.0, "decode": 60.0, "hours": 1000 / 3 / 3600, "machines": 1}
    assert found["train_epoch"]["network"] == pytest.approx(8 * 30 / 80)
    words = scale_figures(found)
    assert words["1,000 images"] == "on this machine: rates of measured here, CPU with 2 threads"
    assert "network sets the pace" in words["prediction"]


@pytest.mark.parametrize("text", ["", "0", "1e9", "-5", "many", "1T"])
def test_numbers_that_are_none(text: str) -> None:
    assert f"--at-scale is {text!r}; write a number of images, such as 100M" in said(parse_count, text)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_shards(tmp_path / "pets", 2, 20)
    words = ["check", str(folder), "--preset", "demo", "--schedule.batch_size", "2", "--augment.crop_size", "64"]
    assert main([*words, "--at-scale", "2.5M", "--device", "h100", "--json", str(tmp_path / "a.json")]) == 0
    assert "2,500,000 images" in capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["kind"], found["at_scale"]["images"], found["at_scale"]["machine"]) == ("shards", 2_500_000, "H100")
    sizes = [size for size in (found["images"]["bytes"],) if 300 < size < 1200]
    assert sizes, found["images"]["bytes"]
    assert main([*words, "--at-scale", "2M", "--fast"]) == 2
    assert "--at-scale needs images that were read" in capsys.readouterr().err
