"""Run-length encodings of masks: the compressed one of COCO, and the bit-packed one of Label Studio."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

LENGTH_BITS: Final = (3, 4, 8, 16)
"""Widths of the length fields that Label Studio's encoding chooses from, bits."""

_WORD_BITS: Final = 8
_BLOCK_BITS: Final = 3 + LENGTH_BITS[-1] + _WORD_BITS
_CHANNELS: Final = 4


def class_runs(flat: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """Cut a sequence into its longest runs of equal values.

    Args:
        flat: (N,) uint8, N > 0.

    Returns:
        Starts, lengths, and values of the R runs, (R,) each; neighboring runs differ in value.

    >>> [part.tolist() for part in class_runs(np.array([0, 0, 7, 1, 1], dtype=np.uint8))]
    [[0, 2, 3], [2, 1, 2], [0, 7, 1]]
    """
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    return starts, np.diff(starts, append=flat.size), flat[starts]


def alternating_counts(starts: NDArray[np.int64], lengths: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Lengths of zeros, ones, zeros, ... of a binary sequence, given its runs of ones.

    Args:
        starts: (R,) first position of each run, R > 0; no two runs touch.
        lengths: (R,) of each run.
        size: Length of the sequence.

    Returns:
        (2R,) or (2R + 1,) counts that add up to `size`; the first, of zeros, may be 0.

    >>> alternating_counts(np.array([2, 5]), np.array([1, 2]), 9).tolist()
    [2, 1, 2, 2, 2]
    """
    bounds = np.stack([starts, starts + lengths], axis=1).ravel()
    counts = np.diff(bounds, prepend=0, append=size)
    return counts if counts[-1] else counts[:-1]


def coco_string(counts: NDArray[np.int64]) -> str:
    """Write run lengths as COCO's compressed string.

    From the fourth on, a count is replaced by its difference to the one two places before. Each number is cut
    into groups of five bits, lowest first; a sixth bit says that more follow, and the highest bit of the last
    group is the sign. A group is the character 48 places after its value.

    Args:
        counts: (R,) lengths of zeros, ones, zeros, ... in column-major order.

    Returns:
        ASCII text, the `counts` of a COCO segmentation.

    >>> coco_string(np.array([2, 1, 40, 3, 8]))
    '21X12PO'
    """
    rest = counts.copy()
    rest[3:] -= counts[1:-2]
    groups, present = [], []
    pending = np.ones(len(rest), dtype=bool)
    while pending.any():
        present.append(pending)
        group, rest = rest & 31, rest >> 5
        pending = pending & (rest != np.where(group & 16, -1, 0))
        groups.append(group + 48 + 32 * pending)
    characters = np.stack(groups, axis=1)[np.stack(present, axis=1)]
    return bytes(characters.tolist()).decode("ascii")


def label_studio_rle(mask: NDArray[np.bool_]) -> list[int]:
    """Encode a binary mask as Label Studio stores brush strokes.

    The mask becomes an RGBA picture whose four channels are 255 inside and 0 outside, and its bytes, row by
    row, a bit stream: 32 bits for the number of bytes, 5 for the bits of a word less 1, 4 for each width in
    `LENGTH_BITS` less 1; then blocks of one bit (1: a repeated word), 2 bits for the width, the length less 1
    in that width, and the word.

    Args:
        mask: (H, W) bool.

    Returns:
        The stream as bytes, 0..255, padded with zero bits.
    """
    _, lengths, values = class_runs(mask.view(np.uint8).ravel())
    lengths = lengths * _CHANNELS
    longest = 1 << LENGTH_BITS[-1]
    num_blocks = -(-lengths // longest)
    last = np.cumsum(num_blocks) - 1
    block_lengths = np.full(int(last[-1]) + 1, longest)
    block_lengths[last] = lengths - (num_blocks - 1) * longest
    words = np.repeat(values.astype(np.int64) * 255, num_blocks)

    width = np.searchsorted(1 << np.array(LENGTH_BITS), block_lengths)
    length_bits = np.array(LENGTH_BITS)[width]
    block = ((4 | width) << length_bits) | (block_lengths - 1)
    block = (block << _WORD_BITS) | words
    num_bits = 3 + length_bits + _WORD_BITS
    places = np.arange(_BLOCK_BITS)
    bits = (block[:, None] >> np.maximum(num_bits[:, None] - 1 - places, 0)) & 1
    body = bits[places < num_bits[:, None]]

    header = f"{mask.size * _CHANNELS:032b}{_WORD_BITS - 1:05b}" + "".join(f"{bits - 1:04b}" for bits in LENGTH_BITS)
    stream = np.concatenate([np.array(list(header), dtype=np.uint8), body.astype(np.uint8)])
    packed: list[int] = np.packbits(stream).tolist()
    return packed
