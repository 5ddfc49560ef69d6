"""Decoded images kept in memory, so that later epochs decode nothing. Which image is read when the loader says."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from afa.data.large import LargeImages
from afa.errors import AfaError

_GIB: Final = 2**30
_CGROUP_FILES: Final = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of a container's memory, in both layouts that Linux has."""


class PixelCache:
    """The pixels of a set's images, as many as fit into a fixed amount of memory.

    One block of that size is reserved at once; the system hands out its pages as images fill it. Images that come
    when it is full are decoded each time, and none is ever dropped: dropping only pays when some images are read
    more often than others. Threads may share a cache.
    """

    def __init__(self, num_images: int, max_bytes: int, *, large: LargeImages | None = None) -> None:
        """Reserve at most `max_bytes` for the images of a set; 0 caches nothing. `large` has those that stay on disk.

        Raises:
            AfaError: The system does not give that much.
        """
        try:
            self._block = np.empty(max_bytes, dtype=np.uint8)
        except MemoryError:
            raise AfaError(f"data.cache_gib: no {max_bytes / _GIB:.1f} GiB of memory; set it lower, or to 0") from None
        self._images: list[NDArray[np.uint8] | None] = [None] * num_images
        self._placed = [False] * num_images
        self._used = 0
        self._lock = threading.Lock()
        self._large = large

    @property
    def used_bytes(self) -> int:
        """Memory that images take."""
        return self._used

    def image(self, index: int, read: Callable[[int], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """The image of an index, (H, W, 3) uint8 RGB, not to be written to; `read` decodes it unless it is here."""
        cached = self._images[index]
        if cached is not None:
            return cached
        large = None if self._large is None else self._large.image(index)
        if large is not None:
            return large
        pixels = read(index)
        with self._lock:
            start = self._used
            if self._placed[index] or start + pixels.nbytes > self._block.nbytes:
                return pixels
            self._placed[index] = True
            self._used += pixels.nbytes
        place = self._block[start : start + pixels.nbytes].reshape(pixels.shape)
        place[:] = pixels
        place.flags.writeable = False
        self._images[index] = place  # only now, so that other threads never see it half written
        return place


def resolve_cache(cache_gib: float, *, processes: int = 1) -> int:
    """Turn the setting `data.cache_gib` into bytes for the `PixelCache` of each process.

    Args:
        cache_gib: GiB over all processes of this machine, or -1: a quarter of the memory that is free now; 0 where the
            system does not tell that (other than Linux).
        processes: Training processes that share this machine's memory.
    """
    total = free_memory() // 4 if cache_gib < 0 else int(cache_gib * _GIB)
    return total // processes


def free_memory() -> int:
    """Bytes that this process may still take, a container's limit included; 0 where that cannot be told."""
    free = 0
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    for limit, used in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
            free = min(free, max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
    return free
