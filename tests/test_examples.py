"""The scripts of examples/ run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from afa.data.images import read_mask

ROOT = Path(__file__).parents[1]


def test_own_data(tmp_path: Path) -> None:
    pycocotools = pytest.importorskip("pycocotools.coco")
    script = ROOT / "examples" / "own_data.py"
    result = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("60 images, ")
    coco = pycocotools.COCO(str(tmp_path / "masks" / "coco.json"))
    assert [category["name"] for category in coco.dataset["categories"]] == ["disk", "square", "triangle"]
    for annotation in coco.dataset["annotations"][:5]:
        name = Path(coco.imgs[annotation["image_id"]]["file_name"])
        mask = read_mask(tmp_path / "masks" / "masks" / name.with_suffix(".png"))
        assert (mask == annotation["category_id"]).sum() == annotation["area"]
