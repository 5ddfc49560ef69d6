"""The CRF, boundary IoU and the test server's archive through the command line, on a tiny run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from afa.cli import main
from afa.data.images import read_mask


@pytest.fixture
def scores(tiny_run: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*flags: str) -> dict[str, Any]:
        assert main(["evaluate", str(tiny_run), "--data", str(tiny_data), "--limit", "2", "--json", "-", *flags]) == 0
        figures: dict[str, Any] = json.loads(capsys.readouterr().out)
        return figures

    return run


def test_evaluate_with_crf_and_boundary(scores: Any) -> None:
    plain = scores()
    refined = scores("--protocol", "single+crf", "--boundary")
    assert "boundary_iou" not in plain
    assert refined["protocol"] == "single+crf"
    assert refined["per_class"] != plain["per_class"]
    assert set(refined["boundary_per_class"]) == set(refined["per_class"])
    known = [value for value in refined["boundary_per_class"].values() if value is not None]
    assert refined["boundary_iou"] == pytest.approx(np.mean(known), abs=0.01)
    assert 0 <= refined["boundary_iou"] < refined["miou"]


def test_evaluate_pseudo_labels_with_crf(scores: Any, tiny_data: Path) -> None:
    plain = scores("--labels", "cam")
    both = scores("--labels", "cam", "--refine", "--pseudo.crf", "true", "--list", str(tiny_data / "lists/train.txt"))
    assert "refinement" not in plain
    assert (both["refinement"], both["list"]) == ("par+crf", str(tiny_data / "lists/train.txt"))


def test_table_has_a_column_for_the_boundary(
    tiny_run: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tiny_run), "--data", str(tiny_data), "--limit", "1", "--boundary"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["IoU", "boundary", "IoU"]
    assert len(lines[1].split()) == 3
    assert lines[-1].startswith("boundary IoU")


def test_predict_and_pseudo_with_crf(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((tiny_data / "JPEGImages").iterdir())[:2]
    predict = ["predict", str(tiny_run), *map(str, images), "--no-overlay", "--out"]
    for flags, folder in (([], "plain"), (["--crf"], "crf"), (["--evaluation.protocol", "single+crf"], "key")):
        assert main([*predict, str(tmp_path / folder), *flags]) == 0
    masks = {
        folder: [read_mask(tmp_path / folder / "masks" / f"{image.stem}.png") for image in images]
        for folder in ("plain", "crf", "key")
    }
    for plain, crf, key in zip(masks["plain"], masks["crf"], masks["key"], strict=True):
        assert (crf == key).all()
        assert crf.shape == plain.shape
    assert any((plain != crf).any() for plain, crf in zip(masks["plain"], masks["crf"], strict=True))
    stamp = json.loads((tmp_path / "crf" / "predict.json").read_text())
    assert (stamp["protocol"], stamp["crf_iterations"], stamp["crf_bilateral_xy"]) == ("single+crf", 10, 64.0)
    assert main([*predict, str(tmp_path / "crf"), "--crf", "--resume", "--evaluation.crf_iterations", "3"]) == 2
    assert re.search("crf_iterations was 10 .* 3 now", capsys.readouterr().err)
    # The classes of generated data are not VOC's.
    assert main([*predict, str(tmp_path / "plain"), "--format", "voc_test"]) == 2
    assert "is not one of PASCAL VOC's" in capsys.readouterr().err
    pseudo = ["pseudo", str(tiny_run), "--data", str(tiny_data), "--list", str(tiny_data / "lists" / "val.txt")]
    for flag in ("false", "true"):
        assert main([*pseudo, "--out", str(tmp_path / flag), "--pseudo.crf", flag]) == 0
    made = [sorted((tmp_path / flag / "masks").iterdir()) for flag in ("false", "true")]
    assert len(made[0]) == len(made[1]) == 6
    assert any((read_mask(one) != read_mask(other)).any() for one, other in zip(*made, strict=True))
