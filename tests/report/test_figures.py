"""The paper's figures from a tiny run: sheets of the right shape that show what they say."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from afa.cli import main
from afa.data.layout import open_scored
from afa.errors import AfaError
from afa.evaluation.protocols import pseudo_label, seg_logits
from afa.report.drawing import DISPLAY_SIZE, blend_label
from afa.report.pictures import FIGURES, write_figures
from afa.runs.build import load_run

CPU = torch.device("cpu")
SIDE, GAP, HEADER = DISPLAY_SIZE * 3 // 4, 6, 26


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("figures") / "run"
    shutil.copytree(tiny_run, copy)
    return copy


@pytest.fixture(scope="module")
def sheets(run: Path) -> dict[str, np.ndarray]:
    paths = write_figures(run, count=2, device="cpu", progress=False)
    assert [path.relative_to(run).as_posix() for path in paths] == [f"figures/{name}.png" for name in FIGURES]
    return {path.stem: np.array(Image.open(path)) for path in paths}


def picture(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = HEADER + GAP + row * (SIDE + GAP), GAP + column * (SIDE + GAP)
    return sheet[top : top + SIDE, left : left + SIDE].astype(int)


def test_sheets_have_a_row_an_image_and_a_column_a_caption(sheets: dict[str, np.ndarray]) -> None:
    for name, captions in FIGURES.items():
        rows = 4 if name == "affinity" else 2
        expected = (HEADER + GAP + rows * (SIDE + GAP), GAP + len(captions) * (SIDE + GAP), 3)
        assert sheets[name].shape == expected
        for row in range(rows):
            for column in range(len(captions)):
                assert picture(sheets[name], row, column).std() > 3, (name, row, column)


def test_sheets_show_the_labels(sheets: dict[str, np.ndarray], run: Path) -> None:
    loaded = load_run(run, CPU)
    images = open_scored(loaded.config.data)
    config = loaded.config
    pixels, tags = images.image(0), images.tags(0)
    shown = np.asarray(Image.fromarray(pixels).resize((DISPLAY_SIZE, DISPLAY_SIZE), Image.Resampling.LANCZOS))

    def difference(name: str, column: int, label: torch.Tensor) -> float:
        drawn = blend_label(shown, label)
        small = np.asarray(Image.fromarray(drawn).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        return float(np.abs(small - picture(sheets[name], 0, column)).mean())

    for column, (kind, refine) in enumerate(
        (("cam", False), ("propagated", False), ("cam", True), ("propagated", True)), start=1
    ):
        label = pseudo_label(loaded.network, pixels, tags, kind=kind, config=config.pseudo, refine=refine)
        assert difference("labels", column, label) < 2, column
    plain = seg_logits(loaded.network, pixels, protocol="single", config=config.evaluation).argmax(0)
    assert difference("results", 1, plain) < 2
    assert difference("results", 3, torch.from_numpy(images.mask(0))) < 2
    assert difference("results", 3, torch.zeros_like(plain)) > 4


def test_query_points_are_marked_on_all_three(sheets: dict[str, np.ndarray]) -> None:
    for row in range(4):
        for column in range(3):
            yellow = np.abs(picture(sheets["affinity"], row, column) - (255, 220, 40)).sum(-1) < 30
            assert yellow.sum() > 20, (row, column)


def test_command(run: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "figures", ignore_errors=True)
    assert main(["report", str(run), "--figures", "--data", str(tiny_data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*(str(run / "figures" / f"{name}.png") for name in FIGURES), str(run / "report.html")]
    assert all(Path(line).is_file() for line in lines)


def test_no_data(run: Path, tmp_path: Path) -> None:
    with pytest.raises(AfaError, match=str(tmp_path / "gone")):
        write_figures(run, data=str(tmp_path / "gone"), progress=False)
