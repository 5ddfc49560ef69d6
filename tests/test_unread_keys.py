"""What commands take that do not train: the keys that they read, at any value, and one line for each of the others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from afa.cli import main
from afa.config import config_to_dict, load_config, refuse_unread
from afa.config.load import kinds, sections
from afa.demo.shapes import SHAPE_CLASSES
from afa.errors import AfaError
from encoders import write_embeddings
from mistakes import assert_one_line

CALLS = {
    "evaluate --labels seg": "evaluate RUN --data DATA --limit 1",
    "evaluate --labels cam": "evaluate RUN --data DATA --limit 1 --labels cam --refine",
    "predict": "predict RUN DATA/JPEGImages/val_00000.jpg --out OUT --tiles auto --crf",
    "pseudo": "pseudo RUN --data DATA --out OUT --list DATA/lists/val.txt --tiles auto",
    "masks": "masks DATA --out OUT --list DATA/lists/val.txt --tiles auto",
}
ELSEWHERE = ("dataclasses", "afa.config.load", "afa.runs.network")
FACTS = {"train.supervision"}
"""What is said of a run, and never changed."""

MINI = {"model.backbone": "clip_mini", "model.weights": "", "model.freeze_blocks": 4, "train.device": "cpu"}


def changes_something(key: str, command: str) -> bool:
    try:
        refuse_unread(command, [key])
    except AfaError:
        return False
    return True


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The keys that are read; not by what copies or checks whole sections, or builds the network of a run."""
    read: set[str] = set()
    with monkeypatch.context() as patch:
        for section, cls in sections().items():

            def get(self: object, name: str, section: str = section) -> Any:
                caller = sys._getframe(1).f_globals["__name__"]
                if f"{section}.{name}" in kinds() and caller not in ELSEWHERE:
                    read.add(f"{section}.{name}")
                return object.__getattribute__(self, name)

            patch.setattr(cls, "__getattribute__", get)
        yield read


def text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


@pytest.mark.parametrize("command", CALLS)
def test_every_key_that_is_read_is_taken_and_no_other(
    command: str,
    tiny_run: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = {"RUN": tiny_run, "DATA": tiny_data, "OUT": tmp_path / "out"}
    words = CALLS[command]
    for name, place in places.items():
        words = words.replace(name, str(place))
    config = load_config(tiny_run / "config.toml")
    if command == "masks":
        write_embeddings(tmp_path / "words", [*SHAPE_CLASSES, "sky", "grass"], 32)
        own = MINI | {"data.root": str(tiny_data), "model.text_embeddings": str(tmp_path / "words")}
        config = load_config(None, own, preset="frozen")
    tree = config_to_dict(config)
    values = {key: text(tree[key.partition(".")[0]][key.partition(".")[2]]) for key in kinds()}
    taken = [key for key in kinds() if changes_something(key, command)]
    with recorded(monkeypatch) as read:
        assert main([*words.split(), *(word for key in taken for word in (f"--{key}", values[key]))]) == 0
    assert "train.precision" in read
    assert read - FACTS <= set(taken)
    capsys.readouterr()
    for key in kinds().keys() - taken:
        assert main([*words.split(), f"--{key}", values[key]]) == 2
        line = capsys.readouterr().err.removesuffix("\n")
        assert_one_line(line)
        assert line.startswith(f"afa: error: {key} changes nothing in afa {command}; leave it out. What does is among ")
        assert "train.device" in line


def test_unknown_keys_are_called_so(tiny_run: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tiny_run), "--data", str(tiny_data), "--train.max_image", "3"]) == 2
    assert "unknown key train.max_image; did you mean train.max_images?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "pseudo", "masks", "check"])
def test_the_data_set_is_named_once(
    command: str, tiny_run: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_data)] if command in ("masks", "check") else [str(tiny_run), "--data", str(tiny_data)]
    out = ["--out", str(tmp_path / "out")] if command != "evaluate" else []
    assert main([command, *words, *out, "--data.root", "other"]) == 2
    assert f"{tiny_data} and data.root other both name the data set; leave one out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
