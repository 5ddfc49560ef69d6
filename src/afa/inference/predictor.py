"""From an image in memory or a file to its class map and scores, in one call.

Handles one image at a time and writes only when told to; `afa.inference.predict` does many files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from afa.build import load_run
from afa.config import EvaluationConfig, Precision
from afa.data.images import read_image
from afa.data.palette import overlay, write_index_png
from afa.data.tags import unknown_class
from afa.errors import AfaError
from afa.evaluation.protocols import PROTOCOLS, check_choice, dense_logits
from afa.model.network import AfaNetwork
from afa.runtime import pick_device

ImageLike = str | Path | Image.Image | NDArray[np.uint8]
"""An image file, a Pillow image, or an (H, W, 3) uint8 RGB array."""


@dataclass(frozen=True)
class Prediction:
    """What the network makes of one image.

    Attributes:
        label: (H, W) uint8 class indices, 0 = background.
        scores: (K, H, W) float32 softmax over the classes; 0 for classes that were ruled out by tags.
        classes: K class names, `background` first: `classes[label[y, x]]` names a pixel.
    """

    label: NDArray[np.uint8]
    scores: NDArray[np.float32]
    classes: tuple[str, ...]

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
        pixels = image_array(image)
        if pixels.shape[:2] != self.label.shape:
            raise AfaError(
                f"the image is {pixels.shape[1]}x{pixels.shape[0]} pixels and the prediction "
                f"{self.label.shape[1]}x{self.label.shape[0]}; pass the image that was predicted"
            )
        return Image.fromarray(overlay(pixels, self.label))


class Predictor:
    """A trained network, ready for images.

    Args:
        network: In eval mode; its parameters say the device.
        classes: The C foreground class names.
        config: Sizes and scales of the protocols; None is the default.
        protocol: `single` or `multiscale`; None is `config.protocol`.
        max_side: Larger images are scaled to this longer side for the network, pixels; masks keep the size of
            the image. Far above the training crops objects look unlike anything seen, and memory grows with
            the area.
        precision: Arithmetic of the network.

    Raises:
        AfaError: Unknown protocol.
    """

    def __init__(
        self,
        network: AfaNetwork,
        classes: Sequence[str],
        *,
        config: EvaluationConfig | None = None,
        protocol: str | None = None,
        max_side: int = 1024,
        precision: Precision = "fp32",
    ) -> None:
        assert len(classes) == network.num_classes, (len(classes), network.num_classes)
        self.network = network
        self.classes = tuple(classes)
        self.config = config or EvaluationConfig()
        self.protocol = protocol if protocol is not None else self.config.protocol
        check_choice(self.protocol, PROTOCOLS, what="protocol")
        self.max_side = max_side
        self.precision = precision

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        *,
        device: str = "auto",
        protocol: str | None = None,
        precision: Precision = "fp32",
    ) -> Predictor:
        """Load the network of a run folder, finished or not.

        Args:
            run: Folder that `afa train --out` wrote.
            device: `auto`, `cpu`, `cuda` or `mps`.
            protocol: `single` or `multiscale`; None is that of the run's configuration.
            precision: Arithmetic of the network.

        Raises:
            AfaError: Not a run folder, no usable weights in it, no such device, or unknown protocol.
        """
        loaded = load_run(Path(run), pick_device(device))
        return cls(
            loaded.network,
            loaded.classes,
            config=loaded.config.evaluation,
            protocol=protocol,
            precision=precision,
        )

    @torch.inference_mode()
    def __call__(self, image: ImageLike, tags: Sequence[str] | None = None) -> Prediction:
        """Segment an image of any size.

        Args:
            image: Image file, Pillow image, or (H, W, 3) uint8 RGB array.
            tags: Classes that the image is known to show: pixels become one of these or background. None
                allows every class.

        Returns:
            Class map and scores at the size of the image.

        Raises:
            AfaError: The image is unreadable or an array of another kind; a tag is none of the classes.
        """
        pixels = image_array(image)
        height, width = pixels.shape[:2]
        shrink = self.max_side / max(height, width)
        if shrink < 1:
            size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
            pixels = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        absent = self._absent(tags)
        logits = dense_logits(
            self.network,
            pixels,
            protocol=self.protocol,
            config=self.config,
            out_size=(height, width),
            precision=self.precision,
        ).segmentation
        logits[absent] = -torch.inf
        label = logits.argmax(0).to(torch.uint8)
        return Prediction(label.cpu().numpy(), _softmax_(logits).cpu().numpy(), ("background", *self.classes))

    def _absent(self, tags: Sequence[str] | None) -> list[int]:
        """Channels that `tags` rule out."""
        if tags is None:
            return []
        for tag in tags:
            if tag not in self.classes:
                raise AfaError(f"unknown tag {tag!r}; {unknown_class(tag, self.classes)}")
        return [channel for channel, name in enumerate(self.classes, start=1) if name not in tags]


def image_array(image: ImageLike) -> NDArray[np.uint8]:
    """Turn any kind of image that `Predictor` takes into (H, W, 3) uint8 RGB.

    Raises:
        AfaError: The file is unreadable, or the array is not an RGB image.
    """
    if isinstance(image, (str, Path)):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise AfaError(f"the image is a {image.dtype} array of shape {image.shape}; pass (height, width, 3) uint8 RGB")
    return image


def _softmax_(logits: Tensor) -> Tensor:
    """Softmax over the first axis, in place: (K, H, W) of a large photograph is there once, not twice."""
    logits.sub_(logits.amax(0)).exp_()
    return logits.div_(logits.sum(0))
