"""Training knows tags and nothing else: masks may be absent or nonsense, and are never opened."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from afa.api import training_config
from afa.config import config_to_toml
from afa.evaluation.worth import measure_worth
from opened import Opened
from tiny import assert_same_weights, start_python, tiny_config, train_tiny

PACKAGE = Path(__file__).parents[1] / "src" / "afa"
MASKS = "SegmentationClassAug"


def run_training(root: Path, run: Path, **keys: Any) -> None:
    config = tiny_config(root, {"data.val_list": "", **keys})
    train_tiny(config, run)


@pytest.fixture(scope="module")
def with_masks(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("masks")
    run_training(tiny_data, run)
    return run


def remove_masks(folder: Path) -> None:
    shutil.rmtree(folder)


def garble_masks(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"not an image")


def invert_masks(folder: Path) -> None:
    """Real masks, of the wrong classes."""
    for path in folder.iterdir():
        pixels = np.asarray(Image.open(path))
        Image.fromarray((pixels == 0).astype(np.uint8), "L").save(path)


@pytest.mark.parametrize("spoil", [remove_masks, garble_masks, invert_masks])
def test_masks_make_no_difference(
    tiny_data: Path, tmp_path: Path, with_masks: Path, spoil: Callable[[Path], None]
) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    spoil(root / MASKS)
    run_training(root, tmp_path / "run")
    assert_same_weights(tmp_path / "run", with_masks)


def test_tags_do_make_a_difference(tiny_data: Path, tmp_path: Path, with_masks: Path) -> None:
    """The comparison above can fail: the same with other tags gives other weights."""
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    classes = (root / "classes.txt").read_text().split()
    path = root / "lists" / "tags.csv"
    names = [line.split(",")[0] for line in path.read_text().splitlines()[1:]]
    path.write_text("image,tags\n" + "".join(f"{name},{classes[0]}\n" for name in names))
    run_training(root, tmp_path / "run")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "run", with_masks)


def test_training_opens_no_mask(tiny_data: Path, tmp_path: Path) -> None:
    """Neither a mask nor their folder, through all phases; every training image, though, is opened."""
    with Opened.recorded() as paths:
        run_training(tiny_data, tmp_path / "run")
    images = {Path(path).stem for path in paths if "JPEGImages" in path and Path(path).suffix}
    assert images == set((tiny_data / "lists" / "train.txt").read_text().split())
    assert not [path for path in paths if MASKS in path]


def test_no_default_is_chosen_and_no_worth_told_by_masks(tiny_data: Path, tmp_path: Path) -> None:
    """Settings of a folder, and what is said of a result without masks, come from names, tags and pixels."""
    network = train_tiny(tiny_config(tiny_data, {"data.val_list": "", "schedule.max_steps": 1}), tmp_path).network
    with Opened.recorded() as paths:
        config, _, data = training_config(tiny_data, overrides={"model.weights": "", "train.device": "cpu"})
        worth = measure_worth(network, data.validation(), tiny_config(tiny_data))
    assert config.data.root == str(tiny_data)
    assert worth.num_images == len((tiny_data / "lists" / "val.txt").read_text().split())
    assert not [path for path in paths if MASKS in path and Path(path).suffix]


def test_scoring_is_what_opens_masks(tiny_data: Path, tmp_path: Path) -> None:
    """With evaluation on the way, the masks of the validation list are opened, and those of the training list not."""
    with Opened.recorded() as paths:
        run_training(tiny_data, tmp_path, **{"data.val_list": "lists/val.txt", "train.eval_steps": 3})
    opened = {Path(path).stem for path in paths if MASKS in path and Path(path).suffix}
    assert opened == set((tiny_data / "lists" / "val.txt").read_text().split())


def test_learning_from_tags_never_loads_what_reads_masks_to_learn(tiny_data: Path, tmp_path: Path) -> None:
    """In a process of its own, where no other test has loaded it."""
    config = config_to_toml(tiny_config(tiny_data, {"data.val_list": "", "schedule.max_steps": 4}))
    (tmp_path / "tiny.toml").write_text(config)
    script = (
        "import sys, torch; from pathlib import Path; from afa.config import load_config; "
        "from afa.data.open import open_data; from afa.training.loop import train; "
        "config = load_config('tiny.toml'); "
        "train(config, open_data(config.data), Path('run'), device=torch.device('cpu')); "
        "print('LOADED', 'afa.training.supervised' in sys.modules)"
    )
    process = start_python(["-c", script], cwd=tmp_path)
    out, errors = process.communicate(timeout=120)
    assert "LOADED False" in out, errors


def test_only_full_supervision_opens_training_masks(tiny_data: Path, tmp_path: Path) -> None:
    with Opened.recorded() as paths:
        run_training(tiny_data, tmp_path / "run", **{"train.supervision": "masks"})
    opened = {Path(path).stem for path in paths if MASKS in path and Path(path).suffix}
    assert opened == set((tiny_data / "lists" / "train.txt").read_text().split())


def test_supervised_is_imported_in_two_places_both_guarded() -> None:
    """Only the loop, inside functions, behind a look at `train.supervision`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert "afa.training.supervised" not in plain
        assert names.count("afa.training.supervised") == (2 if path.name == "loop.py" else 0), path
        assert "afa.training.supervised" not in [
            node.module for node in tree.body if isinstance(node, ast.ImportFrom)
        ], path


TRAINING_SIDE = [
    PACKAGE / "training" / "step.py",
    PACKAGE / "training" / "engine.py",
    PACKAGE / "training" / "schedule.py",
    PACKAGE / "training" / "optimizer.py",
    PACKAGE / "types.py",
    PACKAGE / "data" / "loader.py",
    PACKAGE / "data" / "transforms.py",
    *sorted((PACKAGE / "data" / "readers").glob("*.py")),
    *sorted((PACKAGE / "losses").glob("*.py")),
    *sorted((PACKAGE / "pseudo").glob("*.py")),
    *sorted((PACKAGE / "model").glob("*.py")),
]


@pytest.mark.parametrize("path", TRAINING_SIDE, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_what_trains_has_no_way_to_a_mask(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    forbidden = {"MaskedImages", "masked", "read_mask", "mask_dir", "afa.evaluation"}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
            # MaskedImages.mask is the one method that reads a mask.
            assert not (node.attr == "mask" and path.parent.name in ("data", "training")), f"{path}:{node.lineno}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert MASKS not in node.value, f"{path}:{node.lineno}"
        assert not forbidden.intersection(names), f"{path}:{node.lineno}"
        assert not any(name.startswith("afa.evaluation") for name in names), f"{path}:{node.lineno}"
