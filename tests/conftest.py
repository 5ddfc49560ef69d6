"""What several test files share: one thread, a small generated data set, and a finished run on it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Keep PyTorch, here and in subprocesses, to one thread: small tensors gain nothing from more."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is no CUDA device."""
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of generated shapes: 24 training and 6 validation images of 64 pixels. Not to be written to."""
    from afa.demo.write import write_shapes

    root = tmp_path_factory.mktemp("tiny") / "data"
    write_shapes(root, num_train=24, num_val=6, image_size=64)
    return root


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run through all three phases on `tiny_data`. Not to be written to."""
    from afa.api import train_and_report
    from tiny import tiny_config

    run = tmp_path_factory.mktemp("tiny") / "run"
    train_and_report(tiny_config(tiny_data), run)
    return run


@pytest.fixture(scope="session")
def tiny_table(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `tiny_data` in the layout of a table of tags, without masks. Not to be written to."""
    root = tmp_path_factory.mktemp("table") / "pets"
    shutil.copytree(tiny_data / "JPEGImages", root / "images")
    shutil.copy(tiny_data / "lists" / "tags.csv", root)
    return root


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of the real images, weights and vectors: $AFA_SHARED, else `shared` beside the repository."""
    beside = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("AFA_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder
