"""Class maps as pictures: the VOC palette, overlays, and index PNGs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.runs.files import write_whole
from afa.types import IGNORE_INDEX


def voc_palette() -> NDArray[np.uint8]:
    """The colors of PASCAL VOC's masks: (256, 3) uint8 RGB; row 0, the background, is black.

    The bits of the class index, lowest first, are dealt to red, green, blue in turn, and fill each color
    from its highest bit down; so neighboring classes differ strongly.

    >>> voc_palette()[[1, 15, 255]].tolist()
    [[128, 0, 0], [192, 128, 128], [224, 224, 192]]
    """
    index = np.arange(256)[:, None]
    channel = np.arange(3)[None, :]
    colors = np.zeros((256, 3), dtype=np.int64)
    for place in range(3):  # 8 bits of the index: at most 3 for each color
        colors |= ((index >> (3 * place + channel)) & 1) << (7 - place)
    return colors.astype(np.uint8)


def overlay(image: NDArray[np.uint8], label: NDArray[np.uint8], *, alpha: float = 0.5) -> NDArray[np.uint8]:
    """Tint an image by class, with a solid outline around each region: (H, W, 3) uint8 RGB.

    The background stays as it is; ignored pixels (255) are lightened and hatched.

    Args:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) uint8 class indices.
        alpha: Weight of the class color in the tint, 0 to 1.
    """
    assert image.shape[:2] == label.shape, (image.shape, label.shape)
    color, weight = tint(label, alpha=alpha)
    mixed = image + weight[:, :, None] * (color.astype(np.float64) - image)
    return np.rint(mixed).astype(np.uint8)


def tint(label: NDArray[np.uint8], *, alpha: float = 0.5) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """What `overlay` lays over an image: (H, W, 3) uint8 RGB and the (H, W) weight of each pixel, 0 to 1."""
    rows, columns = np.indices(label.shape)
    edge = np.zeros(label.shape, dtype=bool)
    edge[:, 1:] |= label[:, 1:] != label[:, :-1]
    edge[1:] |= label[1:] != label[:-1]
    edge[:, :-1] |= label[:, :-1] != label[:, 1:]
    edge[:-1] |= label[:-1] != label[1:]
    ignored = label == IGNORE_INDEX
    weight = np.where(edge, 1.0, alpha)
    weight[ignored] = np.where((rows + columns) % 8 < 2, 0.8, 0.35)[ignored]
    weight[label == 0] = 0.0
    color = voc_palette()[label]
    color[ignored] = 255
    return color, weight


def index_png(label: NDArray[np.uint8], palette: NDArray[np.uint8] | None = None) -> bytes:
    """Encode (H, W) uint8 class indices as a mode-P PNG, with a palette of (256, 3) uint8 RGB; None is VOC's."""
    assert label.dtype == np.uint8, label.dtype
    assert label.ndim == 2, label.shape
    image, encoded = Image.fromarray(label), io.BytesIO()
    image.putpalette((voc_palette() if palette is None else palette).tobytes())
    image.save(encoded, format="PNG")
    return encoded.getvalue()


def write_index_png(path: Path, label: NDArray[np.uint8]) -> None:
    """Write (H, W) uint8 class indices as a mode-P PNG with the VOC palette; missing folders are made.

    Raises:
        AfaError: The file cannot be written; an older one stays then.
    """
    write_whole(path, index_png(label))
