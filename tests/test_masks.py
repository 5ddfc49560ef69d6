"""`afa masks`: masks of tagged images without training, with a tiny encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import afa
from afa.cli import main
from encoders import write_embeddings
from mistakes import refused
from opened import Opened

FLAGS = ("--model.backbone", "clip_mini", "--model.weights", "", "--model.freeze_blocks", "4", "--device", "cpu")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder of images and tags; beside them masks that nothing may open."""
    root = tmp_path / "pets"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    lines = ["file,tags"]
    for number, tags in enumerate(("cat", "dog", "cat dog", "cat", "dog")):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).save(root / "images" / f"{number}.png")
        Image.new("L", (80, 60)).save(root / "masks" / f"{number}.png")
        lines.append(f"{number}.png,{tags}")
    (root / "tags.csv").write_text("\n".join(lines))
    (root / "classes.txt").write_text("cat: kitten | cat\ndog\n")
    write_embeddings(tmp_path / "words", ["kitten", "cat", "dog", "sky", "grass"], 32)
    return root


def run(pets: Path, out: Path, *more: str) -> int:
    return main(["masks", str(pets), "--out", str(out), "--model.text_embeddings", str(pets.parent / "words"),
                 *FLAGS, *more])  # fmt: skip


def test_masks_page_and_figures(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(pets, out, "--format", "coco", "--examples", "3") == 0
    said = capsys.readouterr().out
    assert "5 masks written" in said
    assert "of the pixels have a class" in said
    tags = {"0": {1}, "1": {2}, "2": {1, 2}, "3": {1}, "4": {2}}
    shares, missed = [], {}
    for name, allowed in tags.items():
        mask = np.asarray(Image.open(out / "masks" / f"{name}.png"))
        assert mask.shape == (60, 80)
        assert set(np.unique(mask)) <= {0, *allowed}
        shares.append((mask > 0).mean())
        if lost := [("cat", "dog")[value - 1] for value in sorted(allowed - set(np.unique(mask)))]:
            missed[name] = lost
    figures = json.loads((out / "masks.json").read_text())
    assert figures["coverage"] == pytest.approx(100 * np.mean(shares), abs=0.01)
    assert figures["nothing"] == missed
    assert (figures["num_images"], figures["failed"]) == (5, [])
    page = (out / "masks.html").read_text()
    assert page.count('class="example"') == 3
    assert "Coverage" in page
    assert [path.name for path in (out / "examples" / "000").iterdir() if path.suffix == ".png"]
    assert (out / "coco.json").is_file() or list(out.glob("*coco*"))


def test_a_second_call_goes_on_and_other_words_do_not(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(pets, out) == 0
    (out / "masks" / "3.png").unlink()
    assert run(pets, out) == 0
    assert "1 masks written" in capsys.readouterr().out
    (pets / "classes.txt").write_text("cat\ndog\n")
    assert run(pets, out) == 2
    assert "weights" in capsys.readouterr().err


def test_no_mask_of_the_data_set_is_opened(pets: Path, tmp_path: Path) -> None:
    with Opened.recorded() as opened:
        assert run(pets, tmp_path / "out") == 0
    assert not [path for path in opened if Path(path).is_relative_to(pets / "masks")]


def test_python(pets: Path, tmp_path: Path) -> None:
    keys = {"model.backbone": "clip_mini", "model.weights": "", "model.freeze_blocks": 4, "train.device": "cpu"}
    keys |= {"model.text_embeddings": str(pets.parent / "words")}
    summary = afa.masks(pets, tmp_path / "out", **keys)
    assert summary.num_images == 5
    assert summary.written.written == 5
    with refused("model.classifier is learned"):
        afa.masks(pets, tmp_path / "other", **keys, **{"model.classifier": "learned", "train.feature_cache": False})


def test_classes_without_words(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pets / "classes.txt").write_text("cat\ndog: hound\n")
    assert run(pets, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'hound'" in error
    assert not (tmp_path / "out").exists()


def test_a_broken_image_costs_its_own_mask_alone(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pets / "images" / "0.png").write_bytes(b"broken")
    for flags, status, words in (((), 1, "1 images failed"), (("--skip-broken",), 0, "1 broken image left out")):
        out = tmp_path / f"out{status}"
        assert run(pets, out, "--examples", "5", *flags) == status
        assert words in capsys.readouterr().out
        assert sorted(path.stem for path in (out / "masks").iterdir()) == ["1", "2", "3", "4"]
        figures = json.loads((out / "masks.json").read_text())
        assert [len(figures[key]) for key in ("failed", "broken")] == [status, 1 - status]
        assert len(json.loads((out / "examples" / "index.json").read_text())) == 4
        assert (out / "masks.html").is_file()
