"""Label Studio's predictions: tasks with brush labels, and the labeling interface that shows them."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Final
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from afa.formats.job import Job, JsonList, MaskItem

LENGTH_BITS: Final = (3, 4, 8, 16)
"""Widths of the length fields that the run-length encoding chooses from, bits."""

_WORD_BITS: Final = 8
_BLOCK_BITS: Final = 3 + LENGTH_BITS[-1] + _WORD_BITS
_CHANNELS: Final = 4


def write_labelstudio(job: Job) -> None:
    """Write tasks.json, a task with one prediction for each image, and config.xml, the labeling interface.

    Images are named as Label Studio's local storage does, from the folder that holds the folder of images.
    """
    with job.place("tasks.json").open("wb") as file:
        file.write(b"[")
        tasks = JsonList(file)
        for item, label in job.masks:
            job.count_ignored(label)
            results = [
                {
                    "id": f"class{value}",
                    "type": "brushlabels",
                    "from_name": "label",
                    "to_name": "image",
                    "original_height": label.shape[0],
                    "original_width": label.shape[1],
                    "image_rotation": 0,
                    "value": {
                        "format": "rle",
                        "rle": brush_rle(label == value),
                        "brushlabels": [job.classes[value - 1]],
                    },
                }
                for value in job.present(label)
            ]
            predictions = [{"model_version": "afa", "result": results}]
            tasks.add({"data": {"image": _url(job, item)}, "predictions": predictions})
        file.write(b"]\n")
    labels = [
        f'    <Label value={quoteattr(name)} background="#{"".join(f"{part:02x}" for part in job.color(value))}"/>'
        for value, name in enumerate(job.classes, start=1)
    ]
    lines = [
        "<View>",
        '  <Image name="image" value="$image" zoom="true"/>',
        '  <BrushLabels name="label" toName="image">',
        *labels,
        "  </BrushLabels>",
        "</View>",
    ]
    job.write("config.xml", "\n".join(lines) + "\n")


def brush_rle(mask: NDArray[np.bool_]) -> list[int]:
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
    flat = mask.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(starts, append=flat.size) * _CHANNELS
    longest = 1 << LENGTH_BITS[-1]
    num_blocks = -(-lengths // longest)
    last = np.cumsum(num_blocks) - 1
    block_lengths = np.full(int(last[-1]) + 1, longest)
    block_lengths[last] = lengths - (num_blocks - 1) * longest
    words = np.repeat(flat[starts] * 255, num_blocks)

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


def _url(job: Job, item: MaskItem) -> str:
    """The image as local storage names it: its path below the parent of the folder of images."""
    depth = len(PurePosixPath(item.name).parts)
    root = list(job.image_path(item, f"images/{item.file_name}").parents)[:depth][-1]
    return "/data/local-files/?d=" + quote(f"{root.name}/{item.file_name}")
