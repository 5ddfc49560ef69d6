"""Every format: the same files for the same masks, one mask at a time, whole or not at all, and clear refusals."""

from __future__ import annotations

import os
import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from afa.data.palette import write_index_png
from afa.errors import AfaError
from afa.formats.job import MaskItem
from afa.formats.write import FORMATS, FormatResult, mask_items, parse_formats, write_format
from made_masks import CLASSES, labels, write_items

GENERAL = [name for name in FORMATS if name != "voc_test"]  # which has classes and names of its own
FOLDERS = [name for name, info in FORMATS.items() if "." not in info.output]


def write(format: str, items: object, out: Path, **settings: object) -> FormatResult:
    return write_format(format, items, CLASSES, out, **settings)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", GENERAL)
def test_the_same_masks_give_the_same_files(tmp_path: Path, format: str) -> None:
    items = write_items(tmp_path)
    result = write(format, items, tmp_path / "one")
    assert result.num_images == len(items)
    assert str(result).startswith(f"5 images written as {format} to {result.path}")
    assert [path.name for path in (tmp_path / "one").iterdir()] == [FORMATS[format].output]
    write(format, items, tmp_path / "two")
    write(format, items, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("format", GENERAL)
def test_masks_are_read_one_at_a_time(tmp_path: Path, format: str) -> None:
    items = write_items(tmp_path)

    def passing() -> Iterator[MaskItem]:
        for item in items:
            yield item
            item.mask_path.unlink()

    write(format, passing(), tmp_path / "out")
    assert not any(item.mask_path.exists() for item in items)


@pytest.mark.parametrize("format", GENERAL)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"])
def test_a_failure_leaves_the_earlier_result(tmp_path: Path, format: str, error: BaseException) -> None:
    items = write_items(tmp_path)
    out = tmp_path / "out"

    def failing() -> Iterator[MaskItem]:
        yield from items[:3]
        raise error

    for before in ({}, None):
        if before is None:
            write(format, items, out)
            before = contents(out)
        with pytest.raises((AfaError, KeyboardInterrupt)) as raised:
            write(format, failing(), out)
        if isinstance(error, OSError):
            message = f"{out / FORMATS[format].output}: cannot be written (No space left on device); free space"
            assert str(raised.value).startswith(message)
        assert contents(out) == before
        assert not any(path.name.startswith(".") for path in out.iterdir())


@pytest.mark.parametrize("format", GENERAL)
def test_a_file_that_cannot_grow_leaves_nothing(tmp_path: Path, format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 4, (90, 90), dtype=np.uint8)
    items = write_items(tmp_path, [noise])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(AfaError, match=r"cannot be written \(File too large\)"):
            write(format, items, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path / "out") == {}
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("format", FOLDERS)
def test_what_a_killed_call_left_is_replaced(tmp_path: Path, format: str) -> None:
    items = write_items(tmp_path)
    partial = tmp_path / "out" / f".{FORMATS[format].output}.partial"
    partial.mkdir(parents=True)
    (partial / "half").write_text("")
    result = write(format, items, tmp_path / "out")
    assert not partial.exists()
    assert not (result.path / "half").exists()


def test_images_that_are_gone_leave_the_result(tmp_path: Path) -> None:
    items = write_items(tmp_path)
    write("yolo", items, tmp_path / "out")
    result = write("yolo", items[:2], tmp_path / "out")
    assert len(list((result.path / "labels").rglob("*.txt"))) == 2


def test_folders_of_others_are_not_replaced(tmp_path: Path) -> None:
    items = write_items(tmp_path)
    mine = tmp_path / "out" / "yolo" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(AfaError, match=r"yolo: .*not written by afa; move"):
        write("yolo", items, tmp_path / "out")
    assert contents(tmp_path / "out") == {"yolo/mine.txt": b"mine"}
    (tmp_path / "out" / "coco.json").mkdir()
    with pytest.raises(AfaError, match=r"coco\.json: is a folder; move it"):
        write("coco", items, tmp_path / "out")
    (tmp_path / "out" / "hf").write_text("")
    with pytest.raises(AfaError, match=r"hf: is a file; move it"):
        write("hf", items, tmp_path / "out")


def test_corrected_annotations_are_not_replaced(tmp_path: Path) -> None:
    items = write_items(tmp_path)
    result = write("labelme", items, tmp_path / "out")
    corrected = result.path / f"{items[0].name}.json"
    corrected.write_text("corrected by hand")
    os.utime(corrected, ns=(0, (result.path / ".afa-format").stat().st_mtime_ns + 1))
    with pytest.raises(AfaError, match=r"labelme: sub/ö\.0\.json .*changed.*move"):
        write("labelme", items, tmp_path / "out")
    assert corrected.read_text() == "corrected by hand"


def test_caches_and_changed_images_do_not_hinder(tmp_path: Path) -> None:
    items = write_items(tmp_path)
    result = write("yolo", items, tmp_path / "out")
    later = (result.path / ".afa-format").stat().st_mtime_ns + 10**9
    (result.path / "labels.cache").write_text("")
    os.utime(result.path / "labels.cache", ns=(later, later))
    os.utime(items[0].image_path, ns=(later, later))
    write("yolo", items, tmp_path / "out")


def test_images_are_linked_or_else_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = write_items(tmp_path)
    linked = write("mmseg", items, tmp_path / "one").path / "img_dir" / items[0].file_name
    assert linked.samefile(items[0].image_path)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    copied = write("mmseg", items, tmp_path / "two").path / "img_dir" / items[0].file_name
    assert not copied.samefile(items[0].image_path)
    assert copied.read_bytes() == items[0].image_path.read_bytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../up", "leads out of the output"),
        ("/top", "leads out of the output"),
        ("", "leads out of the output"),
        ("two\nlines", "line break"),
        ("nul\0", "line break"),
        ("not\udcff", "not UTF-8"),
    ],
)
def test_names_that_cannot_be_written(tmp_path: Path, name: str, message: str) -> None:
    (item, *_) = write_items(tmp_path)
    with pytest.raises(AfaError, match=message) as raised:
        write("voc", [MaskItem(name, item.image_path, item.mask_path)], tmp_path / "out")
    assert len(str(raised.value).splitlines()) == 1
    assert contents(tmp_path / "out") == {}


def test_what_else_is_refused(tmp_path: Path) -> None:
    items = write_items(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(AfaError, match=r"format 'coc'; use .*coco, cvat"):
        write("coc", items, out)
    with pytest.raises(AfaError, match=r"coco\.json: .*no mask .*; predict"):
        write("coco", [], out)
    with pytest.raises(AfaError, match=r"ö\.0\.png: .*value 2, .*1 classes; write"):
        write_format("coco", items, CLASSES[:1], out)
    items[2].image_path.unlink()
    with pytest.raises(AfaError, match=r"ö\.2\.jpg: no such image; keep"):
        write("yolo", items, out)
    items[3].mask_path.unlink()
    with pytest.raises(AfaError, match=r"im 3\.png: no such image"):
        write("coco", items, out)
    assert contents(out) == {}


@pytest.mark.parametrize(
    ("colors", "message"),
    [
        ([(1, 2, 3), (4, 5, 6), (1, 2, 3)], r"'Straße' .*\(1, 2, 3\), .*'cat'; give"),
        ([(1, 2, 3), (0, 0, 0), (4, 5, 6)], r"'potted plant' .*\(0, 0, 0\), .*background"),
        ([(1, 2, 3), (4, 5, 6), (0, 0, 256)], r"'Straße' .*\(0, 0, 256\); give"),
    ],
)
def test_colors_must_tell_classes_apart(tmp_path: Path, colors: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(AfaError, match=message):
        write("voc", write_items(tmp_path), tmp_path / "out", colors=colors)


def test_names_of_formats() -> None:
    assert parse_formats("coco") == ("coco",)
    assert parse_formats("cvat, coco,cvat") == ("cvat", "coco")
    with pytest.raises(AfaError, match="unknown format ''; use one of coco"):
        parse_formats("coco,")


def test_many_masks_do_not_grow_memory(tmp_path: Path) -> None:
    """The JSON is far larger than what is held at once."""
    (item,) = write_items(tmp_path, [labels()[2]])
    peaks = []
    for count in (10, 100):
        tracemalloc.start()
        write("labelstudio", (item for _ in range(count)), tmp_path / "out")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "out" / "labelstudio" / "tasks.json").stat().st_size > 2 * peaks[1]
    assert peaks[1] < 1.5 * peaks[0]


def test_a_speck_is_not_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    write_index_png(path, np.ones((1, 1), dtype=np.uint8))
    for format in ("coco", "cvat", "labelme", "labelstudio", "panoptic"):
        assert write(format, [MaskItem("x", path, path)], tmp_path / "out").num_images == 1


def test_items_are_the_images_with_a_mask(tmp_path: Path) -> None:
    items = write_items(tmp_path)
    items[1].mask_path.unlink()
    found = mask_items([(item.name, item.image_path) for item in items], tmp_path)
    assert found == [items[0], *items[2:]]
