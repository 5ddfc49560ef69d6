"""Device, seed, precision, processes and the terminal."""

from __future__ import annotations

import inspect
import os
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from afa import runtime
from afa.errors import AfaError
from afa.runtime import (
    Processes,
    autocast,
    image_progress,
    pick_device,
    process_group,
    progress_bar,
    resolve_precision,
    say,
    seed_step,
    showing_progress,
    shows_progress,
)
from mistakes import refused

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A plain process on a machine without accelerators."""
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return monkeypatch


# --- Device --------------------------------------------------------------------------------------------------------


def test_auto_takes_the_best_device_there_is(machine: pytest.MonkeyPatch) -> None:
    assert pick_device("auto") == CPU
    machine.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("mps")
    machine.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("mps") == torch.device("mps")
    assert pick_device("cpu") == CPU


def test_a_process_of_torchrun_takes_its_own_gpu(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setenv("LOCAL_RANK", "3")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 3)
    assert pick_device("cpu") == CPU


def test_absent_device(machine: pytest.MonkeyPatch) -> None:
    with refused("--device is 'cuda'", "available: auto, cpu"):
        pick_device("cuda")
    machine.setattr(torch.cuda, "is_available", lambda: True)
    with refused("--device is 'mps'", "available: auto, cuda, cpu"):
        pick_device("mps")


def test_unknown_device() -> None:
    with pytest.raises(AfaError, match=r"^--device is 'tpu'; use .*cpu, cuda"):
        pick_device("tpu")


# --- Seed ----------------------------------------------------------------------------------------------------------


def draw(seed: int, step: int, rank: int) -> tuple[float, ...]:
    seed_step(seed, step, rank)
    return tuple(torch.rand(4).tolist())


def test_a_step_draws_the_same_again_whatever_came_before() -> None:
    first = draw(7, 100, 1)
    torch.rand(13)
    assert draw(7, 100, 1) == first


def test_seeds_steps_and_ranks_draw_differently() -> None:
    keys = [(seed, step, rank) for seed in (0, 1, 2) for step in (0, 1, 2, 19_999) for rank in (0, 1, 7)]
    assert len({draw(*key) for key in keys}) == len(keys)


def test_the_largest_seed_and_step_are_taken() -> None:
    assert draw(2**31 - 1, 10_000_000, 4_000) != draw(2**31 - 1, 10_000_000, 3_999)


# --- Precision -----------------------------------------------------------------------------------------------------


def test_fp32_changes_nothing() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    expected = layer(x)
    with autocast(CPU, "fp32"):
        assert not torch.is_autocast_enabled("cpu")
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precisions_hold_inside_only(precision: str, dtype: torch.dtype) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with autocast(CPU, precision):
        assert layer(x).dtype == dtype
    assert layer(x).dtype == torch.float32
    assert layer.weight.dtype == torch.float32


# --- Processes -----------------------------------------------------------------------------------------------------


def test_a_plain_start_is_a_group_of_one(machine: pytest.MonkeyPatch) -> None:
    with process_group(CPU) as processes:
        assert processes == Processes(rank=0, count=1)
        assert processes.is_main
        assert not distributed.is_initialized()
        count = torch.tensor([2.0])
        assert processes.total(count) is count
        processes.wait()


def _report_as_process(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with process_group(CPU) as processes:
        processes.wait()
        count = torch.tensor([1.0 + rank, 10.0])
        total = processes.total(count)
        torch.save(
            {"processes": [processes.rank, processes.count], "main": processes.is_main, "count": count, "total": total},
            Path(folder, f"rank{rank}.pt"),
        )
    assert not distributed.is_initialized()


@pytest.mark.slow
def test_the_processes_of_torchrun_form_a_group(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_report_as_process, args=(str(tmp_path), port), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in range(2):
        result = torch.load(tmp_path / f"rank{rank}.pt")
        assert result["processes"] == [rank, 2]
        assert result["main"] == (rank == 0)
        assert result["total"].tolist() == [3.0, 20.0]
        assert result["count"].tolist() == [1.0 + rank, 10.0]


# --- Terminal ------------------------------------------------------------------------------------------------------


def test_say_leaves_standard_output_to_data(capsys: pytest.CaptureFixture[str]) -> None:
    say("step 3")
    assert capsys.readouterr() == ("", "step 3\n")


@pytest.mark.parametrize("enabled", [False, True])
def test_no_bar_where_nobody_watches(capsys: pytest.CaptureFixture[str], enabled: bool) -> None:
    with progress_bar(enabled=enabled, extra="loss") as progress:
        task = progress.add_task("train", total=2, rate="", loss="")
        progress.advance(task)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal_shows_count_rate_and_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = runtime.Console
    monkeypatch.setattr(runtime, "Console", lambda **settings: console(force_terminal=True, width=120, **settings))
    with progress_bar(extra="loss") as progress:
        task = progress.add_task("train", total=4, rate="", left="", loss="")
        progress.update(task, completed=3, rate="12 it/s", left="9 s left", loss="0.25")
    out, err = capsys.readouterr()
    assert out == ""
    for text in ("train", "3/4", "12 it/s", "0.25", "9 s left"):
        assert text in err
    with progress_bar(enabled=False) as progress:
        progress.add_task("train", total=4, rate="", left="")
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_progress_is_lines_with_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_TOLD_SECONDS", -1.0)
    with image_progress("read", total=8) as advance:
        advance(2, 4.0)
        advance(2, 0.5, "words")
    with image_progress("walk", total=None, unit="rows") as advance:
        advance(3, 2.0)
    with image_progress("quiet", total=2, enabled=False) as advance:
        advance(1, 1.0)
    with showing_progress(False), showing_progress(True), image_progress("unwanted", total=2) as advance:
        advance(1, 1.0)
    assert shows_progress()
    assert capsys.readouterr().err.splitlines() == [
        "read 2/8  4 images/s  2 s left",
        "read 4/8  0.5 images/s  words  8 s left",
        "walk 3  2 rows/s",
    ]


def test_what_goes_on_within_something_that_has_a_bar_tells_in_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = runtime.Console
    monkeypatch.setattr(runtime, "Console", lambda **settings: console(force_terminal=True, width=120, **settings))
    monkeypatch.setattr(runtime, "_TOLD_SECONDS", -1.0)
    with image_progress("steps", total=4) as outer:
        outer(1, 1.0)
        with image_progress("evaluate", total=2) as inner:
            inner(1, 1.0)
        outer(1, 1.0)
    err = capsys.readouterr().err
    assert "evaluate 1/2  1 images/s  1 s left" in err
    assert "steps 2/4  " not in err  # that is the bar's


def test_progress_counts_what_threads_do() -> None:
    with image_progress("read", total=4000, enabled=False) as advance, ThreadPoolExecutor(8) as pool:
        for _ in range(4000):
            pool.submit(advance, 1, 1.0)
        pool.shutdown()
        assert inspect.getclosurevars(advance).nonlocals["done"] == 4000


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bf16_where_the_cpu_is_fast_at_it(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    assert resolve_precision(cpu, "auto") == ("bf16" if fast else "fp32")
    assert resolve_precision(cpu, "fp16") == "fp16"
    with autocast(cpu, "auto"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if fast else torch.float32)
