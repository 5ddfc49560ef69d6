"""What a frozen encoder makes of the training images, computed once and kept.

Every image that a step takes is seen once, as a whole: its longer side as long as the crop, both sides multiples of the
patch. Images that no step takes are left out; a longer schedule or another seed adds what it needs to the same cache.
Feature levels and class scores go to disk in half precision; from then on a training step reads them, mirrored or not,
and runs the decoder alone, with the affinity head if it learns. Pseudo labels still see the pixels.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.config import Config
from afa.data.dataset import TaggedImages
from afa.data.images import read_size
from afa.data.loader import whole_views
from afa.data.order import Order
from afa.data.pixel_cache import PixelCache
from afa.data.pixels import WHITE_LEVEL
from afa.data.transforms import whole_size
from afa.errors import AfaError
from afa.model.backbone import Encoded
from afa.model.families import TOKEN_SIZES
from afa.model.network import AfaNetwork
from afa.pseudo.cam import ViewScore, normalize_cam
from afa.runs.run import Run
from afa.runtime import ALONE, Processes, autocast, duration, image_progress, interrupts, say, shows_progress
from afa.training.feature_store import FeatureStore, format_gib, remove_store
from afa.types import Batch, normalize_image

_VERSION: Final = 3
"""Of what is kept and how it lies in a row: raise it when either changes."""

_BATCH_IMAGES: Final = {"cpu": 8, "cuda": 32}
_COMMIT_BYTES: Final = 2**28
_COMMIT_SECONDS: Final = 30.0
_TELL_SECONDS: Final = 5.0
_ADVICE: Final = "lower augment.crop_size or model.feature_levels"

Grid = tuple[int, int]


class FeatureReader:
    """Returns what the cache has of a batch.

    Args:
        store: It has all images that the steps take.
        grids: (h, w) tokens of each of them.
        channels: Of each feature level, and last of the class scores.
        patch: Pixels of a token.
        crop_size: Side of the canvas of a batch, pixels.
    """

    def __init__(
        self, store: FeatureStore, grids: Mapping[int, Grid], channels: Sequence[int], *, patch: int, crop_size: int
    ) -> None:
        self.store = store
        self.grids = grids
        self.channels = list(channels)
        self.patch = patch
        self.side = crop_size // patch

    def read(self, indices: Sequence[int], flips: Sequence[bool]) -> tuple[Tensor, ...]:
        """Read what a step needs of its images.

        Args:
            indices: B images.
            flips: Which of them the step sees mirrored.

        Returns:
            For each feature level, and last for the class scores, (B, channels, S, S) fp16: each image in the top left
            corner of the canvas, 0 beside it.
        """
        side = self.side
        canvas = np.zeros((len(indices), sum(self.channels), side, side), dtype=np.float16)
        for place, index, flip in zip(canvas, indices, flips, strict=True):
            height, width = self.grids[index]
            kept = self.store.row(index).reshape(-1, height, width)
            place[:, :height, :width] = kept[:, :, ::-1] if flip else kept
        return torch.split(torch.from_numpy(canvas), self.channels, dim=1)


class CachedScore(ViewScore):
    """CAM passes of a batch of whose images everything is kept already.

    Args:
        score: CAM pass of the network.
        kept: What the encoder made of the batch.
    """

    def __init__(self, score: Any, kept: Encoded) -> None:
        self.score = score
        self.kept = kept

    def __call__(self, image: Tensor, affinity: bool) -> Any:
        """Score pixels: (B, 3, H, W) normalized image."""
        return self.score(image, affinity)

    def view(self, scale: float, flips: Sequence[bool], affinity: bool) -> Any:
        """Score the kept view; see `ViewScore.view`."""
        assert scale == 1.0, scale
        assert not any(flips), flips
        return self.score(self.kept, affinity)


def encoded(batch: Batch) -> Encoded:
    """What `FeatureReader.read` gave for a batch, as the network takes it."""
    return Encoded(batch.frozen[:-1], batch.frozen[-1])


def prepare_features(
    network: AfaNetwork,
    images: TaggedImages,
    config: Config,
    run: Path,
    *,
    processes: Processes = ALONE,
    cache: PixelCache | None = None,
) -> FeatureReader:
    """Open the feature cache of a run, and compute what is missing of the images that its steps take.

    A cache for other weights, words, images or settings is never used; one in the run's own folder is deleted.

    Args:
        network: Its encoder is run, where it is.
        images: Training images.
        config: Settings.
        run: Run folder.
        processes: Processes that train together and share the images; all see the folder.
        cache: Where decoded images stay.

    Raises:
        AfaError: Blocks of the encoder learn; the cache does not fit into `train.feature_cache_gib` or on the disk;
            features are too large for fp16; an image cannot be read; stopped by Ctrl-C.
    """
    frozen, depth = config.model.freeze_blocks, TOKEN_SIZES[config.model.backbone].depth
    if frozen < depth:
        raise AfaError(
            f"model.freeze_blocks is {frozen}, but the feature cache needs all {depth} blocks of "
            f"{config.model.backbone} frozen; set it to {depth}, or train.feature_cache to false"
        )
    patch, crop_size = network.backbone.strides[-1], config.augment.crop_size
    taken = Order(images, config).taken(config.schedule.max_steps)
    grids = {}
    for index in taken:
        height, width = whole_size(_size(images, index), crop_size, patch)
        grids[index] = (height // patch, width // patch)
    channels = (*network.backbone.channels, network.num_classes)
    key = feature_key(network, images, config)
    base = Path(config.data.feature_dir or Run(run).features)
    folder = base / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    if processes.is_main:
        store = FeatureStore.open(folder)
        if store is None or store.missing(taken):
            if not config.data.feature_dir:
                _remove_others(base, folder, key)
            store = store or FeatureStore(folder, {"key": key})
            values = sum(grids[index][0] * grids[index][1] for index in store.missing(taken)) * sum(channels)
            store.reserve(2 * values, config.train.feature_cache_gib, setting="train.feature_cache_gib", advice=_ADVICE)
            if shows_progress():
                say(_words(store, taken, len(images), 2 * values, config))
            store.commit()
    # Others could see rows that are written meanwhile, and share what is left of them.
    missing = processes.from_main(lambda: _open(folder).missing(taken))
    store = _open(folder)
    if missing:
        _fill(store, missing, network, images, taken, config, processes, cache=cache)
        processes.wait()
        store = _open(folder)
    return FeatureReader(store, grids, channels, patch=patch, crop_size=crop_size)


def _open(folder: Path) -> FeatureStore:
    store = FeatureStore.open(folder)
    if store is None:
        raise AfaError(f"{folder}: other machines do not see the feature cache; set data.feature_dir to a shared disk")
    return store


def feature_key(network: AfaNetwork, images: TaggedImages, config: Config) -> dict[str, Any]:
    """All that the cache depends on, as JSON: a cache with another key is stale."""
    assert network.text is not None
    words = hashlib.sha256()
    for tensor in (network.text.classes, network.text.background):
        words.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    model = config.model
    # Without a second encoder, keys are what they were before there could be one.
    second = {"second": [model.second_backbone, model.second_feature_levels, model.second_similarity]}
    return {
        "version": _VERSION,
        "backbone": model.backbone,
        "weights": network.backbone.weights_hash(),
        "feature_levels": model.feature_levels,
        "words": words.hexdigest(),
        "sharpness": network.text.sharpness,
        "crop_size": config.augment.crop_size,
        "precision": config.train.precision,
        "images": _hash_files(images),
    } | (second if model.second_backbone else {})


def _words(store: FeatureStore, taken: Sequence[int], num_images: int, more: int, config: Config) -> str:
    """How many images the cache holds, how large it gets, and where."""
    which = (
        f"{len(taken)} images" if len(taken) == num_images else f"the {len(taken)} of {num_images} images to be used"
    )
    there = len(taken) - len(store.missing(taken))
    size = f"{format_gib(store.num_bytes + more)} of at most {config.train.feature_cache_gib:g} GiB"
    return f"feature cache: {which}{f', {there} of them there already' if there else ''}, {size} in {store.folder}"


def _fill(
    store: FeatureStore,
    missing: Sequence[int],
    network: AfaNetwork,
    images: TaggedImages,
    taken: Sequence[int],
    config: Config,
    processes: Processes,
    *,
    cache: PixelCache | None,
) -> None:
    """Compute this process's share of the rows that are missing; says soon how long it takes."""
    device = next(network.parameters()).device
    size = _BATCH_IMAGES.get(device.type, 8)
    # Each process takes whole batches: what is kept does not depend on how many there are.
    batches = processes.share([missing[first : first + size] for first in range(0, len(missing), size)])
    share = [index for batch in batches for index in batch]
    part = store.part(processes.rank) if processes.count > 1 else store
    multiple = network.backbone.strides[-1]
    views = whole_views(images, config, multiple, share, batch_size=size, processes=processes, cache=cache)
    began = committed = time.perf_counter()
    done, pending, tell = 0, 0, shows_progress()
    there = len(taken) - len(missing)
    bar = image_progress("feature cache", total=len(taken), done=there, processes=processes)
    with bar as advance, interrupts() as asked_to_stop:
        for batch in views:
            for row in _rows(network, batch, config, device):
                index = share[done]
                if not np.isfinite(row).all():
                    raise AfaError(
                        f"image {images.names[index]}: its features are too large for fp16; set train.feature_cache "
                        "to false"
                    )
                part.write(index, row)
                done, pending = done + 1, pending + row.nbytes
            now = time.perf_counter()
            if tell and now - began > _TELL_SECONDS:
                say(f"feature cache: about {duration((now - began) / done * (len(share) - done))} left")
                tell = False
            stop = asked_to_stop()
            if pending > _COMMIT_BYTES or now - committed > _COMMIT_SECONDS or stop or done == len(share):
                part.commit()
                pending, committed = 0, now
            advance(len(batch))
            if stop and done < len(share):
                so_far = there + min(len(missing), done * processes.count)
                raise AfaError(
                    f"stopped after {so_far} of {len(taken)} images of the feature cache; the same command with "
                    "--resume goes on"
                )


def _rows(
    network: AfaNetwork, views: Sequence[Tensor], config: Config, device: torch.device
) -> list[NDArray[np.float16]]:
    """The row of each image, those of one size computed together."""
    rows: dict[int, NDArray[np.float16]] = {}
    for shape in dict.fromkeys(view.shape for view in views):
        places = [place for place, view in enumerate(views) if view.shape == shape]
        pixels = torch.stack([views[place] for place in places]).to(device)  # (n, 3, H, W)
        with autocast(device, config.train.precision):
            kept = network.encode(normalize_image(pixels.float() / 255))
        # A CAM scales each class to its own range, which may be too narrow for half precision.
        joined = torch.cat([*kept.features, normalize_cam(kept.class_scores)], dim=1).half()
        rows.update(zip(places, joined.flatten(1).cpu().numpy(), strict=True))
    return [rows[place] for place in range(len(views))]


def _size(images: TaggedImages, index: int) -> tuple[int, int]:
    path = images.image_path(index)
    if path.is_file():
        return read_size(path)
    height, width = images.image(index).shape[:2]
    return height, width


def _hash_files(images: TaggedImages) -> str:
    """Hash of names, sizes and times of the image files; of names alone where images are no files."""
    digest = hashlib.sha256(b"" if images.white_level == WHITE_LEVEL else str(images.white_level).encode())
    for index, name in enumerate(images.names):
        path = images.image_path(index)
        stat = path.stat() if path.is_file() else None
        digest.update(f"{name}\0{stat.st_size if stat else 0}\0{stat.st_mtime_ns if stat else 0}\n".encode())
    return digest.hexdigest()


def _remove_others(base: Path, folder: Path, key: dict[str, Any]) -> None:
    for path in base.iterdir() if base.is_dir() else ():
        if path == folder:
            continue
        other = FeatureStore.open(path)
        if other is not None:
            theirs = other.about.get("key", {})
            changed = [name for name in key if theirs.get(name) != key[name]]
            say(f"{path}: a feature cache of other {', '.join(changed)}: deleted, made anew")
        remove_store(path)
