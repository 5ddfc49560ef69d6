"""Writes masks of many images: predictions of any files, and pseudo labels of a tagged data set.

Reading, network and writing overlap; images of one size go through the network together. Every file appears
whole or not at all, and OUT/predict.json says what made the masks, so that no call goes on with another's. What
happens to a single image is up to `afa.inference.predictor` and `afa.evaluation.protocols`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from afa.config import Config, EvaluationConfig, Precision
from afa.data.images import find_images, image_name, read_image
from afa.data.palette import overlay as lay_over
from afa.data.palette import write_index_png
from afa.data.voc import TaggedImages
from afa.errors import AfaError
from afa.evaluation.evaluate import group_by_size, resolve_batch_size
from afa.evaluation.protocols import (
    CRF,
    PSEUDO_LABELS,
    LogitMaps,
    check_choice,
    host_tensor,
    pseudo_labels,
    pseudo_sizes,
)
from afa.formats.write import FORMATS, FormatResult
from afa.inference.predictor import Prediction, Predictor, PreparedImage
from afa.model.network import AfaNetwork
from afa.runs.files import write_whole
from afa.runtime import image_progress, read_ahead, say

STAMP: Final = "predict.json"
"""File beside the masks that says what made them: the weights and all settings."""

_T = TypeVar("_T")
_R = TypeVar("_R")

_WRITE_BEHIND = 4
"""Results that may wait to be written, beside those of the last batch."""


@dataclass(frozen=True)
class PredictSummary:
    """What a pass over files did.

    Attributes:
        folder: Where the masks are.
        written: Masks written.
        skipped: Masks that were there already and left as they are.
        failed: One line for each image that could not be done; empty when all is well.
        seconds: Wall time.
        formats: What was written for other tools, if that was asked for.
    """

    folder: Path
    written: int
    skipped: int
    failed: tuple[str, ...]
    seconds: float
    formats: tuple[FormatResult, ...] = ()

    def __str__(self) -> str:
        """One line for the user."""
        parts = [f"{self.written} masks written to {self.folder} in {self.seconds:.1f} s"]
        if self.skipped:
            parts.append(f"{self.skipped} were there already and left as they are (delete them to redo)")
        if self.failed:
            parts.append(f"{len(self.failed)} images failed")
        return "; ".join(parts)


def predict_files(
    predictor: Predictor,
    paths: Sequence[Path],
    out_dir: Path,
    *,
    tags: Mapping[str, Sequence[str]] | None = None,
    scores: bool = False,
    overlay: bool = True,
    resume: bool = False,
    progress: bool = True,
) -> PredictSummary:
    """Segment image files and write OUT/masks/NAME.png, OUT/overlays/NAME.jpg and OUT/scores/NAME.npz.

    NAME is the file's name without suffix; for files of a folder, its path in that folder, after the folder's
    own name if several folders are given. Images that cannot be read are reported in one line each, and the
    rest is done. OUT/predict.json says what made the masks.

    Args:
        predictor: The network.
        paths: Image files, and folders that are walked.
        out_dir: Made if missing; files of the same name are replaced. What an earlier call wrote there is not
            taken for images.
        tags: By NAME or by file name without suffix, the classes that an image may show. None allows all.
        scores: Also write the softmax: `scores` (K, H, W) float16 and `classes`, the K names.
        overlay: Also write the colored class map over the image.
        resume: Go on with an interrupted call: leave masks that are there already as they are.
        progress: Show a progress bar on standard error.

    Returns:
        What was done and what failed.

    Raises:
        AfaError: A path is missing or holds no image; two images would be written to the same file; `tags`
            has no entry for an image; the masks to go on with were made with other weights or settings; a file
            cannot be written (all others of the call that were made are there).
    """
    files = output_names(paths, out_dir)
    image_tags = {name: _tags_of(name, tags) for name in files} if tags is not None else {}
    missing = [name for name, found in image_tags.items() if found is None]
    if missing:
        raise AfaError(
            f"the tags have no entry for {missing[0]!r} ({len(missing)} of {len(files)} images); "
            "add it, or predict without tags"
        )
    config, network = predictor.config, predictor.network
    stamp = {
        "made": "predictions",
        "weights": _weights_digest(network),
        "classes": predictor.classes,
        "protocol": predictor.protocol,
        **(
            {"short_side": config.short_side}
            if predictor.protocol.removesuffix(CRF) == "single"
            else {"long_side": config.long_side, "scales": config.scales}
        ),
        **(_crf_settings(config) if predictor.protocol.endswith(CRF) else {}),
        "max_side": predictor.max_side,
        "precision": predictor.precision,
        "tags": _digest(sorted((name, sorted(found or ())) for name, found in image_tags.items())) if tags else None,
        "scores": scores,
        "overlay": overlay,
    }
    names = _missing(out_dir, list(files), stamp, resume=resume, otherwise="predict without --resume, or use another")

    def read(index: int) -> PreparedImage:
        path = files[names[index]]
        pixels = read_image(path)
        try:
            return predictor.prepare(pixels, image_tags.get(names[index]))
        except AfaError as error:
            raise AfaError(f"{path}: {error}") from None

    def infer(images: Sequence[PreparedImage]) -> list[tuple[_Label, LogitMaps | None]]:
        # Those of the CRF are large: nobody keeps them for nothing.
        maps = predictor.segment(images)
        return [
            (_Label(each.label(image.size)), each if scores else None) for each, image in zip(maps, images, strict=True)
        ]

    def write(index: int, image: PreparedImage, made: tuple[_Label, LogitMaps | None]) -> None:
        name, label, maps = names[index], made[0].wait(), made[1]
        if maps is not None:
            _write_scores(out_dir / "scores" / f"{name}.npz", predictor.prediction(label, maps))
        _write_label(out_dir, name, image.pixels, label, overlay=overlay)

    return _write_all(
        len(names),
        read,
        infer,
        write,
        sizes=lambda image: image.sizes,
        batch_size=predictor.batch_size,
        folder=out_dir / "masks",
        description="predict",
        progress=progress,
        skipped=len(files) - len(names),
        go_on="the same command with --resume goes on",
    )


def pseudo_files(
    network: AfaNetwork,
    images: TaggedImages,
    out_dir: Path,
    *,
    config: Config,
    device: torch.device,
    kind: str = "refined",
    overlay: bool = False,
    precision: Precision = "fp32",
    batch_size: int = 0,
    progress: bool = True,
) -> PredictSummary:
    """Write pseudo labels of tagged images as OUT/masks/NAME.png, 255 where they are uncertain.

    Masks that are there already are left as they are, so an interrupted call goes on where it stopped;
    OUT/predict.json says what made them. Images that cannot be read are reported in one line each, and the rest is
    done.

    Args:
        network: A trained network.
        images: Images and their tags.
        out_dir: Made if missing.
        config: Its `pseudo` section, and its `evaluation` section for sizes and the CRF.
        device: Where the network is put and runs.
        kind: `cam`, `propagated`, `initial` or `refined`, as `pseudo_label` has it.
        overlay: Also write OUT/overlays/NAME.jpg.
        precision: Arithmetic of the network.
        batch_size: Images of one size that go through the network together, as `resolve_batch_size` has it.
        progress: Show a progress bar on standard error.

    Returns:
        What was done, what was skipped and what failed.

    Raises:
        AfaError: Unknown kind; the masks that are there were made with other weights or settings; a file cannot be
            written (all others of the call that were made are there).
    """
    check_choice(kind, PSEUDO_LABELS, what="labels")
    network.to(device)
    settings = {f"pseudo.{key}": value for key, value in dataclasses.asdict(config.pseudo).items()}
    short_side = config.evaluation.short_side
    stamp = {
        "made": f"pseudo labels ({kind})",
        "weights": _weights_digest(network),
        "classes": images.classes,
        **settings,
        **(_crf_settings(config.evaluation) if config.pseudo.crf else {}),
        "short_side": short_side,
        "precision": precision,
        "overlay": overlay,
    }
    names = _missing(out_dir, images.names, stamp, resume=True, otherwise="delete the folder, or use another")
    positions = {name: index for index, name in enumerate(images.names)}

    def read(index: int) -> _TaggedImage:
        position = positions[names[index]]
        pixels = images.image(position)
        size = (pixels.shape[0], pixels.shape[1])
        sizes = pseudo_sizes(size, config=config.pseudo, short_side=short_side)
        return _TaggedImage(pixels, host_tensor(pixels, device=device), images.tags(position), sizes)

    def infer(batch: Sequence[_TaggedImage]) -> list[_Label]:
        labels = pseudo_labels(
            network,
            [image.view for image in batch],
            [image.tags for image in batch],
            kind=kind,
            config=config.pseudo,
            short_side=short_side,
            crf_config=config.evaluation,
            precision=precision,
        )
        return [_Label(label.to(torch.uint8)) for label in labels]

    return _write_all(
        len(names),
        read,
        infer,
        lambda index, image, label: _write_label(out_dir, names[index], image.pixels, label.wait(), overlay=overlay),
        sizes=lambda image: image.sizes,
        batch_size=resolve_batch_size(batch_size, device),
        folder=out_dir / "masks",
        description=f"pseudo labels ({kind})",
        progress=progress,
        skipped=len(images) - len(names),
        go_on="the same command goes on",
    )


@dataclass(frozen=True)
class _TaggedImage:
    pixels: NDArray[np.uint8]
    view: Tensor
    tags: NDArray[np.float32]
    sizes: tuple[tuple[int, int], ...]


class _Label:
    """A label on its way to the CPU: only who needs it waits for it."""

    def __init__(self, label: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if label.device.type == "cuda":
            self._label = label.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(label.device))
        else:
            self._label = label.cpu()

    def wait(self) -> NDArray[np.uint8]:
        """(H, W)."""
        if self._arrived is not None:
            self._arrived.synchronize()
        label: NDArray[np.uint8] = self._label.numpy()
        return label


def _write_all(
    count: int,
    read: Callable[[int], _T],
    infer: Callable[[Sequence[_T]], Sequence[_R]],
    write: Callable[[int, _T, _R], None],
    *,
    sizes: Callable[[_T], tuple[tuple[int, int], ...]],
    batch_size: int,
    folder: Path,
    description: str,
    progress: bool,
    skipped: int,
    go_on: str,
) -> PredictSummary:
    """Read in threads, infer here in batches of one size, write in threads.

    What fails to be read is one image lost; what fails to be written ends the pass, after the writes on their way.
    """
    started = time.monotonic()
    failed: list[str] = []
    writing: deque[Future[None]] = deque()
    written = 0

    def readable() -> Iterator[tuple[int, _T]]:
        for index, reading in read_ahead(read, range(count)):
            try:
                image = reading.result()
            except AfaError as error:
                failed.append(str(error))
                say(f"skipped: {error}")
                advance(1)
            else:
                yield index, image

    try:
        with (
            ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="afa-write") as writers,
            image_progress(description, total=count, enabled=progress) as advance,
        ):
            for group in group_by_size(readable(), sizes=lambda item: sizes(item[1]), batch_size=batch_size):
                results = infer([image for _, image in group])
                for (index, image), result in zip(group, results, strict=True):
                    writing.append(writers.submit(write, index, image, result))
                while len(writing) > _WRITE_BEHIND + len(group):
                    writing.popleft().result()
                    written += 1
                    advance(1)
            while writing:
                writing.popleft().result()
                written += 1
                advance(1)
    except AfaError as error:
        written += sum(future.exception() is None for future in writing)
        missing = count - written
        raise AfaError(f"{error}; {skipped + written} masks are done and {missing} missing; {go_on}") from None
    return PredictSummary(
        folder=folder, written=written, skipped=skipped, failed=tuple(failed), seconds=time.monotonic() - started
    )


def _missing(
    out_dir: Path, names: Sequence[str], stamp: Mapping[str, Any], *, resume: bool, otherwise: str
) -> Sequence[str]:
    """Make OUT/masks, stamp OUT, and list the masks that are still to be made.

    Masks older than the stamp are no part of what it speaks of: a call that replaces masks may have been stopped.
    """
    masks, path = out_dir / "masks", out_dir / STAMP
    try:
        masks.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AfaError(f"{masks}: cannot be made ({error.strerror}); choose another folder") from None
    now = json.loads(json.dumps(stamp))
    if resume and path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key in now | before if now.get(key) != before.get(key)]
        except (ValueError, TypeError):
            raise AfaError(f"{path}: broken; {otherwise} folder") from None
        if differing:
            key = differing[0]
            raise AfaError(
                f"{path}: {key} was {_short(before.get(key))} for the masks that are there and is "
                f"{_short(now.get(key))} now; {otherwise} folder"
            )
        since = path.stat().st_mtime_ns
        missing = [name for name in names if _modified(masks / f"{name}.png") < since]
        if len(missing) < len(names):
            say(f"{masks}: {len(names) - len(missing)} of {len(names)} masks are there already and left as they are")
        return missing
    if resume and next(masks.rglob("*.png"), None) is not None:
        raise AfaError(f"{path}: missing, so nothing says what made the masks in {masks}; {otherwise} folder")
    text = json.dumps(now, indent=1) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
    return names


def _crf_settings(config: EvaluationConfig) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(config).items() if key.startswith("crf_")}


def _modified(path: Path) -> int:
    """Time of the last change in ns; -1 if there is no such file."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}..."


def _weights_digest(network: torch.nn.Module) -> str:
    """SHA-256 of all weights and buffers of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def output_names(paths: Sequence[Path], out_dir: Path) -> dict[str, Path]:
    """NAME to image file, each file once."""
    several_folders = sum(path.is_dir() for path in paths) > 1
    kinds = ("masks", "overlays", "scores", *(info.output for info in FORMATS.values()))
    outputs = [(out_dir / kind).resolve() for kind in kinds]
    files: dict[str, Path] = {}
    seen: set[str] = set()
    for path in paths:
        is_folder, root = path.is_dir(), path.resolve()
        own = [folder for folder in outputs if root in folder.parents]
        prefix = f"{root.name}/" if is_folder and several_folders else ""
        # Folder by folder: to resolve the path of each file would take longer than all the rest.
        for folder, images in groupby(find_images([path]), key=lambda file: file.parent):
            inside = folder.resolve()
            if any(output == inside or output in inside.parents for output in own):
                continue
            below = folder.relative_to(path) if is_folder else Path()
            for file in images:
                if f"{inside}/{file.name}" in seen:
                    continue
                seen.add(f"{inside}/{file.name}")
                name = prefix + image_name(file.name if below == Path() else f"{below.as_posix()}/{file.name}")
                if name in files:
                    raise AfaError(
                        f"{files[name]} and {file} would both be written as {name}.png; "
                        "rename one, or predict them into different folders"
                    )
                files[name] = file
    if not files:
        raise AfaError("there is no image to predict; pass image files or folders that hold some")
    return files


def _tags_of(name: str, tags: Mapping[str, Sequence[str]]) -> Sequence[str] | None:
    return tags.get(name, tags.get(name.rpartition("/")[2]))


def _write_label(
    out_dir: Path, name: str, image: NDArray[np.uint8], label: NDArray[np.uint8], *, overlay: bool
) -> None:
    # The mask comes last: where it is, everything else is.
    if overlay:
        picture = Image.fromarray(lay_over(image, label))
        write_whole(out_dir / "overlays" / f"{name}.jpg", lambda file: picture.save(file, format="JPEG", quality=90))
    write_index_png(out_dir / "masks" / f"{name}.png", label)


def _write_scores(path: Path, prediction: Prediction) -> None:
    half = prediction.scores.astype(np.float16)
    write_whole(path, lambda file: np.savez_compressed(file, scores=half, classes=np.array(prediction.classes)))
