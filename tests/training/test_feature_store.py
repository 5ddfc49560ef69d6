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

SIZES = [5, 3, 8, 1, 5, 5, 2]
LIMITS: dict[str, Any] = {"setting": "train.feature_cache_gib", "advice": "lower it"}


def make_rows(first: int, end: int) -> list[NDArray[np.float16]]:
    return [np.arange(100 * row, 100 * row + SIZES[row], dtype=np.float16) for row in range(first, end)]


def write(store: FeatureStore, first: int, end: int) -> None:
    for number, row in enumerate(make_rows(first, end), first):
        store.write(10 - number, row)


def assert_whole(store: FeatureStore) -> None:
    for index, row in enumerate(make_rows(0, len(SIZES))):
        np.testing.assert_array_equal(store.row(10 - index), row)


def new_store(folder: Path) -> FeatureStore:
    store = FeatureStore(folder, {"key": {"crop": 3}})
    store.reserve(2 * sum(SIZES), 1.0, **LIMITS)
    return store


def reopen(folder: Path) -> FeatureStore:
    store = FeatureStore.open(folder)
    assert store is not None
    return store


def test_rows_come_back(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    write(store, 0, 7)
    store.commit()
    for each in (store, reopen(tmp_path / "store")):
        assert each.missing([7, 3, 11, 4, 0]) == [3, 11, 0]
        assert each.about == {"key": {"crop": 3}}
        assert each.num_bytes == 2 * sum(SIZES)
        assert_whole(each)
    with pytest.raises(ValueError, match="read-only"):
        store.row(10)[0] = 1


def test_what_was_not_committed_is_made_again(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    write(store, 0, 2)
    store.commit()
    store.write(8, np.full(SIZES[2], -1, dtype=np.float16))
    assert store.missing([10, 9, 8]) == [8]
    with pytest.raises(AssertionError):
        store.row(8)
    store = reopen(tmp_path)
    assert (store.num_done, store.missing([10, 9, 8])) == (2, [8])
    write(store, 2, 7)
    store.commit()
    assert_whole(reopen(tmp_path))


def test_several_writers_each_write_a_part(tmp_path: Path) -> None:
    """One of two writers is killed before it commits all; one process or other writers go on with what is missing."""
    new_store(tmp_path).commit()
    for writer, rows, lost in ((0, (0, 3, 4), ()), (1, (1, 2), (5,))):
        part = reopen(tmp_path).part(writer)
        for row in rows:
            write(part, row, row + 1)
        part.commit()
        for row in lost:
            write(part, row, row + 1)
    store = reopen(tmp_path)
    assert store.missing(range(4, 11)) == [4, 5]
    assert store.num_bytes == 2 * sum(SIZES[:5])
    write(store, 5, 6)
    store.commit()
    part = reopen(tmp_path).part(1)
    write(part, 6, 7)
    part.commit()
    assert_whole(reopen(tmp_path))
    remove_store(tmp_path)
    assert not tmp_path.exists()


def test_the_index_never_counts_rows_that_are_not_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path)
    write(store, 0, 2)
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
    write(store, 0, 7)
    store.commit()
    if damage == "absent":
        (tmp_path / "index.json").unlink()
    elif damage == "no_json":
        (tmp_path / "index.json").write_text("{")
    elif damage == "no_rows":
        (tmp_path / "rows.bin").unlink()
    else:
        with (tmp_path / "rows.bin").open("r+b") as file:
            file.truncate(2 * sum(SIZES) - 1)
    assert FeatureStore.open(tmp_path) is None


def test_limit_names_both_sizes(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "new", {})
    with refused("6.0 GiB", "train.feature_cache_gib is 2.5 GiB; raise"):
        store.reserve(6 * 2**30, 2.5, **LIMITS)
    assert not (tmp_path / "new").exists()


def test_disk_must_have_room_for_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 2 * 2**30

    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: Usage)
    store = FeatureStore(tmp_path, {}, numbers=range(2**11), sizes=[2**20] * 2**11)
    with pytest.raises(AfaError, match=r"6\.0 GiB.* 2\.0 GiB.*data\.feat"):
        store.reserve(6 * 2**30, 1000.0, **LIMITS)
    store.reserve(2 * 2**30, 1000.0, **LIMITS)


def test_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(AfaError, match=r"rows\.bin.*No space left.*room"):
        write(store, 0, 1)


def test_removing_leaves_what_is_not_of_the_store(tmp_path: Path) -> None:
    for name in ("alone", "shared"):
        store = new_store(tmp_path / name)
        write(store, 0, 1)
        store.commit()
    (tmp_path / "shared" / "notes.txt").write_text("mine")
    for name in ("alone", "shared", "nowhere"):
        remove_store(tmp_path / name)
    assert not (tmp_path / "alone").exists()
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["notes.txt"]


def test_index_is_json_that_people_can_read(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    write(store, 0, 1)
    store.commit()
    index = json.loads((tmp_path / "index.json").read_text())
    assert index == {"about": {"key": {"crop": 3}}, "numbers": [10], "sizes": SIZES[:1]}
