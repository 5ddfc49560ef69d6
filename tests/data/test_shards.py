"""Data sets in shards: what is read of images and tags, in which order, and what becomes of broken shards."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from afa.config import DataConfig
from afa.data.dataset import ABSENT, PRESENT, UNKNOWN, TaggedImages, Windows
from afa.data.images import read_image, read_size
from afa.data.loader import train_batches
from afa.data.open import DataSet, open_data
from afa.data.order import Order, visits
from afa.data.rows import Rows
from afa.data.stores import expand
from afa.errors import BrokenImageError
from mistakes import refused, said
from stores import FailingStore, empty_store, jpeg, largest_file, samples, tar_of, write_shards
from tiny import assert_same_weights, tiny_config, train_tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "afa" / "shards"


@pytest.fixture
def store() -> Iterator[type[FailingStore]]:
    with empty_store() as found:
        yield found


def found(root: object, **keys: Any) -> DataSet:
    return open_data(DataConfig(root=str(root), **keys))


def states(data: DataSet) -> dict[str, list[int]]:
    """What is known of the classes of each image, by key."""
    table = data._table
    return {name.rpartition("/")[2]: row for name, row in zip(table.names, table.tags.tolist(), strict=True)}


@pytest.mark.parametrize("address", ["", "/{0000..0001}.tar", "/{0000,0001}.tar", "memory"])
def test_images_tags_and_masks(tmp_path: Path, address: str) -> None:
    folder: object = write_shards(tmp_path / "pets", masks=True)
    if address == "memory":
        files = fsspec.filesystem("memory")
        for path in (tmp_path / "pets").iterdir():
            files.pipe(f"/pets/{path.name}", path.read_bytes())
        folder, address = "memory://pets", ""
    data = found(f"{folder}{address}")
    assert (data.kind, data.classes, data.has_masks) == ("shards", ("cat", "dog"), True)
    images = data.tagged()
    assert list(images.names) == [f"000{n // 6}/{n:05d}" for n in range(12)]
    path = images.image_path(7)
    assert (str(path), path.name, path.stat().st_size) == (f"{folder}/0001.tar/00007.jpg", "00007.jpg", len(jpeg(7)))
    assert images.image(7).shape == (16, 24, 3)
    assert read_size(path) == (16, 24)
    with Rows(path) as rows:
        assert np.array_equal(rows.take(99), images.image(7))
    assert images.subset([7, 2]).names[0] == "0001/00007"
    scored = data.masked()
    for index in range(len(scored)):
        number = int(scored.names[index][-5:])
        assert set(np.unique(scored.mask(index))) == {0, number % 2 + 1}


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    images = found(write_shards(tmp_path / "pets", 1)).tagged()
    (tmp_path / "a.jpg").write_bytes(jpeg(3))
    assert np.array_equal(images.image(3), read_image(tmp_path / "a.jpg"))


@pytest.mark.parametrize(
    ("suffix", "content", "expected"),
    [
        ("json", {"tags": ["cat"]}, [PRESENT, ABSENT]),
        ("json", {"labels": "cat;dog"}, [PRESENT, PRESENT]),
        ("json", {"label": "dog", "caption": "two dogs"}, [ABSENT, PRESENT]),
        ("json", {"labels": []}, [ABSENT, ABSENT]),
        ("json", {"labels": None}, [UNKNOWN, UNKNOWN]),
        ("json", {"labels": [1]}, [ABSENT, PRESENT]),
        ("json", ["dog"], [ABSENT, PRESENT]),
        ("json", {"objects": {"categories": ["cat", "cat"]}}, [PRESENT, ABSENT]),
        ("json", {"url": "x", "width": 3}, [UNKNOWN, UNKNOWN]),
        ("cls", "1", [ABSENT, PRESENT]),
        ("cls", "-1", [UNKNOWN, UNKNOWN]),
        ("cls", "dog", [ABSENT, PRESENT]),
        ("txt", "cat, dog", [PRESENT, PRESENT]),
        ("txt", "cat\ndog\n", [PRESENT, PRESENT]),
        ("txt", "none", [ABSENT, ABSENT]),
        ("txt", "?", [UNKNOWN, UNKNOWN]),
        ("none", "", [UNKNOWN, UNKNOWN]),
    ],
)
def test_tags_have_three_states(tmp_path: Path, suffix: str, content: Any, expected: list[int]) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    members = {"a.jpg": jpeg(1), f"a.{suffix}": text.encode(), "b.webp": jpeg(2), "b.json": b'{"tags": ["cat"]}'}
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    data = found(tmp_path)
    assert states(data) == {"a": expected, "b": [PRESENT, ABSENT]}
    assert data.untagged == (("x/a",) if expected == [UNKNOWN, UNKNOWN] else ())


def test_columns_of_classes_may_be_unknown(tmp_path: Path) -> None:
    rows = {"a": {"cat": 1, "dog": 0}, "b": {"cat": None, "dog": 1}, "c": {"cat": 0, "dog": 0}}
    members = [
        (f"{k}.{s}", c) for k, v in rows.items() for s, c in (("jpg", jpeg(1)), ("json", json.dumps(v).encode()))
    ]
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    assert states(found(tmp_path)) == {"a": [1, 0], "b": [UNKNOWN, 1], "c": [0, 0]}


def test_sides_are_those_of_shards_folders_and_samples(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", 1)
    write_shards(tmp_path / "val", 1)
    data = found(tmp_path)
    assert (len(data.train()), set(data.validation().names)) == (6, {f"val/0000/{n:05d}" for n in range(6)})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "pets-train-0.tar").write_bytes(samples(4))
    (tmp_path / "b" / "pets-val-0.tar").write_bytes(samples(3, start=4))
    data = found(tmp_path / "b" / "{pets-train-0,pets-val-0}.tar")
    assert (len(data.train()), len(data.validation())) == (4, 3)
    members = {"a.jpg": jpeg(1), "a.json": b'{"tags": ["cat"], "split": "val"}'}
    (tmp_path / "b" / "more.tar").write_bytes(tar_of(members))
    assert found(tmp_path / "b").validation().names[0] == "more/a"


def test_an_index_is_made_once_and_anew_when_the_shard_changes(tmp_path: Path, cache: Path) -> None:
    folder = write_shards(tmp_path / "pets", 1)
    first = found(folder).tagged().image_path(0).stat()
    written = {path: path.stat().st_mtime_ns for path in cache.glob("*.index")}
    assert found(folder).tagged().image_path(0).stat() == first
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*.index")} == written
    (folder / "0000.tar").write_bytes(samples(6, start=50))
    again = found(folder).tagged()
    assert again.names[0] == "0000/00050"
    assert again.image_path(0).stat().st_mtime_ns != first.st_mtime_ns
    next(iter(written)).write_bytes(b"broken")
    for path in cache.glob("*.index"):
        path.write_bytes(b"\x93")
    assert found(folder).tagged().names[0] == "0000/00050"


@pytest.mark.parametrize(("left", "count"), [(600, 0), (1536, 1), (3000, 1), (5000, 2), (-1, 6), (-20, 6)])
def test_a_shard_that_is_cut_short_keeps_its_whole_samples(tmp_path: Path, left: int, count: int) -> None:
    folder = write_shards(tmp_path / "pets", 2)
    content = (folder / "0001.tar").read_bytes()
    end = content.rstrip(b"\0")
    (folder / "0001.tar").write_bytes(content[:left] if left > 0 else content[: -(-len(end) // 512) * 512 + left + 1])
    data = found(folder)
    assert sum(name.startswith("0001/") for name in data._table.names) == count
    assert [note for note in data.notes if "0001.tar: is cut short or broken at byte" in note]


def test_samples_that_lead_elsewhere_or_come_twice_are_named(tmp_path: Path) -> None:
    members = [
        ("a.jpg", jpeg(1)), ("a.cls", b"cat"), ("a.jpg", jpeg(2)), ("../../b.jpg", jpeg(3)), ("/c.jpg", jpeg(3)),
        ("d\n.jpg", jpeg(4)), ("e.jpg", jpeg(5)), ("e.json", b"{"), ("./f/g.v1.jpg", jpeg(6)), ("f/g.v1.cls", b"dog"),
        ("._a.jpg", b"litter"), ("readme.md", b"x"),
    ]  # fmt: skip
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    data = found(tmp_path)
    assert states(data) == {"a": [1, 0], "e": [-1, -1], "g.v1": [0, 1]}
    notes = "\n".join(data.notes)
    for words in ("'a.jpg' is there a second time", "'../../b.jpg' leads elsewhere", "e: its tags cannot be read"):
        assert words in notes
    assert len([note for note in data.notes if "leads elsewhere" in note]) == 3


def test_a_broken_image_is_named_and_left_out(tmp_path: Path) -> None:
    members = {
        "a.jpg": jpeg(1),
        "a.cls": b"cat",
        "b.jpg": jpeg(2)[:200],
        "b.cls": b"dog",
        "c.jpg": b"",
        "c.cls": b"cat",
    }
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    images = found(tmp_path, val_list="").train()
    with pytest.raises(BrokenImageError, match=r"x\.tar/b\.jpg: cannot be read as an image"):
        images.image(1)
    with pytest.raises(BrokenImageError, match=r"x\.tar/c\.jpg: the file is empty"):
        images.image(2)
    data = found(tmp_path, skip_broken=True, val_list="")
    data.leave_out_broken()
    assert list(data.train().names) == ["x/a"]


def test_mistakes(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "pets", 1)
    (tmp_path / "a.tar").write_bytes(b"no archive" * 100)
    assert "a.tar: is no tar archive without compression" in said(found, tmp_path / "a.tar")
    assert "0001.tar: no such file or folder; check the address" in said(found, f"{folder}/{{0000..0001}}.tar")
    assert "memory://nothing: no such file or folder; check the address" in said(found, "memory://nothing")
    assert "nowhere://a: Protocol not known" in said(found, "nowhere://a")
    (folder / "classes.txt").write_text("cat\nbird\n")
    assert "0000.tar, 00001, image '00001': unknown tag 'dog'; allowed: cat, bird" in said(found, folder)
    with refused("more than 1,000,000 addresses"):
        expand("{0..2000000}.tar")
    (tmp_path / "b.tar").write_bytes(tar_of({"a.jpg": jpeg(1), "a.cls": b"3"}))
    assert "b.tar, a holds 3; cast it to ClassLabel, or give the names" in said(found, tmp_path / "b.tar")


def test_a_shard_that_cannot_be_read_can_be_left_out(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "pets", 2)
    (folder / "0001.tar").write_bytes(b"no archive" * 100)
    assert "0001.tar: is no tar archive" in said(found, folder)
    data = found(folder, skip_broken=True)
    assert len(data.tagged()) == 6
    assert [note for note in data.notes if "0001.tar: is no tar archive" in note]


class TestStores:
    def put(self, store: type[FailingStore], count: int = 3) -> None:
        for number in range(count):
            fsspec.filesystem("failing").pipe(f"/pets/{number:04d}.tar", samples(6, start=6 * number))

    def test_a_store_that_fails_at_times_is_asked_again(self, store: type[FailingStore]) -> None:
        self.put(store)
        store.failures, store.cut = 2, 1
        images = found("failing://pets").tagged()
        assert [images.image(n).shape for n in range(18)] == [(16, 24, 3)] * 18
        assert store.failures == store.cut == 0

    def test_a_store_that_keeps_failing_is_named(self, store: type[FailingStore]) -> None:
        self.put(store)
        store.failures = -1
        text = said(found, "failing://pets", store_retries=1)
        assert text.startswith("failing://pets: the store failed 2 times (503 Slow Down); try again later, or raise")
        store.failures = 0
        images = found("failing://pets").tagged()
        store.failures = -1
        assert images.image(0).shape == (16, 24, 3)  # it is here

    def test_the_cache_keeps_to_its_limit(self, store: type[FailingStore], cache: Path) -> None:
        self.put(store, 6)
        size = len(samples(6))
        data = found("failing://pets", shard_gib=2.5 * size / 2**30)
        images = data.tagged()
        for index in (0, 35, 12, 0, 18, 35):
            images.image(index)
            assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= 2.5 * size
        calls = store.calls
        images.image(35)
        assert store.calls == calls
        assert images.windows is not None
        assert images.windows.size == 1

    def test_classes_beside_the_shards(self, store: type[FailingStore]) -> None:
        self.put(store, 1)
        fsspec.filesystem("failing").pipe("/pets/classes.txt", b"dog #ff0000\ncat\n")
        for address in ("failing://pets", "failing://pets/0000.tar", "failing://pets/{0000..0000}.tar"):
            assert found(address).classes == ("dog", "cat")
        fsspec.filesystem("failing").rm("/pets/classes.txt")
        assert found("failing://pets").classes == ("cat", "dog")

    def test_a_full_disk_is_one_line(self, store: type[FailingStore], cache: Path) -> None:
        self.put(store, 1)
        with largest_file(1000):
            text = said(found, "failing://pets")
        assert "failing://pets/0000.tar: no room on the disk" in text
        assert not [path for path in cache.iterdir() if path.suffix not in (".lock", "") and path.stat().st_size]
        assert len(found("failing://pets").tagged()) == 6


def windows(num_shards: int, each: int, size: int) -> Windows:
    return Windows(np.repeat(np.arange(num_shards, dtype=np.int32), each), size, num_shards)


def test_an_order_stays_within_windows_and_visits_all() -> None:
    few = windows(10, 7, 3)
    order = visits(70, range(70), seed=4, windows=few)
    assert sorted(order.tolist()) == list(range(70))
    shards = order // 7
    for start, stop in ((0, 21), (21, 42), (42, 63), (63, 70)):
        assert len(set(shards[start:stop].tolist())) == (3 if stop < 70 else 1)
    assert len(set(shards[:21].tolist())) == 3
    assert shards[:21].tolist() != sorted(shards[:21].tolist())
    parts = [visits(70, range(a, a + 5), seed=4, windows=few) for a in range(0, 70, 5)]
    assert np.array_equal(np.concatenate(parts), order)
    assert visits(70, range(70, 140), seed=4, windows=few).tolist() != order.tolist()
    assert np.array_equal(visits(70, range(70), seed=4, windows=windows(10, 7, 10)), visits(70, range(70), seed=4))


def test_images_with_and_without_a_class_come_from_the_same_window(tmp_path: Path) -> None:
    tags = np.tile(np.array([[1, 0], [0, 0], [0, 1]], dtype=np.int8), (40, 1))
    names = tuple(map(str, range(120)))
    images = TaggedImages(classes=("a", "b"), names=names, paths=names, tags=tags, windows=windows(12, 10, 2))
    order = Order(images, tiny_config(tmp_path, {"schedule.batch_size": 6}))
    for step in range(20):
        shards = {int(index) // 10 for index in order.indices(step)}
        assert len(shards) <= 4  # of this window, and of the next where one ends


def test_batches_go_on_exactly_and_are_those_of_one_process(store: type[FailingStore]) -> None:
    from afa.runtime import Processes

    for number in range(6):
        fsspec.filesystem("failing").pipe(f"/pets/{number:04d}.tar", samples(6, start=6 * number))
    keys = {"data.shard_gib": 2.5 * len(samples(6)) / 2**30, "data.workers": 2, "schedule.max_steps": 12}
    config = tiny_config("failing://pets", {**keys, "data.val_list": ""})  # type: ignore[arg-type]
    images = open_data(config.data).train()
    assert images.windows is not None
    whole = list(train_batches(images, config))
    rest = list(train_batches(open_data(config.data).train(), config, start=7))
    assert [batch.names for batch in whole[7:]] == [batch.names for batch in rest]
    assert all(bool((a.image == b.image).all()) for a, b in zip(whole[7:], rest, strict=True))
    parts = [list(train_batches(images, config, processes=Processes(rank, 2))) for rank in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(batch.names) == sorted(name for share in shares for name in share.names)


def test_training_on_shards_is_training_on_files(tmp_path: Path) -> None:
    for number in range(12):
        path = tmp_path / "files" / ("dog" if number % 2 else "cat") / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    shard = tar_of(
        (f"{path.stem}.{suffix}", path.read_bytes() if suffix == "jpg" else path.parent.name.encode())
        for path in sorted((tmp_path / "files").rglob("*.jpg"))
        for suffix in ("jpg", "cls")
    )
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").write_bytes(shard)
    for kind in ("files", "shards"):
        train_tiny(
            tiny_config(tmp_path / kind, {"data.val_list": "", "schedule.max_steps": 4}), tmp_path / f"run {kind}"
        )
    assert_same_weights(tmp_path / "run files", tmp_path / "run shards")


def test_memory_hardly_grows_with_the_images(tmp_path: Path) -> None:
    content = tar_of((f"{n:06d}.{s}", b"x" if s == "jpg" else b"1") for n in range(1000) for s in ("jpg", "cls"))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(content)
    found(tmp_path)  # makes the indices
    tracemalloc.start()
    images = found(tmp_path, val_list="").train()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(images) == 2_000
    assert kept / len(images) < 100  # bytes
