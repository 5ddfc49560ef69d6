"""Cuts images into tiles that overlap, and blends what the network says of them, row of tiles by row of tiles.

A tile's border is not asked: in the middle of an overlap, one tile fades out while the other fades in. Away from there
every pixel is what one tile says of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """A tile along one axis, pixels of the image.

    Attributes:
        start: First pixel that the network sees.
        stop: End of these.
        low: First pixel that the tile has a say in.
        high: End of these.
        rise: Pixels after `low` over which its weight grows from 0 to 1.
        fall: Pixels before `high` over which it falls again, as the weight of the next tile grows.
    """

    start: int
    stop: int
    low: int
    high: int
    rise: int
    fall: int

    @property
    def end(self) -> int:
        """First pixel of the next tile's say; the pixels from `low` to here are final once this tile is done."""
        return self.high - self.fall

    @property
    def middle(self) -> tuple[int, int]:
        """The pixels of which the tile decides alone where nothing is blended: up to the middles of the ramps."""
        return self.low + self.rise // 2, self.high - self.fall // 2

    def weights(self) -> NDArray[np.float32]:
        """(high - low,) weights in [0, 1]; those of all tiles sum to 1 at each pixel."""
        weights = np.ones(self.high - self.low, np.float32)
        weights[: self.rise] = (np.arange(self.rise) + 0.5) / max(1, self.rise)
        weights[len(weights) - self.fall :] = 1 - (np.arange(self.fall) + 0.5) / max(1, self.fall)
        return weights


def cut(length: int, side: int, *, grid: int) -> list[Span]:
    """Cut an axis into tiles that overlap by about a quarter of their side.

    Args:
        length: Of the axis, pixels.
        side: Of a tile, pixels, a multiple of `grid`; the last tile may be up to `grid` - 1 shorter.
        grid: Tiles begin at multiples of this, so that the network's own grid is that of one view.

    Returns:
        Tiles in order; one if `length` is no more than `side`.

    >>> [(span.start, span.stop, span.low, span.end) for span in cut(200, 128, grid=32)]
    [(0, 128, 0, 108), (96, 200, 108, 200)]
    """
    if length <= side:
        return [Span(0, length, 0, length, 0, 0)]
    overlap = side // 4
    count = math.ceil((length - overlap) / (side - overlap))
    last = math.ceil((length - side) / grid) * grid
    starts = [round(last * index / (count - 1) / grid) * grid for index in range(count)]
    stops = [min(start + side, length) for start in starts]
    # The ramp takes the middle half of what neighbors share, at most a sixteenth of a tile.
    shared = [stop - start for stop, start in zip(stops, starts[1:], strict=False)]
    ramps = [max(2, min(each // 2, side // 16)) // 2 * 2 for each in shared]
    middles = [(stop + start) // 2 for stop, start in zip(stops, starts[1:], strict=False)]
    lows = [0, *(middle - ramp // 2 for middle, ramp in zip(middles, ramps, strict=True))]
    highs = [*(middle + ramp // 2 for middle, ramp in zip(middles, ramps, strict=True)), length]
    return [Span(*each) for each in zip(starts, stops, lows, highs, [0, *ramps], [*ramps, 0], strict=True)]


def blend(
    rows: Sequence[Span], columns: Sequence[Span], logits: Callable[[Span], Iterable[Tensor]]
) -> Iterator[tuple[Span, Iterator[Tensor]]]:
    """Blend the logits of tiles; of a row of tiles only the ramp to the next row is kept.

    Args:
        rows: Tiles along the height.
        columns: Tiles along the width.
        logits: Gives for a row of tiles the (K, h, w) float32 logits of its tiles, from left to right.

    Yields:
        For each row of tiles its span, and an iterator of (K, `end` - `low`, n) float32 blended logits from left to
        right, whose n sum to the width of the image. It must be used up before the next row is asked for.
    """
    above: list[Tensor | None] = [None] * len(columns)

    def blended(row: Span) -> Iterator[Tensor]:
        left: Tensor | None = None
        down = torch.from_numpy(row.weights())[:, None]
        for index, (column, found) in enumerate(zip(columns, logits(row), strict=True)):
            part = found[:, row.low - row.start : row.high - row.start, column.low - column.start :]
            part = part[:, :, : column.high - column.low]
            part = part * down.to(part.device) * torch.from_numpy(column.weights()).to(part.device)
            if left is not None:
                part[:, :, : column.rise] += left
            left = part[:, :, column.end - column.low :].clone()
            part = part[:, :, : column.end - column.low]
            upper = above[index]
            if upper is not None:
                part[:, : row.rise] += upper
            above[index] = part[:, row.end - row.low :].clone()
            yield part[:, : row.end - row.low]

    for row in rows:
        yield row, blended(row)


class PixelRows(Protocol):
    """An image that is read from the top."""

    size: tuple[int, int]

    def take(self, count: int) -> NDArray[np.uint8]:
        """The next rows: (count, W, 3) uint8 RGB."""


class ArrayRows:
    """An (H, W, 3) uint8 RGB image in memory as `PixelRows`."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.size = (pixels.shape[0], pixels.shape[1])
        self._pixels, self._done = pixels, 0

    def take(self, count: int) -> NDArray[np.uint8]:
        """The next rows: (count, W, 3) uint8 RGB."""
        self._done += count
        return self._pixels[self._done - count : self._done]


class Window:
    """The rows of an image that a row of tiles sees: those that the next row does not see are let go."""

    def __init__(self, source: PixelRows) -> None:
        self._source = source
        self._top = 0
        self._pixels = np.empty((0, source.size[1], 3), np.uint8)

    def move(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The rows from `start`, which only grows, to `stop`: (stop - start, W, 3) uint8 RGB."""
        missing = stop - self._top - len(self._pixels)
        self._pixels = self._pixels[start - self._top :]
        if missing:
            self._pixels = np.concatenate([self._pixels, self._source.take(missing)])
        self._top = start
        return self._pixels
