"""What was predicted for an image: class map and scores, how it is saved, and what a notebook shows of it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from jinja2 import Environment, PackageLoader
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from afa.data.images import picture_pixels, read_image
from afa.data.palette import overlay, voc_palette, write_index_png
from afa.data.pixels import WHITE_LEVEL
from afa.errors import AfaError

ImageLike = str | Path | Image.Image | NDArray[np.uint8]
"""An image file, a Pillow image, or an (H, W, 3) uint8 RGB array."""

DISPLAY_SIDE: Final = 640
"""Longest side of what a notebook shows, pixels."""

_TEMPLATE: Final = "prediction.html.j2"


class Prediction:
    """Prediction of the network for one image.

    Args:
        label: (H, W) uint8 class indices.
        scores: (K, H, W) float32, or a function that computes them when they are first asked for.
        classes: K class names, `background` first.
        white_level: How the image was read: as of `afa.data.pixels.rgb_pixels`.

    Attributes:
        label: (H, W) uint8 class indices, 0 = background.
        classes: K class names, `background` first: `classes[label[y, x]]` names a pixel.
        source: The image, as it was given to `Predictor`: what a notebook lays the mask over. None where it is unknown.
    """

    def __init__(
        self,
        label: NDArray[np.uint8],
        scores: NDArray[np.float32] | Callable[[], NDArray[np.float32]],
        classes: tuple[str, ...],
        white_level: int = WHITE_LEVEL,
    ) -> None:
        self.label = label
        self.classes = classes
        self._white_level = white_level
        self._scores = scores
        self.source: ImageLike | None = None

    @property
    def scores(self) -> NDArray[np.float32]:
        """(K, H, W) float32 softmax over the classes; 0 for classes that were ruled out by tags.

        They are much larger than the label, so they are computed when they are first asked for, and kept.
        """
        if callable(self._scores):
            self._scores = self._scores()
        return self._scores

    def save(self, path: str | Path) -> None:
        """Write the class map as an index PNG with the VOC palette.

        Raises:
            AfaError: The file cannot be written.
        """
        write_index_png(Path(path), self.label)

    def overlay(self, image: ImageLike) -> Image.Image:
        """Lay the colored class map over the image that it was made from.

        Raises:
            AfaError: The image is unreadable or has another size.
        """
        return Image.fromarray(overlay(self._pixels(image), self.label))

    def _repr_html_(self) -> str:
        """What a notebook shows: the overlay, or the mask alone where the image is gone, and the classes in it."""
        try:
            pixels = self._pixels(self.source)
        except AfaError:
            pixels = None
        file = io.BytesIO()
        small_overlay(pixels, self.label).save(file, format="PNG")
        picture = base64.b64encode(file.getvalue()).decode("ascii")
        template = Environment(loader=PackageLoader("afa.inference", ""), autoescape=True).get_template(_TEMPLATE)
        return template.render(picture=picture, legend=self._legend(), label=self.label, found=pixels is not None)

    def _pixels(self, image: ImageLike | None) -> NDArray[np.uint8]:
        if image is None:
            raise AfaError("the prediction does not know its image; pass it to overlay")
        pixels = image_array(image, white_level=self._white_level)
        if pixels.shape[:2] != self.label.shape:
            raise AfaError(
                f"the image is {pixels.shape[1]}x{pixels.shape[0]} pixels and the prediction "
                f"{self.label.shape[1]}x{self.label.shape[0]}; pass the image that was predicted"
            )
        return pixels

    def _legend(self) -> list[tuple[str, tuple[int, int, int], float]]:
        """Name, color and share of the pixels of the classes that are there, the largest first, without background."""
        counts, palette = np.bincount(self.label.ravel(), minlength=len(self.classes)), voc_palette().tolist()
        there = [value for value in np.argsort(-counts, kind="stable").tolist() if value and counts[value]]
        return [(self.classes[value], tuple(palette[value]), counts[value] / self.label.size) for value in there]


def show(image: ImageLike, prediction: Prediction) -> Image.Image:
    """Put an image and the mask that was predicted for it side by side, with the names of the classes below.

    A notebook displays what a cell ends with; elsewhere `show(...).show()` opens a window and `.save` writes a file.

    Args:
        image: What was predicted.
        prediction: What `Predictor` made of it.

    Returns:
        RGB picture, at most twice `DISPLAY_SIDE` pixels wide.

    Raises:
        AfaError: The image is unreadable or has another size.
    """
    pixels = prediction._pixels(image)
    pair = [small_overlay(pixels, np.zeros_like(prediction.label)), small_overlay(pixels, prediction.label)]
    font, width, height = ImageFont.load_default(14), 2 * pair[0].width + 8, pair[0].height
    rows: list[list[tuple[str, tuple[int, int, int], float]]] = [[]]
    left = 0.0
    for name, color, share in prediction._legend():
        text = f"{name} {share:.1%}"
        needed = 20 + font.getlength(text) + 18
        if rows[-1] and left + needed > width:
            rows.append([])
            left = 0.0
        rows[-1].append((text, color, left))
        left += needed
    sheet = Image.new("RGB", (width, height + 8 + 22 * len(rows)), "white")
    for place, picture in zip((0, pair[0].width + 8), pair, strict=True):
        sheet.paste(picture, (place, 0))
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = height + 8 + 22 * number
        for text, color, start in row or [("background alone", (0, 0, 0), 0.0)]:
            draw.rectangle((start, top + 2, start + 13, top + 15), fill=color)
            draw.text((start + 20, top), text, fill="black", font=font)
    return sheet


def small_overlay(pixels: NDArray[np.uint8] | None, label: NDArray[np.uint8]) -> Image.Image:
    """An overlay of at most `DISPLAY_SIDE` pixels a side, cheap for images of any size.

    Args:
        pixels: (H, W, 3) uint8 RGB; None draws the mask alone.
        label: (H, W) uint8 class indices.
    """
    step = -(-max(label.shape) // DISPLAY_SIDE)
    few = label[::step, ::step]
    below = np.zeros((*few.shape, 3), np.uint8) if pixels is None else pixels[::step, ::step]
    return Image.fromarray(overlay(below, few))


def image_array(
    image: ImageLike, *, white_level: int = WHITE_LEVEL, max_pixels: int | None = None
) -> NDArray[np.uint8]:
    """Turn any kind of image that `Predictor` takes into (H, W, 3) uint8 RGB, the same for a file and a picture of it.

    Raises:
        AfaError: The file or picture is unreadable, or the array is not an RGB image.
    """
    if isinstance(image, (str, Path)):
        path = image if isinstance(image, Path) else Path(image)  # a member of a shard stays one
        return read_image(path, white_level=white_level, max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        return picture_pixels(image, "the picture", white_level=white_level)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise AfaError(f"the image is a {image.dtype} array of shape {image.shape}; pass (height, width, 3) uint8 RGB")
    return image
