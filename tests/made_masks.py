"""Masks that are hard to convert, and items of them on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.data.palette import write_index_png
from afa.formats.job import MaskItem
from afa.formats.write import FormatResult, write_format

CLASSES = ("cat", "potted plant", "Straße")


def binary_masks(count: int = 60) -> list[NDArray[np.bool_]]:
    """Noise of all densities, blocks with holes, single pixels, stripes, and sizes down to 1 x 1; none is empty."""
    rng = np.random.default_rng(0)
    masks = [np.ones((1, 1), bool), np.ones((1, 9), bool), np.ones((7, 1), bool), np.eye(8, dtype=bool)]
    masks += [~np.eye(8, dtype=bool), np.pad(np.zeros((3, 3), bool), 1, constant_values=True)]
    masks += [np.indices((6, 7)).sum(0) % 2 == 0, np.indices((5, 6))[1] % 2 == 1]
    while len(masks) < count:
        height, width = rng.integers(1, 24, 2)
        mask = rng.random((height, width)) < rng.uniform(0.05, 0.98)
        if len(masks) % 2:
            mask = np.kron(mask, np.ones(rng.integers(1, 6, 2), dtype=bool))
        if mask.any():
            masks.append(mask)
    return masks


def labels() -> list[NDArray[np.uint8]]:
    """Masks of three classes with ignored pixels: nested regions, borders, specks; one is all background."""
    rng = np.random.default_rng(1)
    nested = np.zeros((60, 80), dtype=np.uint8)
    nested[5:55, 10:70] = 1
    nested[15:45, 20:60] = 2
    nested[25:35, 30:50] = 0
    nested[28:32, 35:45] = 3
    nested[0] = 255
    nested[40:42, 0:2] = 3
    blocks = np.kron(rng.choice([0, 1, 2, 3, 255], (6, 7)), np.ones((9, 11))).astype(np.uint8)
    noise = rng.choice([0, 1, 2, 3, 255], (31, 17)).astype(np.uint8)
    return [nested, blocks, noise, np.zeros((20, 30), dtype=np.uint8), np.full((13, 12), 3, dtype=np.uint8)]


def write_items(
    folder: Path, masks: Sequence[NDArray[np.uint8]] | None = None, *, names: Sequence[str] = ()
) -> list[MaskItem]:
    """Write FOLDER/images and FOLDER/masks; without names, some images lie in a sub-folder, and one is a PNG."""
    items = []
    for index, label in enumerate(labels() if masks is None else masks):
        name = names[index] if names else f"im {index}" if index % 2 else f"sub/ö.{index}"
        image = folder / "images" / f"{name}.{'PNG' if index == 1 and not names else 'jpg'}"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", label.shape[::-1], (40 * index, 90, 60)).save(image)
        mask = folder / "masks" / f"{name}.png"
        write_index_png(mask, label)
        items.append(MaskItem(name, image, mask))
    return items


def write_made(
    format: str,
    folder: Path,
    masks: Sequence[NDArray[np.uint8]] | None = None,
    *,
    names: Sequence[str] = (),
    **settings: Any,
) -> tuple[list[MaskItem], FormatResult]:
    """Write items below a folder and convert them, to FOLDER/out; settings are those of `write_format`."""
    items = write_items(folder, masks, names=names)
    settings = {"classes": CLASSES} | settings
    return items, write_format(format, items, out_dir=folder / "out", **settings)


def paint(polygon: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Pixels whose centers lie within a polygon of (P, 2) corners, by the even-odd rule."""
    y, x = np.indices(shape) + 0.5
    inside = np.zeros(shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / (one | other).sum())


def read_label_studio(stream: list[int]) -> NDArray[np.uint8]:
    """The values in a stream of Label Studio, read bit by bit as the format is described."""
    bits = "".join(f"{byte:08b}" for byte in stream)
    position = 0

    def take(count: int) -> int:
        nonlocal position
        position += count
        assert position <= len(bits)
        return int(bits[position - count : position], 2)

    size, word_bits = take(32), take(5) + 1
    widths = [take(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < size:
        is_run = take(1)
        length = take(widths[take(2)]) + 1
        values += [take(word_bits)] * length if is_run else [take(word_bits) for _ in range(length)]
    assert len(values) == size
    assert len(bits) - position < 8
    return np.array(values, dtype=np.uint8)
