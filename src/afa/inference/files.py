"""Masks of files and of data sets: what `afa predict` and `afa pseudo` write.

What happens to a single image is up to `afa.inference.predictor` and `afa.evaluation.protocols`; how many images are
read, batched and written, to `afa.inference.masks`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from afa.config import Config, EvaluationConfig
from afa.data.dataset import TaggedImages
from afa.data.files import find_images
from afa.data.images import image_name, level_warning, read_image, sample_peaks
from afa.data.pixels import WHITE_LEVEL
from afa.data.rows import Rows
from afa.errors import AfaError
from afa.evaluation.evaluate import resolve_batch_size
from afa.evaluation.protocols import PSEUDO_LABELS, check_choice, host_tensor, pseudo_labels, pseudo_sizes
from afa.formats.write import FORMATS
from afa.inference.big import Bands, Large
from afa.inference.masks import Made, PredictSummary, Task, write_masks
from afa.inference.predictor import MAX_SIDE, Predictor, PreparedImage
from afa.inference.tiling import Tiling
from afa.model.network import AfaNetwork
from afa.runtime import ALONE, Processes, say

_MUCH_SMALLER: Final = 4.0
"""Images that the network sees so many times smaller are told of: small objects in them are lost."""

_Shrunk = tuple[str, tuple[int, int], tuple[int, int]]
"""Name of an image, its (height, width), and that which the network sees."""


def predict_files(
    predictor: Predictor,
    paths: Sequence[Path] | Mapping[str, Path],
    out_dir: Path,
    *,
    tags: Mapping[str, Sequence[str]] | None = None,
    scores: bool = False,
    overlay: bool = True,
    resume: bool = False,
    processes: Processes = ALONE,
) -> PredictSummary:
    """Segment image files and write OUT/masks/NAME.png, OUT/overlays/NAME.jpg and OUT/scores/NAME.npz.

    NAME is the file's name without suffix; for files of a folder, its path in that folder, after the folder's
    own name if several folders are given; longer where images would share it (`output_names`). Images that cannot be
    read are reported in one line each, and the rest is done. OUT/predict.json says what made the masks.

    Args:
        predictor: The network.
        paths: Image files, and folders that are walked; or the images of a part of a call by NAME.
        out_dir: Made if missing; files of the same name are replaced. What an earlier call wrote there is not
            taken for images.
        tags: By NAME or by file name without suffix, the classes that an image may show. None allows all.
        scores: Also write the softmax: `scores` (K, H, W) float16 and `classes`, the K names.
        overlay: Also write the colored class map over the image.
        resume: Go on with an interrupted call: leave masks that are there already as they are.
        processes: Processes that share the images.

    Raises:
        AfaError: A path is missing or holds no image; `tags` has no entry for an image; the masks to go on with were
            made with other weights or settings; a file cannot be written (all others of the call that were made are
            there).
    """
    remarks: list[str] = []
    is_part = isinstance(paths, Mapping)
    files = paths if isinstance(paths, Mapping) else output_names(paths, out_dir, remarks=remarks)
    for remark in (*remarks, *_remarks(files, predictor.config.data.white_level)) if processes.is_main else ():
        say(remark)
    known = _image_tags(files, tags)

    shrunk: list[_Shrunk] = []

    def read(name: str) -> PreparedImage:
        image = predictor.prepare(files[name], known.get(name))
        if max(image.size) > _MUCH_SMALLER * max(image.sizes[0]):
            shrunk.append((name, image.size, image.sizes[0]))
        return image

    def infer(images: Sequence[PreparedImage]) -> list[Made]:
        maps = predictor.segment(images)
        # The CRF's maps are large, so they are kept only if needed.
        kept = maps if scores else [None] * len(maps)
        return [Made(each.label(image.size), k) for each, image, k in zip(maps, images, kept, strict=True)]

    def allowed(name: str) -> NDArray[np.bool_] | None:
        return predictor.allowed(known.get(name), where=f"{files[name]}: ")

    def opened(name: str) -> Rows:
        allowed(name)  # before the image is read: a tag may be unknown
        data = predictor.config.data
        return Rows(files[name], max_pixels=predictor.tiling.max_pixels, white_level=data.white_level)

    def bands(name: str, rows: Rows) -> Bands:
        return predictor.tiling.labels(rows, allowed(name))

    if scores and predictor.tiling.side:
        raise AfaError("--scores are not written for tiles, they would fill the disk; leave out --scores or --tiles")
    task = Task(
        title="predict",
        stamp=_prediction_stamp(predictor, tags or {} if is_part else known, scores=scores),
        read=read,
        infer=infer,
        batch_size=predictor.batch_size,
        classes=predictor.classes,
        overlay=overlay,
        skip_broken=predictor.config.data.skip_broken,
        otherwise="predict without --resume, or use another",
        go_on="the same command with --resume goes on",
        large=Large(predictor.tiling, opened, bands) if predictor.tiling.side else None,
    )
    summary = write_masks(task, out_dir, list(files), resume=resume, processes=processes)
    _tell_shrunk(shrunk, processes)
    return summary


def _tell_shrunk(shrunk: list[_Shrunk], processes: Processes) -> None:
    """Say how many images of all processes lost their small objects."""
    every = [each for part in processes.gather(shrunk) for each in part]
    if every and processes.is_main:
        name, (height, width), (seen_height, seen_width) = min(every)
        say(
            f"{len(every)} images, such as {name} of {width} x {height} pixels, were shown to the network at "
            f"{seen_width} x {seen_height}; if objects are small in them, use --tiles auto"
        )


def pseudo_files(
    network: AfaNetwork,
    images: TaggedImages,
    out_dir: Path,
    *,
    config: Config,
    kind: str = "refined",
    refine: bool = False,
    overlay: bool = False,
    tiling: Tiling | None = None,
    processes: Processes = ALONE,
) -> PredictSummary:
    """Write pseudo labels of tagged images as OUT/masks/NAME.png, 255 where they are uncertain.

    Masks that are there already are left as they are, so an interrupted call goes on where it stopped;
    OUT/predict.json says what made them. Images that cannot be read are reported in one line each, and the rest is
    done.

    Args:
        network: A trained network; its parameters say the device.
        images: Images and their tags.
        out_dir: Made if missing.
        config: Its `pseudo` section; its `evaluation` section for sizes, batch size and the CRF; `train.precision`.
        kind: `cam`, `propagated`, `initial` or `refined`, as `pseudo_labels` has it.
        refine: As `pseudo_labels`.
        overlay: Also write OUT/overlays/NAME.jpg.
        tiling: Which images are made in tiles; None: none is.
        processes: Processes that share the images.

    Raises:
        AfaError: Unknown kind; the masks that are there were made with other weights or settings; a file cannot be
            written (all others of the call that were made are there).
    """
    check_choice(kind, PSEUDO_LABELS, what="labels")
    task = _pseudo_task(network, images, config, tiling, kind=kind, refine=refine, overlay=overlay)
    return write_masks(task, out_dir, images.names, resume=True, processes=processes)


@dataclass(frozen=True)
class _TaggedImage(PreparedImage):
    tags: NDArray[np.float32]


def _pseudo_task(
    network: AfaNetwork,
    images: TaggedImages,
    config: Config,
    tiling: Tiling | None,
    *,
    kind: str,
    refine: bool,
    overlay: bool,
) -> Task[_TaggedImage]:
    device = next(network.parameters()).device
    pseudo, evaluation = config.pseudo, config.evaluation
    positions = {name: index for index, name in enumerate(images.names)}
    settings: dict[str, Any] = {"max_pixels": tiling and tiling.max_pixels, "white_level": images.white_level}

    def read(name: str) -> _TaggedImage:
        index = positions[name]
        own = settings["max_pixels"] is None
        pixels = images.image(index) if own else read_image(images.image_path(index), **settings)
        sizes = pseudo_sizes((pixels.shape[0], pixels.shape[1]), config)
        return _TaggedImage(pixels, host_tensor(pixels, device=device), None, sizes, images.tags(index))

    def infer(batch: Sequence[_TaggedImage]) -> list[Made]:
        views, tags = [image.view for image in batch], [image.tags for image in batch]
        labels = pseudo_labels(network, views, tags, config, kind=kind, refine=refine)
        return [Made(label.to(torch.uint8)) for label in labels]

    def opened(name: str) -> Rows:
        return Rows(images.image_path(positions[name]), **settings)

    def bands(name: str, _: Rows) -> Bands:
        assert tiling is not None
        return tiling.pseudo_labels(lambda: opened(name), images.tags(positions[name]), kind=kind, refine=refine)

    stamp = {
        "made": f"pseudo labels ({kind}{', refined by the image' if refine else ''})",
        "weights": _weights_digest(network),
        **{f"pseudo.{key}": value for key, value in dataclasses.asdict(pseudo).items()},
        **(_crf_settings(evaluation) if pseudo.crf else {}),
        "short_side": evaluation.short_side,
        "precision": config.train.precision,
        **({"tiles": tiling.side} if tiling and tiling.side else {}),
    }
    return Task(
        title=f"pseudo labels ({kind})",
        stamp=stamp,
        read=read,
        infer=infer,
        batch_size=resolve_batch_size(evaluation.batch_size, device),
        classes=images.classes,
        overlay=overlay,
        skip_broken=config.data.skip_broken,
        otherwise="delete the folder, or use another",
        go_on="the same command goes on",
        large=Large(tiling, opened, bands) if tiling and tiling.side else None,
    )


def pseudo_tiling(network: AfaNetwork, config: Config, tiles: str | int, *, max_pixels: int | None) -> Tiling:
    """Which images get their pseudo labels in tiles, of the size of the training crops for `auto`; as of `Tiling`."""
    batch_size = resolve_batch_size(config.evaluation.batch_size, next(network.parameters()).device)
    view = config.augment.crop_size
    return Tiling(network, config, tiles, max_side=MAX_SIDE, batch_size=batch_size, view=view, max_pixels=max_pixels)


def _prediction_stamp(predictor: Predictor, tags: Mapping[str, Sequence[str]], *, scores: bool) -> dict[str, Any]:
    config, white_level = predictor.config.evaluation, predictor.config.data.white_level
    views = ("long_side", "scales") if config.multiscale else ("short_side",)
    known = sorted((name, sorted(found)) for name, found in tags.items())
    return {
        "made": "predictions",
        "weights": _weights_digest(predictor.network),
        "protocol": config.protocol,
        **{key: getattr(config, key) for key in views},
        **(_crf_settings(config) if config.crf else {}),
        "max_side": predictor.max_side,
        "precision": predictor.config.train.precision,
        **({} if white_level == WHITE_LEVEL else {"white_level": white_level}),
        "tags": hashlib.sha256(json.dumps(known).encode()).hexdigest() if known else None,
        "scores": scores,
        **({"tiles": predictor.tiling.side} if predictor.tiling.side else {}),
    }


def _crf_settings(config: EvaluationConfig) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(config).items() if key.startswith("crf_")}


def _weights_digest(network: torch.nn.Module) -> str:
    """SHA-256 of all weights and buffers of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def output_names(paths: Sequence[Path], out_dir: Path, *, remarks: list[str] | None = None) -> dict[str, Path]:
    """Name the images of files and folders for what is written.

    A name is the path without suffix. Images that would have the same name keep their suffix; if that is not enough,
    the name of their folder comes before it, and last eight digits of a hash of their path behind it.

    Args:
        paths: Image files and folders.
        out_dir: Where they are written; what is there is not taken for images.
        remarks: As of `find_images`.

    Returns:
        Name to image file, each file once.

    Raises:
        AfaError: A path is missing or holds no image.
    """
    several_folders = sum(path.is_dir() for path in paths) > 1
    kinds = ("masks", "overlays", "scores", *(info.output for info in FORMATS.values()))
    outputs = [(out_dir / kind).resolve() for kind in kinds]
    named: list[tuple[str, Path]] = []
    seen: set[str] = set()
    for path in paths:
        is_folder, root = path.is_dir(), path.resolve()
        own = [folder for folder in outputs if root in folder.parents]
        prefix = f"{root.name}/" if is_folder and several_folders else ""
        # Folder by folder, because resolving the path of each file would take longer than everything else.
        for folder, images in groupby(find_images([path], remarks=remarks), key=lambda file: file.parent):
            inside = folder.resolve()
            if any(output == inside or output in inside.parents for output in own):
                continue
            below = folder.relative_to(path) if is_folder else Path()
            for file in images:
                if f"{inside}/{file.name}" in seen:
                    continue
                seen.add(f"{inside}/{file.name}")
                named.append((prefix + (file.name if below == Path() else f"{below.as_posix()}/{file.name}"), file))
    if not named:
        raise AfaError("there is no image to predict; pass image files or folders that hold some")
    return _distinct(named)


def _remarks(files: Mapping[str, Path], white_level: int) -> Iterator[str]:
    """What the user should know of images before they are segmented, a line each."""
    longer = [
        name
        for name, file in files.items()
        if image_name(file.name) != file.name and name.rpartition("/")[2].startswith(file.name)
    ]
    if longer:
        yield f"{len(longer)} images share their names with others: they are written under longer ones, as {longer[0]}"
    paths = list(files.values())
    if words := level_warning(sample_peaks(len(paths), paths.__getitem__), white_level):
        yield f"warning: {words}"


def _distinct(named: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """Name to image file of pairs of a path with suffix, which may be there several times, and a file."""
    names = [image_name(path) for path, _ in named]
    longer: tuple[Callable[[str, Path], str], ...] = (
        lambda path, file: path,
        lambda path, file: f"{file.absolute().parent.name}/{path}",
        lambda path, file: f"{path}~{hashlib.sha256(str(file.resolve()).encode(errors='replace')).hexdigest()[:8]}",
    )
    for name_of in longer:
        shared = {name for name, count in Counter(names).items() if count > 1}
        names = [name_of(*pair) if name in shared else name for name, pair in zip(names, named, strict=True)]
    return {name: file for name, (_, file) in zip(names, named, strict=True)}


def _image_tags(names: Collection[str], tags: Mapping[str, Sequence[str]] | None) -> dict[str, Sequence[str]]:
    """The tags of each image, by its name or that of its file; empty if there are none to keep to."""
    if tags is None:
        return {}
    known = {}
    for name in names:
        plain = image_name(name)  # of an image that shares its name with another
        spellings = (name, name.rpartition("/")[2], plain, plain.rpartition("/")[2])
        known[name] = next((tags[each] for each in spellings if each in tags), None)
    missing = [name for name, found in known.items() if found is None]
    if missing:
        raise AfaError(
            f"the tags have no entry for {missing[0]!r} ({len(missing)} of {len(known)} images); "
            "add it, or predict without tags"
        )
    return {name: found for name, found in known.items() if found is not None}
