"""Every command on the processes of torchrun: the same files as alone, whoever is killed, and one line for an error."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import afa
from afa.cli import main
from afa.config import DataConfig
from afa.data.palette import write_index_png
from afa.errors import AfaError, GoneError
from afa.inference.masks import Made, PredictSummary, Task, write_masks
from afa.inference.predictor import PreparedImage
from afa.inference.shards import ShardFolder
from afa.inference.sources import Images, Source
from afa.inference.stamp import STAMP
from afa.runs.files import only_writer, write_whole
from afa.runtime import process_group
from encoders import write_embeddings
from mistakes import refused
from stores import write_shards
from test_masks import FLAGS
from tiny import NO_DROPOUT, final_weights, start_python, tiny_config, tiny_flags, train_tiny
from together import together

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CPU = torch.device("cpu")


def torchrun(*arguments: object, restarts: int = 0) -> subprocess.Popen[str]:
    return start_python([*TORCHRUN, "--max-restarts", str(restarts), "-m", "afa", *map(str, arguments)])


def run(*arguments: object) -> tuple[str, str]:
    """What a call that works prints."""
    process = torchrun(*arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def kill_worker(launcher: subprocess.Popen[str], rank: int, *, when: Callable[[], bool]) -> None:
    """SIGKILL a worker of torchrun as soon as something is so."""
    until = time.monotonic() + 200
    while not when():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (worker,) = (pid for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())
    os.kill(int(worker), signal.SIGKILL)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def photos(tiny_data: Path, tmp_path: Path) -> Path:
    """48 images of different sizes, one of them broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        for path in (tiny_data / "JPEGImages").iterdir():
            shutil.copy(path, folder / f"{number}_{path.name}")
    for path in sorted(folder.iterdir())[48:]:
        path.unlink()
    sorted(folder.iterdir())[7].write_bytes(b"broken")
    return folder


@pytest.mark.slow
def test_predict_of_which_a_worker_is_killed(photos: Path, tiny_run: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = afa.predict(tiny_run, photos, one, formats="coco")
    assert (alone.written, len(alone.failed)) == (47, 1)
    killed = torchrun("predict", tiny_run, photos, "--out", two, "--format", "coco")
    kill_worker(killed, 1, when=lambda: len(list(two.glob("masks/*.png"))) >= 5)
    began = time.monotonic()
    killed.communicate(timeout=60)
    assert killed.returncode != 0
    assert time.monotonic() - began < 60
    there = len(list(two.glob("masks/*.png")))
    resumed = torchrun("predict", tiny_run, photos, "--out", two, "--format", "coco", "--resume")
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode != 0  # one image is broken
    assert f"{47 - there} masks written" in out, out
    assert out.count("masks written") == err.count("skipped: ") == 1
    for partial in two.rglob("*.partial"):  # of the worker that was killed
        partial.unlink()
    assert contents(two) == contents(one)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_shards_of_which_a_worker_is_killed(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: int
) -> None:
    """With `--max-restarts` the same call goes on, else one with `--resume` does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_shards(tmp_path / "pets", 2, 80)
    afa.predict(tiny_run, folder, tmp_path / "one", out_shards=40)
    two = tmp_path / "two"
    call = ("predict", tiny_run, folder, "--out-shards", "40", "--out", two)
    launcher = torchrun(*call, restarts=restarts)
    kill_worker(launcher, 1, when=lambda: len(list(two.glob(".parts/000001/masks/*/*.png"))) >= 5)
    out, err = launcher.communicate(timeout=300)
    if not restarts:
        assert launcher.returncode != 0
        assert not (two / "000001.tar").exists()
        out, _ = run(*call, "--resume")
    found = re.search(r"(\d+) masks written .*; (\d+) were there already", out)
    assert found is not None, (out, err)
    written, skipped = map(int, found.groups())
    assert written + skipped == 160, out
    assert skipped >= 5
    for partial in two.rglob("*.partial"):
        partial.unlink()
    assert contents(two) == contents(tmp_path / "one")


@pytest.mark.slow
def test_masks_of_which_a_worker_is_killed(tmp_path: Path) -> None:
    pets = tmp_path / "pets"
    (pets / "images").mkdir(parents=True)
    for number in range(80):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30), Image.Resampling.BICUBIC).save(pets / "images" / f"{number}.png")
    (pets / "tags.csv").write_text("file,tags\n" + "".join(f"{n}.png,{'cat' if n % 3 else 'dog'}\n" for n in range(80)))
    words = write_embeddings(tmp_path / "words", ["cat", "dog", "sky", "grass"], 32)
    small = ("--evaluation.short_side", "32", "--pseudo.iterations", "2", "--examples", "2")
    call = ("masks", pets, *FLAGS, *small, "--model.text_embeddings", words, "--format", "coco", "--out")
    assert main([*map(str, call), str(tmp_path / "one" / "out")]) == 0
    two = tmp_path / "two" / "out"  # the page has the name of the folder
    killed = torchrun(*call, two)
    kill_worker(killed, 1, when=lambda: len(list(two.glob("masks/*.png"))) >= 5)
    killed.communicate(timeout=60)
    assert killed.returncode != 0
    there = len(list(two.glob("masks/*.png")))
    assert 5 <= there < 80
    out, _ = run(*call, two)
    assert f"{80 - there} masks written" in out
    for partial in two.rglob("*.partial"):
        partial.unlink()
    assert contents(two) == contents(tmp_path / "one" / "out")


@pytest.mark.slow
def test_pseudo_and_check_are_shared(tiny_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    afa.pseudo_labels(tiny_run, tiny_data, one, formats="voc")
    out, _ = run("pseudo", tiny_run, "--data", tiny_data, "--out", two, "--format", "voc")
    assert out.count("24 masks written") == 1
    assert contents(two) == contents(one)
    flags = [word for word in tiny_flags(tiny_data)[3:] if word not in ("--data.root", str(tiny_data))]
    _, err = run("check", tiny_data, "--preset", "demo", "--json", tmp_path / "two.json", *flags)
    assert err.count("trying out") == 1
    alone = afa.check_data(tiny_config(tiny_data))
    shared = json.loads((tmp_path / "two.json").read_text())
    assert {**shared["images"], "seconds": 0} == {**alone["images"], "seconds": 0}
    assert shared["problems"] == alone["problems"]


@pytest.mark.slow
def test_a_training_whose_worker_is_killed_goes_on_by_itself(tiny_data: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = NO_DROPOUT | {"train.save_steps": 1}
    train_tiny(tiny_config(tiny_data, keys), tmp_path / "one")
    two = tmp_path / "two"
    arguments = (*tiny_flags(tiny_data, keys), "--out", two)
    launcher = torchrun(*arguments, restarts=2)
    kill_worker(launcher, 1, when=lambda: (two / "checkpoints" / "latest").exists())
    _, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, err
    assert err.count(f"resuming {two} after step ") == 1, err
    ours, theirs = final_weights(tmp_path / "one"), final_weights(two)
    names = [name for name in ours if not name.endswith("k_proj.bias")]
    assert max(relative(ours[name], theirs[name]) for name in names) <= 1e-5
    # What was a mistake stays one: starting again neither repeats the line nor goes on with a run that is there.
    launcher = torchrun(*arguments, restarts=1)
    _, err = launcher.communicate(timeout=300)
    assert launcher.returncode != 0
    assert err.count("holds a run already; pass --resume") == err.count("afa: error: ") == 1, err


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


# --- What processes know of each other -----------------------------------------------------------------------------


def _end(rank: int, folder: Path, kind: str) -> None:
    try:
        with process_group(CPU) as processes:
            assert processes.gather(rank) == [0, 1]
            assert processes.from_main(lambda: "main") == "main"
            assert list(processes.share(range(5))) == [[0, 2, 4], [1, 3]][rank]
            if rank == 1 and kind == "mistake":
                raise AfaError("photo.jpg: broken; replace it")
            if rank == 1 and kind == "crash":
                raise ZeroDivisionError
            if rank == 1 and kind == "killed":
                os._exit(9)
            if kind == "exchange":
                if rank == 1:
                    raise AfaError("photo.jpg: broken; replace it")
                processes.total(torch.ones(1))
            if kind == "stuck":
                if rank == 1:
                    os._exit(9)
                time.sleep(60)
            processes.wait()
    except AfaError as error:
        (folder / f"{kind}{rank}").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "told", "statuses"),
    [
        ("mistake", "AfaError: photo.jpg: broken; replace it", [0, 0]),
        ("exchange", "AfaError: photo.jpg: broken; replace it", [0, 0]),
        ("crash", "GoneError: process 1 of 2 ended with ZeroDivisionError", [0, 1]),
        ("killed", "GoneError: process 1 of 2 has not answered for 2 s", [0, 9]),
        ("stuck", "", [2, 9]),
    ],
)
def test_the_end_of_a_process_ends_the_others_soon(
    tmp_path: Path, kind: str, told: str, statuses: Sequence[int]
) -> None:
    began = time.monotonic()
    assert together(_end, tmp_path, kind) == statuses
    assert time.monotonic() - began < 60
    path = tmp_path / f"{kind}0"
    assert (path.read_text() if told else not path.exists()) == (told or True)


def _fill_disk(rank: int, folder: Path) -> None:
    try:
        with process_group(CPU) as processes:
            processes.wait()
            raise AfaError(f"mask {rank}: no space left")
    except AfaError as error:
        (folder / f"told{rank}").write_text(str(error))


@pytest.mark.slow
def test_mistakes_that_each_process_finds_are_one(tmp_path: Path) -> None:
    assert together(_fill_disk, tmp_path) == [0, 0]
    first, second = ((tmp_path / f"told{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first in ("mask 0: no space left", "mask 1: no space left")


def test_who_lost_another_may_start_again() -> None:
    assert issubclass(GoneError, AfaError)


# --- Masks ---------------------------------------------------------------------------------------------------------


class SlowDisk(Task[PreparedImage]):
    """A task whose masks take longer to be written than to be made."""

    def write(self, *arguments: Any) -> None:
        time.sleep(0.02)
        super().write(*arguments)


def _task(folder: Path, *, size: int, end: int = -1) -> Task[PreparedImage]:
    """Masks of 8 x 8 pixels; it notes each batch that is made, and kills its process in the batch after `end`."""
    made: list[int] = []

    def read(name: str) -> PreparedImage:
        return PreparedImage(np.zeros((8, 8, 3), np.uint8), torch.zeros(8, 8, 3), None, ((8, 8),))

    def infer(images: Sequence[PreparedImage]) -> list[Made]:
        if len(made) == end:
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(len(images))
        with (folder / "made").open("a") as file:
            file.write("x" * len(images))
        return [Made(torch.ones(8, 8, dtype=torch.uint8)) for _ in images]

    return SlowDisk("test", {"made": "test"}, read, infer, size, ("cat",), False, False, "use another", "go on")


def _make_until(folder: str, size: int, end: int) -> None:
    names = [f"i{number}" for number in range(60)]
    write_masks(_task(Path(folder), size=size, end=end), Path(folder), names, resume=True)


@pytest.mark.parametrize("size", [1, 8])
def test_a_kill_loses_at_most_one_finished_batch(tmp_path: Path, size: int) -> None:
    process = get_context("spawn").Process(target=_make_until, args=(str(tmp_path), size, 5))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    made, there = len((tmp_path / "made").read_text()), len(list(tmp_path.glob("masks/*.png")))
    assert made == 5 * size
    assert made - size <= there <= made
    names = [f"i{number}" for number in range(60)]
    summary = write_masks(_task(tmp_path, size=size), tmp_path, names, resume=True)
    assert (summary.written, summary.skipped) == (60 - there, there)


def _write_shards(rank: int, folder: Path, kind: str) -> None:
    def make(images: Images, place: Path) -> PredictSummary:
        write_whole(place / STAMP, json.dumps({"weights": rank if kind == "weights" else 0}))
        for name in images:
            write_index_png(place / "masks" / f"{name}.png", np.zeros((4, 4), np.uint8))
        return PredictSummary(place, len(images), 0, (), 0.0)

    names = ["a", "b", "c", "d"][rank if kind == "images" else 0 :]
    sources = [Source.of("", lambda: dict.fromkeys(names))]
    try:
        with process_group(CPU) as processes:
            target = ShardFolder(str(folder / "out"), 2, False, ("cat",), DataConfig())
            made = target.write(make, sources, resume=False, processes=processes)
            (folder / f"told{rank}").write_text(f"{made.written} masks")
    except AfaError as error:
        (folder / f"told{rank}").write_text(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("", "4 masks"),
        (
            "weights",
            "process 1 of 2 sees other weights or settings than the first one; give all machines the same files",
        ),
        ("images", "out: some process could not read a shard; the same call with --resume goes on"),
    ],
    ids=["same", "weights", "images"],
)
def test_processes_write_shards_of_the_same_masks(tmp_path: Path, kind: str, told: str) -> None:
    assert together(_write_shards, tmp_path, kind) == [0, 0]
    for rank in (0, 1):
        assert (tmp_path / f"told{rank}").read_text().endswith(told)
    assert len(list((tmp_path / "out").glob("*.tar"))) == (0 if kind else 2)


def test_two_calls_do_not_write_to_one_output(tmp_path: Path) -> None:
    with only_writer(tmp_path / "masks"), refused("masks: another call is writing there; wait for it"):
        write_masks(_task(tmp_path, size=1), tmp_path, ["a"], resume=False)
    assert write_masks(_task(tmp_path, size=1), tmp_path, ["a"], resume=False).written == 1
