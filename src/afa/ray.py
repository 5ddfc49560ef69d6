"""Masks of a Ray data set on the cluster that it is on; the same class serves Spark (docs/distributed.md).

Importing this needs neither Ray nor Spark. `segment` needs Ray Data, the extra `ray`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.data.palette import index_png
from afa.errors import AfaError, BrokenImageError, first_line
from afa.evaluation.protocols import PROTOCOLS, check_choice
from afa.inference.hub import find_pretrained, load_pretrained
from afa.inference.prediction import image_array
from afa.inference.predictor import Predictor
from afa.runtime import pick_device

if TYPE_CHECKING:
    import pandas
    import ray.data


def segment(
    dataset: ray.data.Dataset,
    run: str | Path,
    *,
    column: str = "image",
    actors: int | tuple[int, int] = 2,
    batch_size: int = 16,
    gpus: float = 0,
    cpus: float = 1,
    **settings: Any,
) -> ray.data.Dataset:
    """Segment the images of a data set, lazily, by a pool of actors that each load the network once.

    Args:
        dataset: What `ray.data.read_images`, `read_binary_files`, `read_parquet` or any other reader gave.
        run: Run folder that every machine sees, folder of `save_pretrained`, or hub id.
        column: Its images, of a kind that `Segmenter` takes: `bytes` after `read_binary_files`.
        actors: How many, or the fewest and the most.
        batch_size: Rows that an actor takes at once.
        gpus: GPUs of each actor; 1 for one each, 0.5 where two share one.
        cpus: Cores of each actor. Those that read images need some that are left.
        settings: Of `Segmenter`.

    Returns:
        The data set without its images and with `mask` and `error`, as `Segmenter` says.

    Raises:
        AfaError: Ray Data is not installed. What is wrong with `run` is raised when the data set is read.
    """
    try:
        from ray.data import ActorPoolStrategy
    except ImportError:
        raise AfaError("Ray Data is not installed; pip install 'afa[ray]'") from None
    fewest, most = (actors, actors) if isinstance(actors, int) else actors
    return dataset.map_batches(
        Segmenter,
        fn_constructor_kwargs={"run": str(run), "column": column, **settings},
        compute=ActorPoolStrategy(min_size=fewest, max_size=most),
        batch_size=batch_size,
        num_gpus=gpus or None,
        num_cpus=cpus,
    )


class Segmenter:
    """Segments batches of rows; for `map_batches` of Ray and, by `frames`, `mapInPandas` of Spark.

    The network is loaded at the first batch, so that an object is small when it is sent to a worker. A row whose image
    is broken costs no other: its mask is None, and its error says why.

    Args:
        run: Run folder, folder of `save_pretrained`, or hub id.
        column: The images: (H, W, 3) uint8 arrays, bytes of files, paths, or as in data sets of Hugging Face mappings
            with `bytes` or `path`.
        tags: Column with the tags of each image, a sequence of class names; None allows all classes.
        keep_images: Hand `column` on, too.
        device: `auto`, `cpu`, `cuda` or `mps`.
        protocol: One of `PROTOCOLS`; None is that of the run.
        precision: Arithmetic of the network; None is that of the run, as for `afa predict`.
        tiles: As of `Predictor`.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        column: str = "image",
        tags: str | None = None,
        keep_images: bool = False,
        device: str = "auto",
        protocol: str | None = None,
        precision: str | None = None,
        tiles: str | int = "off",
    ) -> None:
        self.run, self.column, self.tags, self.keep_images = str(run), column, tags, keep_images
        self.device, self.protocol, self.precision, self.tiles = device, protocol, precision, tiles
        self._predictor: Predictor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_predictor": None}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Segment a batch.

        Args:
            batch: Columns of n rows.

        Returns:
            The columns, with `mask`: (n,) bytes of index PNGs, those that `afa predict` writes, or None; and `error`:
            (n,) a line where there is no mask, else empty.

        Raises:
            AfaError: As `Predictor.from_pretrained`; there is no such column.
        """
        for name in filter(None, (self.column, self.tags)):
            if name not in batch:
                raise AfaError(f"there is no column {name!r}, only {', '.join(batch)}; name it")
        images = batch[self.column]
        tags = batch[self.tags] if self.tags is not None else [None] * len(images)
        predictor = self._predictor = self._predictor or self._load()
        masks, errors = np.full(len(images), None, object), np.full(len(images), "", object)
        pixels: dict[int, NDArray[np.uint8]] = {}
        for row, (image, known) in enumerate(zip(images, tags, strict=True)):
            try:
                predictor.allowed(known)
                pixels[row] = _pixels(image, predictor.config.data.white_level)
            except AfaError as error:
                errors[row] = str(error)
        found = predictor(list(pixels.values()), [_listed(tags[row]) for row in pixels])
        for row, prediction in zip(pixels, found, strict=True):
            masks[row] = index_png(prediction.label)
        kept = {name: values for name, values in batch.items() if self.keep_images or name != self.column}
        return {**kept, "mask": masks, "error": errors}

    def frames(self, frames: Iterable[pandas.DataFrame]) -> Iterator[pandas.DataFrame]:
        """Segment data frames: what `DataFrame.mapInPandas` of Spark takes. Columns as of a call.

        In the schema of the result, `mask` is binary and `error` a string.
        """
        for frame in frames:
            result = self({str(name): frame[name].to_numpy() for name in frame})
            kept = frame if self.keep_images else frame.drop(columns=self.column)
            yield kept.assign(mask=result["mask"], error=result["error"])

    def _load(self) -> Predictor:
        loaded = load_pretrained(find_pretrained(self.run), pick_device(self.device))
        evaluation, train = loaded.config.evaluation, loaded.config.train
        if self.protocol is not None:
            check_choice(self.protocol, PROTOCOLS, what="protocol")
            evaluation = replace(evaluation, protocol=cast(Any, self.protocol))
        if self.precision is not None:
            train = replace(train, precision=cast(Any, self.precision))
        config = replace(loaded.config, evaluation=evaluation, train=train)
        return Predictor(loaded.network, loaded.classes, config=config, tiles=self.tiles)


def _listed(tags: Sequence[str] | None) -> list[str] | None:
    return None if tags is None else list(tags)


def _pixels(image: Any, white_level: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of a cell."""
    where = "the image"
    if isinstance(image, Mapping):  # of Hugging Face
        where = image.get("path") or where
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes | bytearray | memoryview):
        try:
            image = Image.open(io.BytesIO(image))
        except Exception as error:  # decoders raise nearly anything on a broken file
            raise BrokenImageError(f"{where}: not a readable image ({first_line(error)}); replace it") from None
    if image is None:
        raise BrokenImageError(f"{where}: there is none; fill it in")
    return image_array(np.asarray(image) if isinstance(image, list) else image, white_level=white_level)
