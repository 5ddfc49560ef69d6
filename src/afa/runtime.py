"""Everything with effects outside a function: seed, device, precision, processes, threads, the user's terminal."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from afa.elastic import rank_and_count
from afa.errors import AfaError, GoneError
from afa.peers import MEETING_MINUTES, Peers, meet

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Arithmetic of the network by its name in the configuration."""

READ_AHEAD: Final = 8
"""Number of items that are read ahead."""

_TOLD_SECONDS: Final = 10.0

_bars: list[str] = []  # what a bar is shown for; within it, others tell in lines
_shows = ContextVar("shows", default=True)

Advance = Callable[..., None]
"""Takes how many were done since its last call; `image_progress` says the rest."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def pick_device(name: str) -> torch.device:
    """Choose the device to compute on.

    Args:
        name: `auto` (cuda, else mps, else cpu), `cpu`, `cuda` or `mps`.

    Raises:
        AfaError: The device asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    elif name not in available:
        raise AfaError(f"--device is {name!r}; use one of auto, cpu, cuda, mps")
    elif not available[name]:
        there = ", ".join(kind for kind, present in available.items() if present)
        raise AfaError(f"--device is {name!r}, which this machine or this PyTorch lacks; available: auto, {there}")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout and stochastic depth a function of the step, so that a resumed run repeats them exactly."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


def resolve_precision(device: torch.device, precision: str) -> str:
    """Turn `auto` into `bf16` if the device has fast bf16, else into `fp32`; other names stay."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # PyTorch has no public function for it; without this private one, the CPU counts as slow.
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        fast = device.type == "cpu" and supported is not None and bool(supported())
    return "bf16" if fast else "fp32"


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Run the network inside in `fp32`, `bf16` or `fp16`, or in what `auto` comes to."""
    precision = resolve_precision(device, precision)
    if precision == "fp32":
        yield
        return
    with torch.autocast(device.type, dtype=PRECISIONS[precision]):
        yield


@contextlib.contextmanager
def one_cast(device: torch.device) -> Iterator[None]:
    """Let all passes of a network on the device inside share the copies of weights that autocast makes.

    It keeps them until its outermost context ends, which is this one. What runs in here outside of `autocast` keeps its
    own precision.
    """
    if torch.amp.is_autocast_available(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: Number of this process.
        count: How many there are.
        peers: What is known of the others; None where there are none.
    """

    rank: int = 0
    count: int = 1
    peers: Peers | None = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """The items that are this process's to do: every `count`-th, from the `rank`-th on."""
        return items[self.rank :: self.count]

    def total(self, count: Tensor) -> Tensor:
        """Add a tensor of any shape up over all processes."""
        if self.count > 1:
            count = count.clone()
            dist.all_reduce(count)
        return count

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process; all get the same answer, over the device that they talk from."""
        return bool(self.total(torch.tensor(int(flag), device=device))) if self.count > 1 else flag

    def wait(self) -> None:
        """Wait until every process has reached this call, however long that takes.

        Raises:
            AfaError: Another process ended before it came here.
        """
        if self.peers is not None:
            self.peers.wait()
        elif self.count > 1:
            dist.barrier()

    def gather(self, value: _Result) -> list[_Result]:
        """What each process gives, by rank, once all have come here; any value that can be pickled."""
        values = [value] * self.count
        if self.count > 1:
            self.wait()
            dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], _Result]) -> _Result:
        """Let the first process make a value that can be pickled, and hand it to all."""
        made = [make() if self.is_main else None]
        if self.count > 1:
            self.wait()
            dist.broadcast_object_list(made)
        return made[0]  # type: ignore[return-value]


ALONE: Final = Processes()
"""A group of one."""

_store: Store | None = None
_joined: Processes | None = None


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started; a plain start is a group of one. Inside of another, it is that one.

    Args:
        device: Device of this process. GPUs talk over NCCL, everything else over gloo.

    Raises:
        AfaError: Not all processes come; another process ended inside, for what it told or as a `GoneError`.
    """
    global _store, _joined
    rank, count = rank_and_count()
    if _joined is not None or count == 1:
        yield _joined or ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = datetime.timedelta(minutes=MEETING_MINUTES)
    if _store is None:  # the first process may hold it, so it lasts as long as the process
        _store = next(rendezvous("env://", timeout=limit))[0]
    name = meet(_store, rank, count)
    own = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)
    peers = Peers(PrefixStore(f"afa/{name}", own), rank, count)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = PrefixStore(f"group/{name}", _store)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
        _joined = Processes(rank, count, peers)
        with warnings.catch_warnings():
            # Said of the gradients of 1x1 convolutions, whose strides are ambiguous; "not an error".
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield _joined
    except BaseException as error:
        # What gloo and NCCL raise where a process has gone is a RuntimeError with the place in their source.
        is_exchange = isinstance(error, dist.DistError) or ("gloo" in str(error) and isinstance(error, RuntimeError))
        if is_exchange and isinstance(error, Exception):
            raise peers.explain(error) from None
        first = peers.tell(error)
        # Each may find a mistake of its own, such as its file on a full disk; one line must do for all.
        if isinstance(error, AfaError) and first is not None and not isinstance(first, GoneError):
            raise first from None
        raise
    finally:
        peers.close()
        _joined = None
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Let a loop ask whether the user wants it to stop, so that Ctrl-C never cuts a step in half.

    The second Ctrl-C interrupts at once. Only the main thread gets signals; in other threads nothing changes.

    Yields:
        Function that says whether Ctrl-C was pressed.
    """
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, previous)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)


def read_ahead(
    read: Callable[[_Item], _Result], items: Iterable[_Item], *, workers: int | None = None, ahead: int = READ_AHEAD
) -> Generator[tuple[_Item, Future[_Result]], None, None]:
    """Call `read` in threads, a few items ahead of the consumer.

    Args:
        read: Reads one item; what it raises is raised by the `result()` of that item's future.
        items: Items in the order wanted.
        workers: Threads; None is one for each core, at most as many as items are read ahead.
        ahead: How many items are begun before the one that is handed out next is asked for.
    """
    workers = workers or min(ahead, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="afa-read")
    waiting: deque[tuple[_Item, Future[_Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def say(text: str) -> None:
    """Print a line for the user, on standard error so that standard output stays data."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def showing_progress(wanted: bool) -> Iterator[None]:
    """Show the progress of what goes on inside only if it is wanted here, and wherever this is called from."""
    before = _shows.set(_shows.get() and wanted)
    try:
        yield
    finally:
        _shows.reset(before)


def shows_progress() -> bool:
    """Whether progress is wanted, as far as `showing_progress` says."""
    return _shows.get()


def progress_bar(*, enabled: bool = True, extra: str = "") -> Progress:
    """A progress bar on standard error with count, rate, time gone and time left.

    Args:
        enabled: Off shows nothing (other ranks, `--quiet`).
        extra: Name of a task field that is shown after the bar, such as a loss.
    """
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    ]
    if extra:
        columns.append(TextColumn("{task.fields[" + extra + "]}"))
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not enabled or not console.is_terminal)


@contextlib.contextmanager
def image_progress(
    description: str,
    *,
    total: int | None,
    done: int = 0,
    images: int = 1,
    enabled: bool = True,
    unit: str = "images",
    processes: Processes = ALONE,
) -> Iterator[Advance]:
    """Show images done, rate and time left on standard error: as a bar, or a line now and then.

    Lines are for standard error that is no terminal, and for what goes on within something that has a bar.

    Args:
        description: What is going on.
        total: How many there are to do; None where it is not known.
        done: How many of them are done already.
        images: Images of each.
        enabled: False shows nothing; neither does a call within `showing_progress(False)`.
        unit: What is done.
        processes: Processes that share the work as `Processes.share` says: the first one shows all of it, at its pace.

    Yields:
        Function that takes how many were done since its last call; then, if they are known, images per second, else
        their mean since the start, and words to show beside them. `skipped` says that these took no time. Threads may
        call it.
    """
    first, began = done, time.monotonic()
    enabled = enabled and shows_progress() and processes.is_main
    told, lock = began, threading.Lock()
    with _as_innermost(description), progress_bar(enabled=enabled and len(_bars) == 1, extra="words") as bar:
        in_lines = enabled and (len(_bars) > 1 or not bar.console.is_terminal)
        task = bar.add_task(description, total=total, completed=done, rate="", left="", words="")

        def advance(count: int, rate: float | None = None, words: str = "", *, skipped: bool = False) -> None:
            nonlocal done, first, told
            now = time.monotonic()
            with lock:
                done += count * processes.count
                done = done if total is None else min(total, done)
                first = done if skipped else first
                telling = in_lines and now - told > _TOLD_SECONDS
                told = now if telling else told
            if rate is None:
                rate = (done - first) * images / max(now - began, 1e-6)
            pace = f"{rate:.3g} {unit}/s" if rate else ""
            left = f"{duration((total - done) * images / rate)} left" if rate and total is not None else ""
            bar.update(task, completed=done, rate=pace, left=left, words=words)
            if telling:
                count_text = f"{description} {done}" if total is None else f"{description} {done}/{total}"
                say("  ".join(filter(None, [count_text, pace, words, left])))

        yield advance


@contextlib.contextmanager
def _as_innermost(description: str) -> Iterator[None]:
    _bars.append(description)
    try:
        yield
    finally:
        _bars.remove(description)


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(12.3), duration(400), duration(40_000)
    ('12 s', '7 min', '11.1 h')
    """
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
