"""Rows on disk: what was committed is there, what was not is not, and sizes are checked before anything is written."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from afa.errors import AfaError
from afa.training import feature_store
from afa.training.feature_store import FeatureStore, remove_store
from mistakes import refused

NUM_ROWS, ROW_SIZE = 7, 5
LIMITS: dict[str, Any] = {"setting": "train.feature_cache_gib", "advice": "lower it"}


def make_rows(first: int, end: int) -> NDArray[np.float16]:
    return np.arange(first * ROW_SIZE, end * ROW_SIZE, dtype=np.float16).reshape(-1, ROW_SIZE)


def new_store(folder: Path) -> FeatureStore:
    store = FeatureStore(folder, {"key": {"crop": 3}}, num_rows=NUM_ROWS, row_size=ROW_SIZE)
    store.reserve(1.0, **LIMITS)
    return store


def reopen(folder: Path) -> FeatureStore:
    store = FeatureStore.open(folder)
    assert store is not None
    return store


def test_rows_come_back(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    store.write(make_rows(0, 4))
    store.write(make_rows(4, 7))
    store.commit()
    for each in (store, reopen(tmp_path / "store")):
        assert each.is_complete
        assert each.about == {"key": {"crop": 3}}
        assert each.num_bytes == NUM_ROWS * ROW_SIZE * 2
        np.testing.assert_array_equal(np.stack([each.row(index) for index in range(NUM_ROWS)]), make_rows(0, NUM_ROWS))
    with pytest.raises(ValueError, match="read-only"):
        store.row(0)[0] = 1


def test_what_was_not_committed_is_made_again(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    store.write(make_rows(0, 2))
    store.commit()
    store.write(np.full((3, ROW_SIZE), -1, dtype=np.float16))
    store = reopen(tmp_path)
    assert (store.num_done, store.is_complete) == (2, False)
    with pytest.raises(AssertionError):
        store.row(2)
    store.write(make_rows(2, NUM_ROWS))
    store.commit()
    store = reopen(tmp_path)
    np.testing.assert_array_equal(np.stack([store.row(index) for index in range(NUM_ROWS)]), make_rows(0, NUM_ROWS))


def test_the_index_never_counts_rows_that_are_not_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path)
    store.write(make_rows(0, 2))
    synced: list[bool] = []

    def fail(_: int) -> None:
        synced.append((tmp_path / "index.json").exists())
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(feature_store.os, "fsync", fail)
    with pytest.raises(AfaError, match="broken"):
        store.commit()
    assert synced == [False]
    assert FeatureStore.open(tmp_path) is None


@pytest.mark.parametrize("damage", ["absent", "no_json", "short", "no_rows"])
def test_what_is_damaged_does_not_count(tmp_path: Path, damage: str) -> None:
    store = new_store(tmp_path)
    store.write(make_rows(0, NUM_ROWS))
    store.commit()
    if damage == "absent":
        (tmp_path / "index.json").unlink()
    elif damage == "no_json":
        (tmp_path / "index.json").write_text("{")
    elif damage == "no_rows":
        (tmp_path / "rows.bin").unlink()
    else:
        with (tmp_path / "rows.bin").open("r+b") as file:
            file.truncate(NUM_ROWS * ROW_SIZE * 2 - 1)
    assert FeatureStore.open(tmp_path) is None


def test_limit_names_both_sizes(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "new", {}, num_rows=3 * 2**20, row_size=2**10)
    with refused("6.0 GiB", "train.feature_cache_gib is 2.5 GiB; raise"):
        store.reserve(2.5, **LIMITS)
    assert not (tmp_path / "new").exists()


def test_disk_must_have_room_for_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 2 * 2**30

    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: Usage)
    fields: dict[str, Any] = {"num_rows": 3 * 2**20, "row_size": 2**10}
    with pytest.raises(AfaError, match=r"6\.0 GiB.* 2\.0 GiB.*data\.feat"):
        FeatureStore(tmp_path, {}, **fields).reserve(1000.0, **LIMITS)
    FeatureStore(tmp_path, {}, num_done=2 * 2**20, **fields).reserve(1000.0, **LIMITS)


def test_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(AfaError, match=r"rows\.bin.*No space left.*room"):
        store.write(make_rows(0, 1))


def test_removing_leaves_what_is_not_of_the_store(tmp_path: Path) -> None:
    for name in ("alone", "shared"):
        store = new_store(tmp_path / name)
        store.write(make_rows(0, 1))
        store.commit()
    (tmp_path / "shared" / "notes.txt").write_text("mine")
    for name in ("alone", "shared", "nowhere"):
        remove_store(tmp_path / name)
    assert not (tmp_path / "alone").exists()
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["notes.txt"]


def test_index_is_json_that_people_can_read(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    store.write(make_rows(0, 1))
    store.commit()
    index = json.loads((tmp_path / "index.json").read_text())
    assert index == {"about": {"key": {"crop": 3}}, "num_rows": NUM_ROWS, "row_size": ROW_SIZE, "num_done": 1}
