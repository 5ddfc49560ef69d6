"""Run-length encodings against pycocotools, and against a slow reader of Label Studio's bits."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from afa.formats.rle import LENGTH_BITS, alternating_counts, class_runs, coco_string, label_studio_rle
from made_masks import binary_masks, read_label_studio

# pycocotools' own arrays predate a keyword of numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def encode_coco(mask: NDArray[np.bool_]) -> str:
    starts, lengths, values = class_runs(mask.view(np.uint8).ravel(order="F"))
    return coco_string(alternating_counts(starts[values == 1], lengths[values == 1], mask.size))


@pytest.mark.parametrize("order", ["C", "F"])
def test_runs_give_the_sequence_back(order: str) -> None:
    for mask in binary_masks():
        flat = mask.view(np.uint8).ravel(order)  # type: ignore[call-overload]
        starts, lengths, values = class_runs(flat)
        np.testing.assert_array_equal(np.repeat(values, lengths), flat)
        np.testing.assert_array_equal(starts, np.cumsum(lengths) - lengths)
        assert (values[1:] != values[:-1]).all()


def test_coco_string_is_that_of_pycocotools() -> None:
    for mask in binary_masks():
        assert encode_coco(mask) == coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))["counts"].decode()


def test_coco_string_of_a_large_mask() -> None:
    mask = np.zeros((3000, 4000), dtype=bool)
    mask[100:2900, 5] = mask[7, 2000:] = mask[2999, 3999] = True
    encoded = {"size": [3000, 4000], "counts": encode_coco(mask)}
    np.testing.assert_array_equal(coco_mask.decode(encoded), mask)


def test_label_studio_bits_give_four_equal_channels() -> None:
    for mask in binary_masks():
        pixels = read_label_studio(label_studio_rle(mask)).reshape(*mask.shape, 4)
        np.testing.assert_array_equal(pixels, np.repeat(255 * mask[:, :, None].astype(np.uint8), 4, axis=2))


@pytest.mark.parametrize("num_pixels", [1, 2, 3, 4, 5, 64, 65, 16384, 16385, 2 * 16384, 40000])
def test_label_studio_runs_at_the_limits_of_each_width(num_pixels: int) -> None:
    """Lengths are bytes, four for a pixel: 8, 16, 256 and 65,536 are the longest of a block."""
    mask = np.zeros((1, 40001), dtype=bool)
    mask[0, 1 : 1 + num_pixels] = True
    values = read_label_studio(label_studio_rle(mask))
    assert values.sum() == 255 * 4 * num_pixels
    assert values[4 : 4 + 4 * num_pixels].all()


def test_label_studio_header() -> None:
    stream = label_studio_rle(np.ones((2, 3), dtype=bool))
    assert stream[:4] == [0, 0, 0, 24]
    bits = "".join(f"{byte:08b}" for byte in stream[4:7])
    assert bits[:21] == "00111" + "".join(f"{width - 1:04b}" for width in LENGTH_BITS)
