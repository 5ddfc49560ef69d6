"""Every image read once, in threads: whether it can be read, its size, and what finds duplicates.

It keeps some 220 bytes of each image in arrays, so that memory does not depend on the contents of the images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from afa.data.images import read_levels
from afa.data.pixels import WHITE_LEVEL
from afa.errors import AfaError
from afa.runtime import ALONE, Processes

THUMBNAIL_SIZE: Final = 8
"""Side of the thumbnails that candidates for near-duplicates are compared by, pixels."""

MAX_BITS: Final = 3
"""Near-duplicates differ in at most this many of the 64 bits of their difference hash..."""

MAX_GRAY_LEVELS: Final = 4.0
"""... and in their thumbnails by at most this many of 256 levels, on average."""

MIN_CONTRAST: Final = 4.0
"""Thumbnails with a smaller standard deviation, in levels, show too little to be compared."""

_BLOCK: Final = 32  # images that a thread takes at once
_BANDS: Final = MAX_BITS + 1
_WINDOW: Final = 2048  # hashes of one band that each hash is compared with, at most
_BITS: Final = np.array([bin(i).count("1") for i in range(1 << 16)], dtype=np.uint8)


@dataclass(frozen=True)
class Scan:
    """What was read of N images.

    Attributes:
        sizes: (N, 2) int32 height and width, pixels; 0 where an image could not be read.
        pixel_hashes: (N,) uint64; the same for the same upright pixels, whatever the file.
        difference_hashes: (N,) uint64 as `difference_hash`.
        thumbnails: (N, 192) uint8, 8 x 8 pixels RGB.
        gray: (N,) bool, whether all pixels are gray.
        failures: Index of an image that cannot be read -> why, in one line.
        peaks: (N,) int64, largest stored value of images of more than 8 bits, as of `read_levels`; 0 for others.
        mask_failures: Index of an image whose mask cannot be read, or does not fit -> why, in one line.
        seconds: How long it took.
    """

    sizes: NDArray[np.int32]
    pixel_hashes: NDArray[np.uint64]
    difference_hashes: NDArray[np.uint64]
    thumbnails: NDArray[np.uint8]
    gray: NDArray[np.bool_]
    failures: dict[int, AfaError]
    peaks: NDArray[np.int64]
    mask_failures: dict[int, str]
    seconds: float

    @property
    def readable(self) -> NDArray[np.int64]:
        """Indices of the images that could be read."""
        return np.flatnonzero(self.sizes[:, 0])


def scan_images(
    paths: Sequence[Path],
    *,
    threads: int,
    white_level: int = WHITE_LEVEL,
    read_mask: Callable[[int], object] | None = None,
    tell: Callable[[], object] = lambda: None,
    processes: Processes = ALONE,
) -> Scan:
    """Read images.

    Args:
        paths: N files.
        threads: How many read at the same time.
        white_level: As of `afa.data.pixels.rgb_pixels`.
        read_mask: Reads the mask of an image, by index, where it has one; its `AfaError` says what is wrong.
        tell: Called, from any thread, when an image is done.
        processes: Processes that share the images.

    Returns:
        What was found, by all processes; a broken image is no error here.
    """
    count = len(paths)
    scan = Scan(
        sizes=np.zeros((count, 2), dtype=np.int32),
        pixel_hashes=np.zeros(count, dtype=np.uint64),
        difference_hashes=np.zeros(count, dtype=np.uint64),
        thumbnails=np.zeros((count, 3 * THUMBNAIL_SIZE**2), dtype=np.uint8),
        gray=np.zeros(count, dtype=bool),
        failures={},
        peaks=np.zeros(count, dtype=np.int64),
        mask_failures={},
        seconds=0.0,
    )

    def read_block(start: int) -> None:
        for index in range(start, min(start + _BLOCK, count)):
            try:
                pixels, scan.peaks[index] = read_levels(paths[index], white_level=white_level)
            except AfaError as error:
                scan.failures[index] = error
            else:
                _note_image(scan, index, pixels)
                _try_mask(scan, index, read_mask)
            tell()

    began = time.perf_counter()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="afa-check")
    try:
        for _ in pool.map(read_block, processes.share(range(0, count, _BLOCK))):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    if processes.count > 1:
        scan = _merge(scan, processes)
    return replace(scan, seconds=time.perf_counter() - began)


def _merge(scan: Scan, processes: Processes) -> Scan:
    """What all processes found: what one did not read is 0 in its arrays."""
    lists = processes.gather((scan.failures, scan.mask_failures))

    def total(array: Any) -> Any:
        bits = array.view({8: np.int64, 4: np.int32, 1: np.uint8}[array.itemsize])  # gloo adds up no other kinds
        return processes.total(torch.from_numpy(bits)).numpy().view(array.dtype)

    return Scan(
        sizes=total(scan.sizes),
        pixel_hashes=total(scan.pixel_hashes),
        difference_hashes=total(scan.difference_hashes),
        thumbnails=total(scan.thumbnails),
        gray=total(scan.gray),
        failures={index: error for found, _ in lists for index, error in found.items()},
        peaks=total(scan.peaks),
        mask_failures={index: words for _, found in lists for index, words in found.items()},
        seconds=scan.seconds,
    )


def difference_hash(pixels: NDArray[np.uint8]) -> int:
    """A hash that small changes of an image leave alone: which of two neighbors is brighter.

    Args:
        pixels: (H, W, 3) uint8 RGB.

    Returns:
        64 bits, row by row, of an image scaled to 9 x 8 pixels; bits set where the right neighbor is brighter.

    >>> ramp = np.repeat(np.arange(90, dtype=np.uint8)[None, :, None], 80, axis=0).repeat(3, axis=2)
    >>> difference_hash(ramp) == 2**64 - 1
    True
    """
    gray = np.asarray(Image.fromarray(pixels).resize((9, 8), Image.Resampling.BOX).convert("L"))
    return int.from_bytes(np.packbits(gray[:, 1:] > gray[:, :-1]).tobytes(), "big")


def identical_groups(scan: Scan) -> list[list[int]]:
    """Groups of images with the same pixels; indices ascend, and the groups by their first."""
    return _equal_groups(scan.pixel_hashes, scan.readable)


def similar_groups(scan: Scan) -> list[list[int]]:
    """Groups of images that look the same but are not: scaled or compressed anew. None is of little contrast.

    One of each group of identical images stands for all. An image is compared with those whose hash agrees in one of
    four parts, as any two do that differ in at most three bits; of very many such images, with the nearest in order.
    """
    spread = scan.thumbnails.std(axis=1)
    first = {member: group[0] for group in identical_groups(scan) for member in group}
    chosen = np.array([i for i in scan.readable.tolist() if first.get(i, i) == i and spread[i] >= MIN_CONTRAST], int)
    parents = {int(i): int(i) for i in chosen}

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for one, other in _candidates(scan.difference_hashes[chosen]):
        pairs = np.stack([chosen[one], chosen[other]], axis=1)
        thumbnails = scan.thumbnails[pairs].astype(np.int16)
        near = np.abs(thumbnails[:, 0] - thumbnails[:, 1]).mean(axis=1) <= MAX_GRAY_LEVELS
        for a, b in pairs[near].tolist():
            low, high = sorted((root(a), root(b)))
            parents[high] = low
    roots = np.array([root(int(i)) for i in chosen], dtype=np.int64)
    return [chosen[group].tolist() for group in _equal_groups(roots, np.arange(len(roots)))]


def _note_image(scan: Scan, index: int, pixels: NDArray[np.uint8]) -> None:
    """Keep what is needed of an image."""
    height, width = pixels.shape[:2]
    digest = blake2b(f"{height}x{width}".encode(), digest_size=8)
    digest.update(pixels.data)
    scan.sizes[index] = height, width
    scan.pixel_hashes[index] = int.from_bytes(digest.digest(), "big")
    scan.difference_hashes[index] = difference_hash(pixels)
    small = Image.fromarray(pixels).resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
    scan.thumbnails[index] = np.asarray(small).ravel()
    scan.gray[index] = _is_gray(pixels)


def _try_mask(scan: Scan, index: int, read_mask: Callable[[int], object] | None) -> None:
    if read_mask is not None:
        try:
            read_mask(index)
        except AfaError as error:
            scan.mask_failures[index] = str(error)


def _is_gray(pixels: NDArray[np.uint8]) -> bool:
    for part in (pixels[::16, ::16], pixels):  # a few pixels are enough for most images
        if not ((part[..., 0] == part[..., 1]).all() and (part[..., 1] == part[..., 2]).all()):
            return False
    return True


def _equal_groups(values: NDArray[np.generic], indices: NDArray[np.int64]) -> list[list[int]]:
    """Groups of two or more of the indices with the same value."""
    order = indices[np.argsort(values[indices], kind="stable")]
    cuts = np.flatnonzero(values[order][1:] != values[order][:-1]) + 1
    return sorted(group.tolist() for group in np.split(order, cuts) if len(group) > 1)


def _candidates(hashes: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of places whose hashes differ in at most `MAX_BITS` bits, some of them several times."""
    parts = hashes[:, None].view(np.uint16)
    for band in range(_BANDS):
        order = np.lexsort((hashes, parts[:, band]))
        key = parts[order, band]
        for shift in range(1, min(_WINDOW, len(order))):
            same = np.flatnonzero(key[shift:] == key[:-shift])
            if not same.size:
                break
            one, other = order[same], order[same + shift]
            near = _BITS[parts[one] ^ parts[other]].sum(axis=1) <= MAX_BITS
            if near.any():
                yield one[near], other[near]
