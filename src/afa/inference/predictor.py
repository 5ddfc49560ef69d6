"""From images in memory or files to class maps and scores, in one call.

Holds all results in memory and writes only when told to; `afa.inference.files` does any number of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from afa.config import Config, Precision
from afa.data.classes import unknown_class
from afa.errors import AfaError
from afa.evaluation.evaluate import group_by_size, resolve_batch_size
from afa.evaluation.protocols import PROTOCOLS, LogitMaps, check_choice, group_sizes, host_tensor, logit_maps
from afa.inference.hub import find_pretrained, load_pretrained, push_to_hub, save_pretrained
from afa.inference.prediction import ImageLike, Prediction, image_array
from afa.inference.tiling import Tiling
from afa.model.network import AfaNetwork
from afa.runs.network import LoadedRun, load_run
from afa.runtime import pick_device, read_ahead

MAX_SIDE: Final = 1024
"""Longer side above which images are scaled down for the network or tiled, pixels."""

_Image = TypeVar("_Image", bound=ImageLike)


@dataclass(frozen=True)
class PreparedImage:
    """An image that was read and checked, ready for `Predictor.segment`.

    Attributes:
        pixels: (H, W, 3) uint8 RGB.
        view: The same, at most `max_side` pixels long or as long as a tile.
        allowed: (K,) bool, classes that its pixels may become; None allows all.
        sizes: (height, width) of each pass of the network, as `group_sizes` has it.
    """

    pixels: NDArray[np.uint8]
    view: Tensor
    allowed: NDArray[np.bool_] | None
    sizes: tuple[tuple[int, int], ...]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.pixels.shape[0], self.pixels.shape[1]


class Predictor:
    """A trained network, ready for images.

    Args:
        network: In eval mode; its parameters say the device.
        classes: The C foreground class names.
        config: Its `evaluation` section says protocol, sizes, scales and batch size, `train.precision` the arithmetic
            of the network; None is the default. With the CRF, images are refined at the size that the network may see,
            at most `max_side`.
        max_side: Larger images are scaled to this longer side for the network, pixels, or to the side of the tiles if
            that is more; masks keep the size of the image. Far above the training crops objects look unlike anything
            seen, and memory grows with the area.
        tiles: `auto` shows the network images beyond `max_side` in tiles that overlap, at native resolution
            (`evaluation.short_side` and `long_side` do not apply); a number is the side of the tiles, and larger images
            are tiled; `off` tiles none. The side of `auto` is `evaluation.short_side` or, without it, `max_side`.
        max_pixels: Limit of pixels of an image file; 0 is none, None is that of `afa.data.images`, or in tiles of
            `afa.data.rows`.

    Raises:
        AfaError: Unknown protocol, `tiles` is nothing of these, or `max_pixels` is below 0.
    """

    def __init__(
        self,
        network: AfaNetwork,
        classes: Sequence[str],
        *,
        config: Config | None = None,
        max_side: int = MAX_SIDE,
        tiles: str | int = "off",
        max_pixels: int | None = None,
    ) -> None:
        assert len(classes) == network.num_classes, (len(classes), network.num_classes)
        self.network = network
        self.classes = tuple(classes)
        self.config = config or Config()
        self.protocol: str = self.config.evaluation.protocol
        check_choice(self.protocol, PROTOCOLS, what="protocol")
        self.max_side = max_side
        self.device = next(network.parameters()).device
        self.batch_size = resolve_batch_size(self.config.evaluation.batch_size, self.device)
        self.tiling = Tiling(
            network, self.config, tiles, max_side=max_side, batch_size=self.batch_size, max_pixels=max_pixels
        )
        self.loaded: LoadedRun | None = None

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        *,
        device: str = "auto",
        protocol: str | None = None,
        precision: Precision = "fp32",
        tiles: str | int = "off",
    ) -> Predictor:
        """Load the network of a run folder, finished or not.

        Args:
            run: Folder that `afa train --out` wrote.
            device: `auto`, `cpu`, `cuda` or `mps`.
            protocol: One of `PROTOCOLS`; None is that of the run's configuration.
            precision: Arithmetic of the network.
            tiles: As of `Predictor`.

        Raises:
            AfaError: Not a run folder, no usable weights in it, no such device, or unknown protocol.
        """
        return cls._of(load_run(Path(run), pick_device(device)), protocol, precision, tiles)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str = "auto",
        protocol: str | None = None,
        precision: Precision = "fp32",
        tiles: str | int = "off",
    ) -> Predictor:
        """Load a network from a folder of `save_pretrained`, the Hugging Face hub, or a run folder.

        Args:
            source: Folder, or hub id OWNER/NAME.
            device: `auto`, `cpu`, `cuda` or `mps`.
            protocol: One of `PROTOCOLS`; None is that of the network's configuration.
            precision: Arithmetic of the network.
            tiles: As of `Predictor`.

        Raises:
            AfaError: As `afa.inference.hub.load_pretrained`; no such device, or unknown protocol.
        """
        return cls._of(load_pretrained(find_pretrained(source), pick_device(device)), protocol, precision, tiles)

    @classmethod
    def _of(cls, loaded: LoadedRun, protocol: str | None, precision: Precision, tiles: str | int) -> Predictor:
        evaluation, train = loaded.config.evaluation, replace(loaded.config.train, precision=precision)
        if protocol is not None:
            check_choice(protocol, PROTOCOLS, what="protocol")
            evaluation = replace(evaluation, protocol=cast(Any, protocol))
        config = replace(loaded.config, evaluation=evaluation, train=train)
        predictor = cls(loaded.network, loaded.classes, config=config, tiles=tiles)
        predictor.loaded = loaded
        return predictor

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the network, its configuration and a model card to a folder; see `afa.inference.hub.save_pretrained`.

        Raises:
            AfaError: The folder cannot be written, or the predictor was made from a bare network.
        """
        return save_pretrained(self._loaded(), folder)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Publish the network on the Hugging Face hub; see `afa.inference.hub.push_to_hub`.

        Raises:
            AfaError: The hub refuses, or the predictor was made from a bare network.
        """
        return push_to_hub(self._loaded(), repo_id, private=private)

    def _loaded(self) -> LoadedRun:
        if self.loaded is None:
            raise AfaError("the predictor was made from a bare network; use from_run or from_pretrained to publish it")
        return self.loaded

    @overload
    def __call__(self, image: _Image, tags: Sequence[str] | None = None) -> Prediction:
        """Segment an image; see `prepare`."""

    @overload
    def __call__(self, image: list[_Image], tags: Sequence[Sequence[str] | None] | None = None) -> list[Prediction]:
        """Segment several images; see `prepare`."""

    def __call__(
        self,
        image: ImageLike | list[_Image],
        tags: Sequence[str] | Sequence[Sequence[str] | None] | None = None,
    ) -> Prediction | list[Prediction]:
        """Segment an image of any size, or a list of them, in batches of equal size.

        Args:
            image: Image file, Pillow image, or (H, W, 3) uint8 RGB array; or a list of these.
            tags: Classes that the image is known to show: pixels become one of these or background. None
                allows every class. For a list of images, a list of these.

        Returns:
            Class map and scores at the size of the image; for a list, a list in its order.

        Raises:
            AfaError: An image is unreadable or an array of another kind; a tag is none of the classes; there are
                not as many tags as images.
        """
        if not isinstance(image, list):
            prediction = self._predict([self.prepare(image, tags)])[0]  # type: ignore[arg-type]
            prediction.source = image
            return prediction
        each_tags = [None] * len(image) if tags is None else list(tags)
        if len(each_tags) != len(image):
            raise AfaError(f"there are {len(image)} images and tags of {len(each_tags)}; give one entry for each image")

        def prepared() -> Iterator[tuple[int, PreparedImage]]:
            for index, reading in read_ahead(lambda i: self.prepare(image[i], each_tags[i]), range(len(image))):
                yield index, reading.result()

        predictions: dict[int, Prediction] = {}
        for group in group_by_size(prepared(), sizes=lambda item: item[1].sizes, batch_size=self.batch_size):
            made = self._predict([each for _, each in group])
            predictions.update({index: prediction for (index, _), prediction in zip(group, made, strict=True)})
        for index, each in enumerate(image):
            predictions[index].source = each
        return [predictions[index] for index in range(len(image))]

    def prepare(self, image: ImageLike, tags: Sequence[str] | None = None) -> PreparedImage:
        """Read an image, check its tags and scale it to one view unless it is tiled; any thread may do it.

        Args:
            image: Image file, Pillow image, or (H, W, 3) uint8 RGB array.
            tags: Classes that the image is known to show; None allows every class.

        Raises:
            AfaError: The image is unreadable or an array of another kind; a tag is none of the classes.
        """
        pixels = view = image_array(image, white_level=self.config.data.white_level, max_pixels=self.tiling.max_pixels)
        height, width = pixels.shape[:2]
        shrink = max(self.max_side, self.tiling.side) / max(height, width)
        if shrink < 1 and not self.tiling.covers((height, width)):
            size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
            view = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        return PreparedImage(
            pixels,
            host_tensor(view, device=self.device),
            self.allowed(tags, where=f"{image}: " if isinstance(image, str | Path) else ""),
            group_sizes((view.shape[0], view.shape[1]), self.config),
        )

    def segment(self, images: Sequence[PreparedImage]) -> list[LogitMaps]:
        """Run the network on images of `prepare` that have equal `sizes`, in one batch; a GPU is not synchronized.

        The logits of each image are on the device, without the classes that its tags rule out: small, or with the CRF
        as large as the view.
        """
        return logit_maps(
            self.network,
            [image.view for image in images],
            self.config,
            allowed=[image.allowed for image in images],
        )

    def _predict(self, images: Sequence[PreparedImage]) -> list[Prediction]:
        names = ("background", *self.classes)
        if self.tiling.covers(images[0].size):
            return [
                Prediction(
                    self.tiling.label(each.pixels, each.allowed),
                    partial(self.tiling.scores, each.pixels, each.allowed),
                    names,
                )
                for each in images
            ]
        maps = self.segment(images)
        labels = [each.label(image.size) for each, image in zip(maps, images, strict=True)]
        return [
            Prediction(label.cpu().numpy(), partial(_scores, each, image.size), names, self.config.data.white_level)
            for label, each, image in zip(labels, maps, images, strict=True)
        ]

    def allowed(self, tags: Sequence[str] | None, *, where: str = "") -> NDArray[np.bool_] | None:
        """(K,) which channels the tags leave, None for all; an `AfaError` that begins with `where` for another tag."""
        if tags is None:
            return None
        for tag in tags:
            if tag not in self.classes:
                raise AfaError(f"{where}unknown tag {tag!r}; {unknown_class(tag, self.classes)}")
        return np.array([True, *(name in tags for name in self.classes)])


def _scores(maps: LogitMaps, size: tuple[int, int]) -> NDArray[np.float32]:
    scores: NDArray[np.float32] = maps.scores(size).cpu().numpy()
    return scores
