"""Masks of images in shards, and shards of masks: the same masks as of files, whatever goes wrong on the way."""

from __future__ import annotations

import io
import json
import re
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from afa import runtime
from afa.api import predict, pseudo_labels
from afa.cli import main
from afa.config import DataConfig
from afa.data.palette import index_png
from afa.inference.shards import ShardFolder
from afa.runs.files import only_writer
from mistakes import said
from stores import FailingStore, empty_store, jpeg, largest_file, samples, tar_of, write_shards
from tiny import start_python, write_untrained

CLASSES = ("cat", "dog")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store() -> Iterator[type[FailingStore]]:
    with empty_store() as found:
        yield found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_untrained(tmp_path / "run", CLASSES, {"train.device": "cpu"})
    return tmp_path / "run"


@pytest.fixture
def expected(run: Path, tmp_path: Path) -> dict[str, bytes]:
    """The masks of images 0 to 11 as files, by key."""
    for number in range(12):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{number:05d}.jpg").write_bytes(jpeg(number))
    predict(run, tmp_path / "photos", tmp_path / "files")
    return {path.stem: path.read_bytes() for path in (tmp_path / "files" / "masks").iterdir()}


def packed(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".tar"}


@pytest.mark.parametrize("way", ["expanded", "pattern", "folder"])
def test_shards_give_the_masks_of_files(run: Path, tmp_path: Path, expected: dict[str, bytes], way: str) -> None:
    folder = write_shards(tmp_path / "pets")
    words = {
        "expanded": [str(folder / "0000.tar"), str(folder / "0001.tar")],
        "pattern": [f"{folder}/{{0000..0001}}.tar"],
        "folder": [str(folder)],
    }[way]
    out = tmp_path / "out"
    assert main(["predict", str(run), *words, "--out", str(out)]) == 0
    found = {f"{p.parent.name}/{p.stem}": p.read_bytes() for p in (out / "masks").rglob("*.png")}
    assert found == {f"{int(key) // 6:04d}/{key}": content for key, content in expected.items()}
    assert len(list((out / "overlays").rglob("*.jpg"))) == 12
    written = {path: path.stat().st_mtime_ns for path in (out / "masks").rglob("*.png")}
    assert main(["predict", str(run), *words, "--out", str(out), "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert main(["predict", str(run), *words, "--out", str(out)]) == 0
    assert all(path.stat().st_mtime_ns > before for path, before in written.items())


def test_shards_of_a_stated_size(run: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    folder = write_shards(tmp_path / "pets")
    summary = predict(run, [folder], tmp_path / "out", out_shards=5)
    assert (summary.written, summary.failed) == (12, ())
    shards = shards_in(tmp_path / "out")
    assert {name: len(packed(content)) for name, content in shards.items()} == {
        "000000.tar": 5, "000001.tar": 5, "000002.tar": 2,
    }  # fmt: skip
    found = {name: mask for content in shards.values() for name, mask in packed(content).items()}
    assert found == {f"{int(key) // 6:04d}/{key}.mask.png": mask for key, mask in expected.items()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "predict.json", *shards, *(f"{name[:-4]}.masks.json" for name in shards),
    }  # fmt: skip
    predict(run, [tmp_path / "photos"], tmp_path / "other", out_shards=12)
    assert packed(shards_in(tmp_path / "other")["000000.tar"]) == {f"{k}.mask.png": m for k, m in expected.items()}


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_run_lengths(run: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    folder = write_shards(tmp_path / "pets")
    predict(run, [folder], tmp_path / "out", out_shards=12, rle=True)
    found = packed(shards_in(tmp_path / "out")["000000.tar"])
    assert len(found) == 12
    for name, content in found.items():
        told = json.loads(content)
        label = np.zeros(told["size"], dtype=np.uint8)
        for each in told["masks"]:
            assert each["class"] == CLASSES[each["value"] - 1]
            label[coco_mask.decode({"size": told["size"], "counts": each["counts"]}) > 0] = each["value"]
        assert index_png(label) == expected[Path(name).name.removesuffix(".mask.json")]


def test_a_store_gets_a_shard_for_each(
    run: Path, tmp_path: Path, expected: dict[str, bytes], store: type[FailingStore]
) -> None:
    files = fsspec.filesystem("failing")
    for number in range(2):
        files.pipe(f"/pets/{number:04d}.tar", samples(6, start=6 * number))
    store.failures = 3
    predict(run, "failing://pets", "failing://masks/of")
    found = {f"{number}": packed(files.cat_file(f"/masks/of/{number:04d}.tar")) for number in range(2)}
    assert found["1"] == {f"{key}.mask.png": expected[key] for key in sorted(expected)[6:]}
    assert json.loads(files.cat_file("/masks/of/predict.json"))["made"] == "predictions"
    calls = store.calls
    summary = predict(run, "failing://pets", "failing://masks/of", resume=True)
    assert (summary.written, summary.skipped, str(summary.folder)) == (0, 12, "failing://masks/of")
    assert store.calls > calls


def test_what_a_store_does_not_take_is_done_again(run: Path, tmp_path: Path, store: type[FailingStore]) -> None:
    folder = write_shards(tmp_path / "pets")
    keys: dict[str, Any] = {"data.store_retries": 0}
    put = FailingStore.put_file

    def refuse(self: Any, lpath: str, rpath: str, **named: Any) -> None:
        if rpath.endswith("0001.tar"):
            raise OSError("503")
        put(self, lpath, rpath, **named)

    class Refusing(FailingStore):
        protocol = "refusing"
        put_file = refuse

    fsspec.register_implementation("refusing", Refusing, clobber=True)
    store.store.clear()
    text = said(predict, run, folder, "refusing://masks", **keys)
    assert "masks/0001.tar: the store failed 1 times (503); try again later" in text
    fsspec.register_implementation("refusing", FailingStore, clobber=True)
    fsspec.filesystem("failing")
    assert [path for path in FailingStore.store if path.endswith("0000.tar")]


def test_broken_samples_and_shards_are_counted_and_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_shards(tmp_path / "pets", 3)
    whole = (folder / "0001.tar").read_bytes()
    (folder / "0001.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "0002.tar").write_bytes(b"no archive" * 99)
    (folder / "0003.tar").write_bytes(tar_of({"a.jpg": jpeg(1)[:300], "b.jpg": jpeg(2)}))
    out = tmp_path / "out"
    assert main(["predict", str(run), str(folder), "--out", str(out), "--out-shards", "4"]) == 1
    told = capsys.readouterr()
    for words in ("0001.tar: is cut short", "0002.tar: is no tar", "0003.tar/a.jpg: cannot be read as an image"):
        assert words in told.err, words
    assert "3 images failed" in told.out
    names = {name for content in shards_in(out).values() for name in packed(content)}
    assert {"0000/00005.mask.png", "0003/b.mask.png"} <= names
    assert "0003/a.mask.png" not in names


def test_a_killed_call_goes_on_and_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "pets", 2, 40)
    words = ["predict", str(run), str(folder), "--out-shards", "30", "--evaluation.batch_size", "1"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "out"
    process = start_python(["-m", "afa", *words, "--out", str(out)])
    try:
        parts = out / ".parts" / "000001" / "masks"
        while process.poll() is None and len(list(parts.rglob("*.png"))) < 5:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.wait()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    masks = len(list(parts.rglob("*.png")))
    there = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert masks >= 5
    summary = predict(run, folder, out, out_shards=30, resume=True, **{"evaluation.batch_size": 1})
    assert summary.skipped >= masks + 30  # what was done of the shard in work, and the one before
    assert all(path.stat().st_mtime_ns == before for path, before in there.items())
    assert contents(out) == contents(tmp_path / "whole")


def test_shards_of_other_weights_or_sizes_are_not_mixed(run: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "pets")
    predict(run, folder, tmp_path / "out", out_shards=5)
    for keys in ({"out_shards": 4}, {"out_shards": 5, "rle": True}, {"out_shards": 5, "evaluation.short_side": 32}):
        text = said(predict, run, folder, tmp_path / "out", resume=True, **keys)
        assert "out: the 3 shards there were made with other weights, settings or sizes; delete them" in text
    assert predict(run, folder, tmp_path / "out", out_shards=5).written == 12


def test_tags_of_shards(run: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "pets")
    rows = "".join(f"{number:05d},{CLASSES[number % 2]}\n" for number in range(12))
    (tmp_path / "tags.csv").write_text(f"file,tags\n{rows}")
    named: dict[str, Any] = {"tags": tmp_path / "tags.csv"}
    predict(run, folder, tmp_path / "out", **named)
    for path in (tmp_path / "out" / "masks").rglob("*.png"):
        assert set(np.unique(np.array(Image.open(path)))) <= {0, int(path.stem) % 2 + 1}
    assert predict(run, folder, tmp_path / "out", resume=True, **named).skipped == 12


def test_pseudo_labels_of_shards_are_those_of_files(run: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "pets")
    keys: dict[str, Any] = {"kind": "cam", "data.val_list": ""}
    pseudo_labels(run, folder, tmp_path / "files", **keys)
    summary = pseudo_labels(run, folder, tmp_path / "out", out_shards=7, **keys)
    assert summary.written == 12
    found = {n: m for content in shards_in(tmp_path / "out").values() for n, m in packed(content).items()}
    masks = tmp_path / "files" / "masks"
    assert found == {
        f"{path.relative_to(masks).with_suffix('')}.mask.png": path.read_bytes() for path in masks.rglob("*.png")
    }
    assert pseudo_labels(run, folder, tmp_path / "out", out_shards=7, **keys).skipped == 12


def test_images_that_failed_are_tried_again_alone(
    run: Path, tmp_path: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_shards(tmp_path / "pets")
    whole = (folder / "0001.tar").read_bytes()
    broken = whole.replace(jpeg(8), b"\0" * len(jpeg(8)))
    assert broken != whole
    (folder / "0001.tar").write_bytes(broken)
    for rle in ((), ("--rle",)):
        out, words = tmp_path / f"out{len(rle)}", ["--out-shards", "9", *rle]
        call = ["predict", str(run), str(folder), "--out", str(out), *words]
        assert main(call) == 1
        first = shards_in(out)
        (line,) = json.loads((out / "000000.masks.json").read_text())["failed"]
        assert "0001.tar/00008.jpg: not an image" in line
        capsys.readouterr()
        assert main([*call, "--resume"]) == 1
        told = capsys.readouterr()
        assert f"skipped: {line}" in told.err
        assert "0 masks written" in told.out
        assert shards_in(out) == first
        (folder / "0001.tar").write_bytes(whole)
        assert main([*call, "--resume"]) == 0
        assert "1 masks written" in capsys.readouterr().out
        predict(run, folder, tmp_path / f"whole{len(rle)}", out_shards=9, rle=bool(rle))
        assert contents(out) == contents(tmp_path / f"whole{len(rle)}")
        (folder / "0001.tar").write_bytes(broken)


def test_a_shard_that_was_repaired_is_done_anew(
    run: Path, tmp_path: Path, expected: dict[str, bytes], store: type[FailingStore]
) -> None:
    files = fsspec.filesystem("failing")
    files.pipe("/pets/0000.tar", samples(6))
    files.pipe("/pets/0001.tar", samples(6, start=6)[:5000])
    summary = predict(run, "failing://pets", "failing://masks")
    assert summary.failed
    assert "0001.tar: is cut short" in summary.failed[-1]
    files.pipe("/pets/0001.tar", samples(6, start=6))
    summary = predict(run, "failing://pets", "failing://masks", resume=True)
    assert (summary.written, summary.skipped, summary.failed) == (6, 6, ())
    found = {name: mask for n in (0, 1) for name, mask in packed(files.cat_file(f"/masks/000{n}.tar")).items()}
    assert found == {f"{key}.mask.png": mask for key, mask in expected.items()}


def test_shards_that_are_done_are_not_fetched_again(run: Path, tmp_path: Path, store: type[FailingStore]) -> None:
    files = fsspec.filesystem("failing")
    for number in range(3):
        files.pipe(f"/pets/{number:04d}.tar", samples(2, start=2 * number))
    predict(run, "failing://pets", "failing://masks")
    files.rm("/masks/0002.tar")
    for path in (tmp_path / "cache" / "afa" / "shards").iterdir():
        if path.is_file():
            path.unlink()
    summary = predict(run, "failing://pets", "failing://masks", resume=True)
    assert (summary.written, summary.skipped) == (2, 4)
    assert len(list((tmp_path / "cache" / "afa" / "shards").glob("*.tar"))) == 1


@pytest.mark.parametrize("place", ["out", "failing://masks"])
def test_two_calls_do_not_write_to_one_output(run: Path, tmp_path: Path, place: str, store: type[FailingStore]) -> None:
    folder = write_shards(tmp_path / "pets")
    out = place if "://" in place else str(tmp_path / place)
    target = ShardFolder(out, 5, False, CLASSES, DataConfig())
    with only_writer(target._stage("") if "://" in out else Path(out)):
        text = said(predict, run, folder, out, out_shards=5)
    assert "another call is writing there; wait for it, or choose another folder" in text
    assert predict(run, folder, out, out_shards=5).written == 12


def test_progress_over_all_shards(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_TOLD_SECONDS", -1.0)
    folder = write_shards(tmp_path / "pets", 4, 3)
    for size in (0, 5, 2):
        capsys.readouterr()
        predict(run, folder, tmp_path / f"out{size}", out_shards=size)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("shards ")]
        assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
        assert re.fullmatch(r"shards 4/4  [\d.]+ shards/s  0 s left", lines[-1])
        predict(run, folder, tmp_path / f"out{size}", out_shards=size, resume=True)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("shards ")]
        assert lines == [f"shards {number}/4" for number in range(1, 5)]  # nothing says how fast it would be


def test_formats_of_shards_are_those_of_files(run: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "pets", 2, 3)
    for shard in folder.iterdir():
        with tarfile.open(shard) as tar:
            tar.extractall(tmp_path / "unpacked" / shard.stem, filter="data")
    keys: dict[str, Any] = {"formats": "coco,voc,yolo,mmseg,labelme,labelstudio"}
    predict(run, folder, tmp_path / "out", **keys)
    predict(run, tmp_path / "unpacked", tmp_path / "files", **keys)
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "files")
    images = {f"labelme/{n // 3:04d}/{n:05d}.jpg" for n in range(6)}
    images |= {f"labelstudio/images/{n // 3:04d}/{n:05d}.jpg" for n in range(6)}
    assert ours.keys() - theirs.keys() == images
    for name in images:
        assert ours[name] == (tmp_path / "unpacked" / "/".join(name.split("/")[-2:])).read_bytes()
    differing = {name for name in theirs if ours[name] != theirs[name]}
    assert differing == {f"labelme/{n // 3:04d}/{n:05d}.json" for n in range(6)} | {"labelstudio/tasks.json"}
    labels = tmp_path / "out" / "labelme" / "0001"
    assert (labels / json.loads((labels / "00004.json").read_text())["imagePath"]).resolve().is_file()
    tasks = json.loads(ours["labelstudio/tasks.json"])
    assert tasks[4]["data"]["image"] == "/data/local-files/?d=images/0001/00004.jpg"


def test_a_full_disk_leaves_what_was_made(run: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "pets", 1, 12)
    keys: dict[str, Any] = {"out_shards": 12}
    with largest_file(4000):
        text = said(predict, run, folder, tmp_path / "out", **keys)
    assert "out/000000.tar: cannot be written (File too large); free space or choose another folder" in text
    assert len(list((tmp_path / "out" / ".parts" / "000000" / "masks").rglob("*.png"))) == 12
    assert predict(run, folder, tmp_path / "out", resume=True, **keys).skipped == 12
    assert len(packed(shards_in(tmp_path / "out")["000000.tar"])) == 12


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"formats": "coco", "out_shards": 3},
            "coco is not written beside shards of masks; leave it out, or --out-shards",
        ),
        ({"scores": True, "out_shards": 3}, "--scores is not written beside shards of masks"),
        ({"rle": True}, "--rle is for shards; add --out-shards N, or leave it out"),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, keys: dict[str, Any], expected: str) -> None:
    folder = write_shards(tmp_path / "pets", 1)
    assert expected in said(predict, run, folder, tmp_path / "out", **keys)
    assert "nothing.tar: no such file or folder" in said(predict, run, tmp_path / "nothing.tar", tmp_path / "out")
