"""Imports point one way, and asking for help loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "afa"

# A part may import the parts of lower levels and itself. Within a level only the listed pairs may meet.
LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"elastic", "errors", "types"}),
    frozenset({"config", "kernels", "peers", "runs.files", "runtime"}),
    frozenset({"data", "model", "pseudo", "losses", "filtering"}),
    frozenset({"runs", "formats", "demo"}),
    frozenset({"training", "evaluation", "inference"}),
    frozenset({"report"}),
    frozenset({"check", "explore"}),
    frozenset({"api", "ray"}),
    frozenset({"cli"}),
    frozenset({"__main__", "__init__"}),
)
WITHIN_LEVEL = {
    ("runtime", "peers"),
    ("training", "evaluation"),
    ("inference", "evaluation"),
    ("pseudo", "filtering"),
    ("losses", "filtering"),
}
HEAVY = {"torch", "transformers", "numpy", "PIL", "tensorboard"}


PARTS = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The room of a module; the atomic writer, which every room uses, is a part of its own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "runs.files" if parts == ("runs", "files") else parts[0]


def level_of(part: str) -> int:
    for level, parts in enumerate(LEVELS):
        if part in parts:
            return level
    raise AssertionError(f"afa.{part} has no place in the import order; give it one in LEVELS")


def imported_names(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted name, relative imports made absolute, of every import statement in the file, and its line."""
    package = ("afa", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            yield from ((".".join([*base, alias.name]), node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    level = level_of(part)
    for name, line in imported_names(path):
        top, _, rest = name.partition(".")
        other = "runs.files" if rest.startswith("runs.files") else rest.split(".")[0]
        if top != "afa" or other.split(".")[0] not in PARTS:
            continue
        allowed = other == part or level_of(other) < level or (part, other) in WITHIN_LEVEL
        assert allowed, f"{path.name}:{line} imports {name}: afa.{part} must not know afa.{other}"


def test_nothing_in_the_order_is_stale() -> None:
    listed = {part for parts in LEVELS for part in parts}
    assert listed == {part_of(path) for path in modules()}
    imports = {
        (part_of(path), name.split(".")[1]) for path in modules() for name, _ in imported_names(path) if "." in name
    }
    assert not WITHIN_LEVEL - imports


@pytest.mark.parametrize("part", ["model", "pseudo", "losses", "kernels", "filtering"])
def test_parts_that_take_tensors_open_no_data_and_no_run(part: str) -> None:
    folder = PACKAGE / part
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]:
        for name, line in imported_names(path):
            assert name.split(".")[0] not in {"PIL", "rich", "argparse"}, f"{path.name}:{line} imports {name}"


def test_model_sees_no_config_object() -> None:
    for path in sorted((PACKAGE / "model").rglob("*.py")):
        for name, line in imported_names(path):
            opens_config = name == "afa.config" or (name.startswith("afa.config.") and name.endswith("Config"))
            assert not opens_config, f"{path.name}:{line} imports {name}"


def test_only_one_module_knows_the_names_of_a_runs_files() -> None:
    names = {"config.toml", "model.safetensors", "training_state.pt", "metrics.jsonl", "environment.json"}
    names |= {"report.json", "report.html"}
    # A folder of the Hugging Face hub has names of its own, one of which is the same.
    others = {("inference/hub.py", "model.safetensors")}
    for path in modules():
        place = path.relative_to(PACKAGE).as_posix()
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        spelled = {(place, name) for name in names & texts} - others
        assert place == "runs/run.py" or not spelled, spelled


def test_only_cli_reads_the_command_line() -> None:
    for path in modules():
        names = {name for name, _ in imported_names(path)}
        # One other module is a command of its own: `python -m afa.data.coco`.
        reads = part_of(path) == "cli" or (path.name == "coco.py" and part_of(path) == "data")
        assert reads or not names & {"argparse", "sys.argv"}, path
        assert part_of(path) in {"cli", "__main__"} or "sys.argv" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("arguments", [["-c", "import afa"], ["-m", "afa", "--help"], ["-m", "afa", "train", "--help"]])
def test_nothing_heavy_is_loaded(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True
    )
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in result.stderr.splitlines() if "|" in line}
    assert "afa" in loaded
    assert not loaded & HEAVY


def test_checking_tags_imports_no_transformers() -> None:
    """It takes seconds to import, and `afa check --fast` builds no network."""
    program = "import sys, afa.api, afa.model.registry; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_help_answers_within_half_a_second() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "afa", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
