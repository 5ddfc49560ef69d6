"""Segments images in tiles at native resolution: which images, in tiles of which side, and what a network says of them.

How tiles lie and how they are blended is up to `afa.inference.tiles`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.config import Config
from afa.data.rows import Rows
from afa.errors import AfaError
from afa.evaluation.evaluate import group_by_size
from afa.evaluation.protocols import cam_limits, group_sizes, logit_maps, pseudo_labels, pseudo_sizes
from afa.inference.tiles import ArrayRows, PixelRows, Span, Window, blend, cut
from afa.model.network import AfaNetwork

MIN_TILE: Final = 128
"""Shortest side of a tile that may be asked for, pixels."""


class Tiling:
    """Which images a network sees in tiles, and what it says of them.

    Args:
        network: In eval mode; its parameters say the device.
        config: Its `evaluation` section says protocol and scales; `train.precision`.
        tiles: `auto` tiles images beyond `max_side`; a number is the side of the tiles, and larger images are tiled;
            `off` tiles none.
        max_side: Longer side of the largest image that is one view, pixels.
        batch_size: As of `group_by_size`.
        view: Side of a tile for `auto`, pixels; None is `max_side`. `evaluation.short_side` of the configuration wins.
        max_pixels: Limit of pixels of an image file, as of `afa.data.rows.Rows`.

    Attributes:
        side: Of a tile, pixels: a multiple of the coarsest grid of the encoder; 0 for `off`.

    Raises:
        AfaError: `tiles` is another word, or a side below `MIN_TILE`; `max_pixels` is below 0.
    """

    def __init__(
        self,
        network: AfaNetwork,
        config: Config,
        tiles: str | int,
        *,
        max_side: int,
        batch_size: int,
        view: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        if max_pixels is not None and max_pixels < 0:
            raise AfaError(f"--max-pixels is {max_pixels}; use 1 or more pixels, or 0 for no limit")
        self.network, self.config, self.batch_size, self.max_pixels = network, config, batch_size, max_pixels
        self.side, self._above = 0, math.inf
        if tiles == "off":
            return
        side = (config.evaluation.short_side or view or max_side) if tiles == "auto" else _number(tiles)
        self.grid = network.backbone.min_size
        self.side = max(math.ceil(MIN_TILE / self.grid), round(side / self.grid)) * self.grid
        self._above = max_side if tiles == "auto" else self.side

    def covers(self, size: tuple[int, int]) -> bool:
        """Whether an image of a (height, width) is tiled."""
        return max(size) > self._above

    def count(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tiles along the (height, width) of an image."""
        down, across = (len(cut(length, self.side, grid=self.grid)) for length in size)
        return down, across

    def bands(
        self, source: PixelRows, allowed: NDArray[np.bool_] | None = None
    ) -> Iterator[tuple[NDArray[np.uint8], Iterator[Tensor]]]:
        """Segment an image from the top; few of its rows are held at a time.

        Args:
            source: The image.
            allowed: (K,) bool, classes that its pixels may become; None allows all.

        Yields:
            (n, W, 3) uint8 RGB rows, one band for each row of tiles, and an iterator of their (K, n, w) float32 logits
            from left to right, on the device; it must be used up before the next band is asked for.

        Raises:
            AfaError: The image is broken.
        """
        down, across = self._cut(source)
        window = Window(source)

        def logits(row: Span) -> Iterator[Tensor]:
            for group in self._tiles(window.move(row.start, row.stop), across, group_sizes):
                size, choices = group[0].shape[:2], [allowed] * len(group)
                for maps in logit_maps(self.network, group, self._seen(size), allowed=choices):
                    yield maps.enlarge(size)

        for row, parts in blend(down, across, logits):
            pixels = window.move(row.start, row.stop)
            yield pixels[row.low - row.start : row.end - row.start], parts

    def labels(
        self, source: PixelRows, allowed: NDArray[np.bool_] | None = None
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """As `bands`, but with (n, W) uint8 class indices."""
        for pixels, parts in self.bands(source, allowed):
            yield pixels, _joined(part.max(0).indices.to(torch.uint8) for part in parts)

    def pseudo_labels(
        self, reread: Callable[[], Rows], tags: NDArray[np.float32], *, kind: str, refine: bool
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """Make the pseudo label of a tagged image from the top, as `labels` does.

        The image is read twice: the CAM of each class is scaled by its range over the whole image. In the middle of an
        overlap the label of one tile ends and that of the next begins.

        Args:
            reread: Opens the image.
            tags: (C,) in {0, 1}.
            kind: As of `afa.evaluation.protocols.pseudo_labels`.
            refine: As there.
        """
        limits = self._limits(reread) if tags.any() else None
        with reread() as source:
            down, across = self._cut(source)
            window = Window(source)
            for row in down:
                pixels, made = window.move(row.start, row.stop), []
                for group in self._tiles(pixels, across, pseudo_sizes):
                    config = self._seen(group[0].shape[:2])
                    made += pseudo_labels(
                        self.network, group, [tags] * len(group), config, kind=kind, refine=refine, limits=limits
                    )
                top, bottom = (edge - row.start for edge in row.middle)
                parts = (
                    label[top:bottom, column.middle[0] - column.start : column.middle[1] - column.start]
                    for label, column in zip(made, across, strict=True)
                )
                yield pixels[top:bottom], _joined(part.to(torch.uint8) for part in parts)

    def _limits(self, reread: Callable[[], Rows]) -> Tensor:
        """(2, C) range of the CAM of each class over an image."""
        with reread() as source:
            down, across = self._cut(source)
            window = Window(source)
            found = [
                cam_limits(self.network, group, self._seen(group[0].shape[:2]))
                for row in down
                for group in self._tiles(window.move(row.start, row.stop), across, pseudo_sizes)
            ]
        low, high = torch.stack(found, 1)  # (tiles, C) each
        return torch.stack([low.amin(0), high.amax(0)])

    def label(self, pixels: NDArray[np.uint8], allowed: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
        """(H, W) uint8 class indices of an (H, W, 3) uint8 RGB image."""
        return np.concatenate([label for _, label in self.labels(ArrayRows(pixels), allowed)])

    def scores(self, pixels: NDArray[np.uint8], allowed: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """(K, H, W) float32 softmax over the classes of an (H, W, 3) uint8 RGB image."""
        bands = self.bands(ArrayRows(pixels), allowed)
        return np.concatenate([_joined(part.softmax(0) for part in parts) for _, parts in bands], 1)

    def _cut(self, source: PixelRows) -> tuple[list[Span], list[Span]]:
        """Tiles along the height and along the width."""
        height, width = source.size
        return cut(height, self.side, grid=self.grid), cut(width, self.side, grid=self.grid)

    def _tiles(
        self, pixels: NDArray[np.uint8], across: Sequence[Span], sizes: Callable[..., tuple[tuple[int, int], ...]]
    ) -> Iterator[list[NDArray[np.uint8]]]:
        """Batches of the tiles of a row, from left to right; `sizes` says how the network sees one."""

        def seen(tile: NDArray[np.uint8]) -> tuple[tuple[int, int], ...]:
            return sizes(tile.shape[:2], self._seen(tile.shape[:2]))

        tiles = (pixels[:, column.start : column.stop] for column in across)
        return group_by_size(tiles, sizes=seen, batch_size=self.batch_size)

    def _seen(self, size: Sequence[int]) -> Config:
        """Settings under which the network sees a tile of a (height, width) at native resolution and its scales."""
        return replace(self.config, evaluation=replace(self.config.evaluation, short_side=0, long_side=max(size)))


def _number(tiles: str | int) -> int:
    side = int(tiles) if str(tiles).isdecimal() else 0
    if side < MIN_TILE:
        raise AfaError(f"--tiles is {tiles}; use auto, off, or a side of at least {MIN_TILE} pixels")
    return side


def _joined(parts: Iterable[Tensor]) -> NDArray[Any]:
    """Parts of a band, from left to right, as one array on the CPU."""
    return np.concatenate([part.cpu().numpy() for part in parts], -1)
