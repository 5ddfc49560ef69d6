"""The commands and the code that the pages show can be typed as they stand."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afa.cli import build_parser
from afa.config import load_config
from afa.config.keys import all_keys
from afa.inference.prediction import Prediction
from afa.runs import auto as defaults

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shell_lines(page: Path) -> Iterator[list[str]]:
    """The commands of the page's `sh` blocks, in words; continued lines joined, comments dropped."""
    for block in fences(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def all_commands() -> list[list[str]]:
    commands = [words for page in PAGES for words in shell_lines(page)]
    for config in sorted((ROOT / "configs").rglob("*.toml")):
        first = config.read_text(encoding="utf-8").splitlines()[0]
        commands.append(shlex.split(first.removeprefix("# ").split("  ")[0]))
    return commands


def afa_arguments(words: list[str]) -> list[str] | None:
    """What comes after `afa`, also when torchrun starts it."""
    if words[0] == "torchrun":
        return words[words.index("afa") + 1 :]
    return words[1:] if words[0] == "afa" else None


AFA_COMMANDS = [arguments for words in all_commands() if (arguments := afa_arguments(words)) is not None]
MAKE_COMMANDS = [words for words in all_commands() if words[0] == "make"]


@pytest.mark.parametrize("arguments", AFA_COMMANDS, ids=" ".join)
def test_afa_commands_are_accepted(arguments: list[str]) -> None:
    rest, overrides = [], {}
    words = iter(arguments)
    for word in words:
        if word.removeprefix("--") in {key.name for key in all_keys()}:
            overrides[word.removeprefix("--")] = next(words)
        else:
            rest.append(word)
    load_config(overrides=overrides)
    build_parser().parse_args(rest)  # argparse prints what it refuses and raises SystemExit
    for word in rest:
        assert not word.endswith(".toml") or (ROOT / word).exists(), f"{word} is not in the repository"


@pytest.mark.parametrize("words", MAKE_COMMANDS, ids=" ".join)
def test_make_targets_exist(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for word in words[1:]:
        assert "=" in word or word in targets, word


def test_the_pages_show_commands_at_all() -> None:
    """Guards the two tests above against a change of fence that would leave them nothing to check."""
    assert {arguments[0] for arguments in AFA_COMMANDS} >= {
        "check",
        "demo",
        "export",
        "train",
        "evaluate",
        "predict",
        "pseudo",
        "report",
    }
    assert {words[1] for words in MAKE_COMMANDS} >= {"demo", "test", "parity"}


def test_the_python_lines_run(tiny_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, but for an encoder without weights to fetch, and few steps."""
    (tmp_path / "pets").symlink_to(tiny_table, target_is_directory=True)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(defaults, "BACKBONE", "mit_tiny")
    monkeypatch.setattr(defaults, "_SCRATCH_STEPS", 2)
    (code,) = fences(ROOT / "README.md", "python")
    names: dict[str, object] = {}
    exec(code, names)
    prediction = names["prediction"]
    assert isinstance(prediction, Prediction)
    label, scores = prediction.label, prediction.scores
    assert (label.shape, label.dtype) == ((48, 64), np.uint8)
    assert scores.shape[1:] == (48, 64)
    assert scores.dtype == np.float32
    assert np.array_equal(np.asarray(Image.open("photo.png")), label)
    assert (tmp_path / "runs" / "pets" / "report.html").is_file()
