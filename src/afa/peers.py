"""What the processes of a run know of each other: who is alive, who waits, and why one of them ended.

They talk through the key-value store that they meet in. Waiting here has no time limit, as shares of work differ, but
ends soon after any of the others has.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
import uuid
from typing import Final

from torch.distributed.distributed_c10d import Store

from afa.elastic import say_once
from afa.errors import AfaError, GoneError, first_line

MEETING_MINUTES: Final = 10.0
"""How long processes wait for each other at their start, and in a single exchange of tensors."""

_BEAT_SECONDS: Final = 2.0
_SILENCE_SECONDS: Final = 60.0  # after which a process counts as gone
_GRACE_SECONDS: Final = 30.0  # in which a process that learns of an end should end by itself
_LEFT: Final = 2**40  # added to its beats by a process that is done


class Peers:
    """The other processes of a run.

    A thread tells them that this process is alive, and watches: the first process all others, these the first. If
    another one ends before its work is done, and this one is stuck in an exchange with it, the thread ends this one.

    Args:
        store: Where they meet; nobody else uses this connection, and its keys are of this run alone.
        rank: Number of this process.
        count: How many there are.
    """

    def __init__(self, store: Store, rank: int, count: int) -> None:
        self.trouble: AfaError | None = None
        self._store, self._rank, self._count = store, rank, count
        self._waits = 0
        self._seen: dict[int, tuple[int, float]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="afa-peers", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until every process has called this as often as this one.

        Raises:
            AfaError: What ended another process; a `GoneError` if it ended without a word.
        """
        self._waits += 1
        key, pause = f"wait/{self._waits}", 0.001
        try:
            arrived = self._store.add(key, 1)
            while arrived < self._count:
                if self.trouble is not None:
                    raise self.trouble
                time.sleep(pause)
                pause = min(2 * pause, 0.25)
                arrived = self._store.add(key, 0)
        except RuntimeError as error:
            raise self.explain(error) from None

    def tell(self, error: BaseException) -> AfaError | None:
        """Tell the others what ends this process, unless another one told before: then this returns what it told."""
        kind, words = ("error", str(error)) if isinstance(error, AfaError) else ("gone", type(error).__name__)
        if isinstance(error, GoneError):
            kind = "gone"
        elif kind == "gone":
            words = f"process {self._rank} of {self._count} ended with {words}"
        with contextlib.suppress(RuntimeError):  # if the store has gone, the others know
            if self._store.add("ends", 1) == 1:
                self._store.set("end", f"{kind} {words}")
                return None
            self._store.wait(["end"], datetime.timedelta(seconds=2 * _BEAT_SECONDS))
            return self._told()
        return None

    def explain(self, error: Exception) -> AfaError:
        """What another process told before an exchange with it failed."""
        waited = time.monotonic()
        while self.trouble is None and time.monotonic() - waited < 2 * _BEAT_SECONDS:
            time.sleep(0.05)
        return self.trouble or GoneError(f"the connection to another process was lost ({first_line(error)})")

    def close(self) -> None:
        """Say that this process is done."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(_BEAT_SECONDS):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                self.trouble = self._look()
            except RuntimeError as error:
                self.trouble = GoneError(f"the connection to the first process was lost ({first_line(error)})")
            if self.trouble is not None:
                if isinstance(self.trouble, GoneError):
                    self.tell(self.trouble)
                if not self._closed.wait(_GRACE_SECONDS):
                    say_once(f"afa: error: {self.trouble}")
                    os._exit(2)
                return
        with contextlib.suppress(RuntimeError):
            self._store.add(f"beat/{self._rank}", _LEFT)

    def _told(self) -> AfaError:
        kind, _, words = self._store.get("end").decode().partition(" ")
        return AfaError(words) if kind == "error" else GoneError(words)

    def _look(self) -> AfaError | None:
        """What keeps the run from its end."""
        if self._store.check(["end"]):
            return self._told()
        now = time.monotonic()
        for rank in range(1, self._count) if self._rank == 0 else (0,):
            beats = self._store.add(f"beat/{rank}", 0)
            last, since = self._seen.get(rank, (-1, now))
            self._seen[rank] = (beats, now if beats != last else since)
            if beats < _LEFT and now - self._seen[rank][1] > _SILENCE_SECONDS:
                return GoneError(f"process {rank} of {self._count} has not answered for {_SILENCE_SECONDS:.0f} s")
        return None


def meet(store: Store, rank: int, count: int) -> str:
    """Agree on a name that no earlier meeting in the same store had: torchrun keeps the store when it starts anew.

    Raises:
        AfaError: Not all processes come within `MEETING_MINUTES`.
    """
    limit = datetime.timedelta(minutes=MEETING_MINUTES)
    late = GoneError(f"not all of the {count} processes came within {MEETING_MINUTES:g} minutes; look at the others")
    name = uuid.uuid4().hex
    if rank != 0:
        store.set(f"afa/hello/{rank}", name)
        try:
            store.wait([f"afa/welcome/{name}"], limit)
        except RuntimeError:
            raise late from None
        given: str = store.get(f"afa/welcome/{name}").decode()
        store.add(f"afa/met/{given}", 1)
        return given
    until = time.monotonic() + limit.total_seconds()
    while store.add(f"afa/met/{name}", 0) < count - 1:
        for other in range(1, count):
            if store.check([f"afa/hello/{other}"]):  # perhaps of an earlier start, to whom it does not matter
                store.set(f"afa/welcome/{store.get(f'afa/hello/{other}').decode()}", name)
        if time.monotonic() > until:
            raise late
        time.sleep(0.02)
    return name
