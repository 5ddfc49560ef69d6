"""The output of the frozen part of an encoder for the training images, computed once and kept.

Training with `train.feature_cache` sees few views of each image: as a whole, plain or mirrored, and both at the scales
of the CAM. The frozen blocks run over each of them before the first step; from then on every pass of the network
starts from their tokens, which workers read with the batch. Pseudo labels still see the pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.config import Config
from afa.data.dataset import TaggedImages
from afa.data.loader import whole_views
from afa.data.pixel_cache import PixelCache
from afa.errors import AfaError
from afa.model.backbone import FrozenTokens
from afa.model.network import AfaNetwork
from afa.pseudo.cam import ViewScore, scale_view
from afa.runs.run import Run
from afa.runtime import ALONE, Processes, autocast, duration, image_progress, interrupts, say
from afa.training.feature_store import FeatureStore, format_gib, remove_store
from afa.training.schedule import Phase, phase
from afa.types import Batch, NetworkOutput, normalize_image

if TYPE_CHECKING:
    from afa.model.vit import TokenBackbone

_VERSION: Final = 1
"""Of the views and of the rows' layout: raise it when either changes."""

_BATCH_IMAGES: Final = {"cpu": 4, "cuda": 32}
_COMMIT_BYTES: Final = 2**28
_COMMIT_SECONDS: Final = 30.0
_ADVICE: Final = "lower augment.crop_size or model.feature_levels, or take fewer pseudo.scales"


@dataclass(frozen=True)
class FeaturePart:
    """One array of a row.

    Attributes:
        scale: Of the view.
        name: Field of `FrozenTokens`; features with their number.
        shape: (sides, ...): the plain view, and the mirrored one where anything needs it.
        grid: (h, w) tokens of the view.
    """

    scale: float
    name: str
    shape: tuple[int, ...]
    grid: tuple[int, int]


class FeatureReader:
    """Returns what the cache has of a batch.

    A step takes only what its phase needs: `read` is told the step, the others the phase, and they agree on it.

    Args:
        store: Complete.
        config: Settings that it was made with.
    """

    def __init__(self, store: FeatureStore, config: Config) -> None:
        self.store = store
        self.config = config
        self.parts = [
            FeaturePart(part["scale"], part["name"], tuple(part["shape"]), (part["grid"][0], part["grid"][1]))
            for part in store.about["parts"]
        ]
        self._ends = list(accumulate(math.prod(part.shape) for part in self.parts))
        assert self._ends[-1] == store.row_size, store.row_size

    def read(self, step: int, indices: Sequence[int], flips: Sequence[bool]) -> tuple[Tensor, ...]:
        """Read what a step needs of its images.

        Args:
            step: Step, from 0.
            indices: B images.
            flips: Which of them the step sees mirrored.

        Returns:
            For each part that the step needs (B, sides, ...) fp16: the side that the step sees, and where the CAM
            needs it the other.
        """
        config = self.config
        kind = phase(step, config)
        wanted = self._wanted(kind)
        arrays = [
            np.empty((len(indices), sides, *self.parts[place].shape[1:]), dtype=np.float16)
            for place, sides in wanted.items()
        ]
        for number, (index, flip) in enumerate(zip(indices, flips, strict=True)):
            row = self.store.row(index)
            for array, (place, sides) in zip(arrays, wanted.items(), strict=True):
                shape = self.parts[place].shape
                start, end = self._ends[place] - math.prod(shape), self._ends[place]
                both = row[start:end].reshape(shape)
                array[number] = (both[::-1] if flip else both)[:sides]
        return tuple(torch.from_numpy(array) for array in arrays)

    def training_view(self, batch: Batch, kind: Phase) -> FrozenTokens:
        """The tokens that the training pass of a batch starts from."""
        return self.view(batch, kind, 1.0, (False,), features=True, attention=kind.affinity)

    def view(
        self,
        batch: Batch,
        kind: Phase,
        scale: float,
        flips: Sequence[bool],
        *,
        features: bool = False,
        attention: bool = False,
    ) -> FrozenTokens:
        """The tokens of views of a batch.

        Args:
            batch: With what `read` gave for a step of this phase.
            kind: Phase of the step.
            scale: Of the views.
            flips: Sides, one after the other: False as the step sees the images, True mirrored.
            features: Also the feature levels.
            attention: Also what the attention is computed from, where the cache keeps it.
        """
        arrays = {
            self.parts[place].name: array
            for place, array in zip(self._wanted(kind), batch.frozen, strict=True)
            if self.parts[place].scale == scale
        }
        grid = next(part.grid for part in self.parts if part.scale == scale)

        def take(name: str) -> Tensor:
            sides = [arrays[name][:, int(flip)] for flip in flips]
            return sides[0] if len(sides) == 1 else torch.cat(sides)

        levels = [name for name in arrays if name.startswith("features")] if features else []
        kept = attention and any(part.name == "attention_tokens" for part in self.parts)
        return FrozenTokens(
            tokens=take("tokens"),
            features=tuple(take(name) for name in levels),
            grid=grid,
            attention_tokens=take("attention_tokens") if kept else None,
        )

    def _wanted(self, kind: Phase) -> dict[int, int]:
        """Places of the parts that a phase needs, in order, and how many sides of each."""
        pseudo = self.config.pseudo
        walks = kind.want_refined and pseudo.propagation != "none"
        wanted = {}
        for place, part in enumerate(self.parts):
            in_cam = kind.labels and part.scale in pseudo.scales
            in_walk = walks and part.scale == max(pseudo.scales)
            if part.name == "tokens":
                sides = 2 if in_cam else int(part.scale == 1)
            elif part.name == "attention_tokens":
                sides = int(in_walk or (kind.affinity and part.scale == 1))
            else:
                sides = 1
            if sides:
                wanted[place] = sides
        return wanted


ScorePixels = Callable[[Tensor | FrozenTokens, bool], NetworkOutput]
"""(pixels or what the frozen part of the network made of them, affinity wanted) -> a CAM pass."""


@dataclass
class CachedScore(ViewScore):
    """CAM passes of one batch that start from the cache.

    Attributes:
        score: CAM pass of the network.
        reader: The cache.
        batch: With what the cache has of it.
        kind: Phase of the step.
    """

    score: ScorePixels
    reader: FeatureReader
    batch: Batch
    kind: Phase

    def __call__(self, image: Tensor, affinity: bool) -> NetworkOutput:
        """Score pixels: (B, 3, H, W) normalized image."""
        return self.score(image, affinity)

    def view(self, scale: float, flips: Sequence[bool], affinity: bool) -> NetworkOutput:
        """Score kept views; see `ViewScore.view`."""
        tokens = self.reader.view(self.batch, self.kind, scale, flips, attention=affinity)
        return self.score(tokens, affinity)


def prepare_features(
    network: AfaNetwork,
    images: TaggedImages,
    config: Config,
    run: Path,
    *,
    processes: Processes = ALONE,
    cache: PixelCache | None = None,
    progress: bool = True,
) -> FeatureReader:
    """Open the feature cache of a run, and compute what is missing.

    A cache for other weights, images or settings is never used; one in the run's own folder is deleted.

    Args:
        network: Its encoder's frozen part is run, where it is.
        images: Training images.
        config: Settings.
        run: Run folder.
        processes: Processes that train together; the first one computes.
        cache: Where decoded images stay.
        progress: Show progress on standard error.

    Returns:
        Reader of the complete cache.

    Raises:
        AfaError: The encoder cannot start from its middle; the cache does not fit into `train.feature_cache_gib` or on
            the disk; tokens are too large for fp16; an image cannot be read; stopped by Ctrl-C.
    """
    from afa.model.vit import TokenBackbone  # here, as transformers takes seconds to import

    backbone = network.backbone
    if not isinstance(backbone, TokenBackbone):
        raise AfaError(
            f"train.feature_cache is true, but {config.model.backbone} has no single list of blocks to cut in two; "
            "take a plain vision transformer, such as dinov2_small_reg, or set it to false"
        )
    key = feature_key(backbone, images, config)
    base = Path(config.data.feature_dir or Run(run).features)
    folder = base / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    store = FeatureStore.open(folder)
    if processes.is_main and (store is None or not store.is_complete):
        if not config.data.feature_dir:
            _remove_others(base, folder, key)
        maker = _Maker(backbone, images, config, processes, cache)
        store = maker.make(folder, key, store, progress=progress)
    while store is None or not store.is_complete:  # Not a barrier, which would time out after some minutes.
        time.sleep(1)
        store = FeatureStore.open(folder)
    processes.wait()
    return FeatureReader(store, config)


def feature_key(backbone: TokenBackbone, images: TaggedImages, config: Config) -> dict[str, Any]:
    """All that the tokens of the cache depend on, as JSON: a cache with another key is stale."""
    pseudo = config.pseudo
    attention = {1.0} if config.loss.affinity_weight > 0 else set()
    attention |= {max(pseudo.scales)} if pseudo.propagation != "none" else set()
    return {
        "version": _VERSION,
        "backbone": config.model.backbone,
        "weights": backbone.weights_hash(),
        "freeze_blocks": config.model.freeze_blocks,
        "feature_levels": config.model.feature_levels,
        "affinity_blocks": config.model.affinity_blocks,
        "crop_size": config.augment.crop_size,
        "scales": sorted(pseudo.scales),
        "attention_scales": sorted(attention),
        "mirrored": config.augment.flip_probability > 0,
        "precision": config.train.precision,
        "images": _hash_files(images),
    }


@dataclass
class _Maker:
    """Runs the frozen blocks over all views of all images."""

    backbone: TokenBackbone
    images: TaggedImages
    config: Config
    processes: Processes
    cache: PixelCache | None

    def __post_init__(self) -> None:
        self.device = next(self.backbone.parameters()).device
        self.batch_size = _BATCH_IMAGES.get(self.device.type, 8)
        self.scales = sorted({1.0, *self.config.pseudo.scales})

    def make(self, folder: Path, key: dict[str, Any], store: FeatureStore | None, *, progress: bool) -> FeatureStore:
        """Make a store, or what is missing of it, and say first how large it gets."""
        size = self.config.augment.crop_size
        # Two images show what to keep and how long it takes.
        sample = torch.zeros(2 if self.device.type == "cpu" else self.batch_size, 3, size, size, dtype=torch.uint8)
        parts = [part for part, _ in self._arrays(sample, key)]
        row_size = sum(math.prod(part.shape) for part in parts)
        if store is None:
            about = {"key": key, "parts": [dataclasses.asdict(part) for part in parts]}
            store = FeatureStore(folder, about, num_rows=len(self.images), row_size=row_size)
        limit = self.config.train.feature_cache_gib
        store.reserve(limit, setting="train.feature_cache_gib", advice=_ADVICE)
        began = time.perf_counter()
        self._rows(sample, key)
        seconds = (time.perf_counter() - began) / len(sample) * (store.num_rows - store.num_done)
        there = f", {store.num_done} of them there already" if store.num_done else ""
        if progress:
            say(
                f"feature cache: {store.num_rows} images{there}, {2 * len(self.scales)} views each, "
                f"{format_gib(store.num_bytes)} of at most {limit:g} GiB in {folder}; about {duration(seconds)}"
            )
        self._fill(store, key, progress=progress)
        return store

    def _fill(self, store: FeatureStore, key: dict[str, Any], *, progress: bool) -> None:
        batch_size, done = self.batch_size, store.num_done
        views = whole_views(
            self.images, self.config, batch_size=batch_size, start=done, processes=self.processes, cache=self.cache
        )
        began = committed = time.perf_counter()
        pending = 0
        bar = image_progress("feature cache", total=store.num_rows, done=done, enabled=progress, lines=True)
        with bar as advance, interrupts() as asked_to_stop:
            for pixels in views:
                rows = self._rows(pixels, key)
                odd = np.flatnonzero(~np.isfinite(rows).all(1))
                if odd.size:
                    name = self.images.names[done + int(odd[0])]
                    raise AfaError(f"image {name}: its tokens are too large for fp16; set train.feature_cache to false")
                store.write(rows)
                done, pending = done + len(rows), pending + rows.nbytes
                now = time.perf_counter()
                stop = asked_to_stop()
                if pending > _COMMIT_BYTES or now - committed > _COMMIT_SECONDS or stop or done == store.num_rows:
                    store.commit()
                    pending, committed = 0, now
                advance(len(rows))
                if stop and not store.is_complete:
                    raise AfaError(
                        f"stopped after {done} of {store.num_rows} images of the feature cache; the same command with "
                        "--resume goes on"
                    )
        if progress:
            say(f"feature cache: done after {duration(time.perf_counter() - began)}")

    def _rows(self, pixels: Tensor, key: dict[str, Any]) -> NDArray[np.float16]:
        """(n, row_size) rows of n images."""
        arrays = [array.flatten(1) for _, array in self._arrays(pixels, key)]
        rows: NDArray[np.float16] = torch.cat(arrays, 1).cpu().numpy()
        return rows

    @torch.no_grad()
    def _arrays(self, pixels: Tensor, key: dict[str, Any]) -> Iterator[tuple[FeaturePart, Tensor]]:
        """Each part, and its (n, sides, ...) fp16 array of n images."""
        normalized = normalize_image(pixels.to(self.device).float() / 255)
        for scale in self.scales:
            view = scale_view(normalized, scale)
            mirrored = key["mirrored"] or scale in key["scales"]
            with autocast(self.device, self.config.train.precision):
                sides = [self.backbone.frozen(side) for side in ([view, view.flip(-1)] if mirrored else [view])]
            for name, pair in _fields(sides, scale, key):
                array = torch.stack([side.half() for side in pair], 1)
                yield FeaturePart(scale, name, tuple(array.shape[1:]), sides[0].grid), array


def _fields(sides: Sequence[FrozenTokens], scale: float, key: dict[str, Any]) -> Iterator[tuple[str, list[Tensor]]]:
    """Name and sides of what is kept of a view: for a CAM the tokens alone, mirrored; the rest as training sees it."""
    yield "tokens", [side.tokens for side in sides]
    trained = sides if key["mirrored"] else sides[:1]
    if scale == 1:
        for level in range(len(sides[0].features)):
            yield f"features_{level}", [side.features[level] for side in trained]
    if scale in key["attention_scales"] and sides[0].attention_tokens is not None:
        yield "attention_tokens", [side.attention_tokens for side in trained if side.attention_tokens is not None]


def _hash_files(images: TaggedImages) -> str:
    """Hash of names, sizes and times of the image files; of names alone where images are no files."""
    digest = hashlib.sha256()
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
