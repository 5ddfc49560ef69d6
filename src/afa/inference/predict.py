"""Writes masks of many images: predictions of any files, and pseudo labels of a tagged data set.

Reading, network and writing overlap. Every file appears whole or not at all. What happens to a single image
is up to `afa.inference.predictor` and `afa.evaluation.protocols`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from afa.config import Config, Precision
from afa.data.images import find_images, image_name, read_image
from afa.data.palette import overlay as lay_over
from afa.data.palette import write_index_png
from afa.data.voc import TaggedImages
from afa.errors import AfaError
from afa.evaluation.evaluate import image_progress, read_ahead
from afa.evaluation.protocols import PSEUDO_LABELS, check_choice, pseudo_label
from afa.inference.predictor import Prediction, Predictor
from afa.model.network import AfaNetwork
from afa.runtime import say

_T = TypeVar("_T")

_WRITE_BEHIND = 4
"""Results that may wait to be written."""


@dataclass(frozen=True)
class PredictSummary:
    """What a pass over files did.

    Attributes:
        folder: Where the masks are.
        written: Masks written.
        skipped: Masks that were there already and left as they are.
        failed: One line for each image that could not be done; empty when all is well.
        seconds: Wall time.
    """

    folder: Path
    written: int
    skipped: int
    failed: tuple[str, ...]
    seconds: float

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
    progress: bool = True,
) -> PredictSummary:
    """Segment image files and write OUT/masks/NAME.png, OUT/overlays/NAME.jpg and OUT/scores/NAME.npz.

    NAME is the file's name without suffix; for files of a folder, its path in that folder, after the folder's
    own name if several folders are given. Images that cannot be read are reported in one line each, and the
    rest is done.

    Args:
        predictor: The network.
        paths: Image files, and folders that are walked.
        out_dir: Made if missing; files of the same name are replaced. What an earlier call wrote there is not
            taken for images.
        tags: By NAME or by file name without suffix, the classes that an image may show. None allows all.
        scores: Also write the softmax: `scores` (K, H, W) float16 and `classes`, the K names.
        overlay: Also write the colored class map over the image.
        progress: Show a progress bar on standard error.

    Returns:
        What was done and what failed.

    Raises:
        AfaError: A path is missing or holds no image; two images would be written to the same file; `tags`
            has no entry for an image; a file cannot be written.
    """
    files = _output_names(paths, out_dir)
    image_tags = {name: _tags_of(name, tags) for name in files} if tags is not None else {}
    missing = [name for name, found in image_tags.items() if found is None]
    if missing:
        raise AfaError(
            f"the tags have no entry for {missing[0]!r} ({len(missing)} of {len(files)} images); "
            "add it, or predict without tags"
        )
    names = list(files)

    def infer(index: int, image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Prediction | None]:
        name = names[index]
        try:
            prediction = predictor(image, image_tags.get(name))
        except AfaError as error:
            raise AfaError(f"{files[name]}: {error}") from None
        # Scores are large: nothing holds on to them unless they are written.
        return prediction.label, prediction if scores else None

    def write(index: int, image: NDArray[np.uint8], result: tuple[NDArray[np.uint8], Prediction | None]) -> None:
        label, prediction = result
        if prediction is not None:
            _write_scores(out_dir / "scores" / f"{names[index]}.npz", prediction)
        _write_label(out_dir, names[index], image, label, overlay=overlay)

    return _write_all(
        range(len(names)),
        lambda index: read_image(files[names[index]]),
        infer,
        write,
        folder=out_dir / "masks",
        description="predict",
        progress=progress,
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
    progress: bool = True,
) -> PredictSummary:
    """Write pseudo labels of tagged images as OUT/masks/NAME.png, 255 where they are uncertain.

    Masks that are there already are left as they are, so an interrupted call goes on where it stopped. Images
    that cannot be read are reported in one line each, and the rest is done.

    Args:
        network: A trained network.
        images: Images and their tags.
        out_dir: Made if missing.
        config: Its `pseudo` section.
        device: Where the network is put and runs.
        kind: `cam`, `propagated`, `initial` or `refined`, as `pseudo_label` has it.
        overlay: Also write OUT/overlays/NAME.jpg.
        precision: Arithmetic of the network.
        progress: Show a progress bar on standard error.

    Returns:
        What was done, what was skipped and what failed.

    Raises:
        AfaError: Unknown kind; a file cannot be written.
    """
    check_choice(kind, PSEUDO_LABELS, what="labels")
    network.to(device)
    masks = out_dir / "masks"
    todo = [index for index, name in enumerate(images.names) if not (masks / f"{name}.png").is_file()]
    skipped = len(images) - len(todo)
    if skipped:
        say(f"{masks}: {skipped} of {len(images)} masks are there already and left as they are")

    def infer(index: int, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        label = pseudo_label(
            network,
            image,
            images.tags(index),
            kind=kind,
            config=config.pseudo,
            short_side=config.evaluation.short_side,
            precision=precision,
        )
        return label.to(torch.uint8).cpu().numpy()

    return _write_all(
        todo,
        images.image,
        infer,
        lambda index, image, label: _write_label(out_dir, images.names[index], image, label, overlay=overlay),
        folder=masks,
        description=f"pseudo labels ({kind})",
        progress=progress,
        skipped=skipped,
    )


def _write_all(
    indices: Sequence[int],
    read: Callable[[int], NDArray[np.uint8]],
    infer: Callable[[int, NDArray[np.uint8]], _T],
    write: Callable[[int, NDArray[np.uint8], _T], None],
    *,
    folder: Path,
    description: str,
    progress: bool,
    skipped: int = 0,
) -> PredictSummary:
    """Read in threads, infer here, write in threads.

    What fails to be read or inferred is one image lost; what fails to be written ends the pass.
    """
    started = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AfaError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from None
    failed: list[str] = []
    writing: deque[Future[None]] = deque()
    with (
        ThreadPoolExecutor(max_workers=2, thread_name_prefix="afa-write") as writers,
        image_progress(description, total=len(indices), enabled=progress) as advance,
    ):
        for index, reading in read_ahead(read, indices):
            try:
                image = reading.result()
                result = infer(index, image)
            except AfaError as error:
                failed.append(str(error))
                say(f"skipped: {error}")
            else:
                writing.append(writers.submit(write, index, image, result))
                if len(writing) > _WRITE_BEHIND:
                    writing.popleft().result()
            advance(1)
        for written in writing:
            written.result()
    return PredictSummary(
        folder=folder,
        written=len(indices) - len(failed),
        skipped=skipped,
        failed=tuple(failed),
        seconds=time.monotonic() - started,
    )


def _output_names(paths: Sequence[Path], out_dir: Path) -> dict[str, Path]:
    """NAME to image file, each file once."""
    several_folders = sum(path.is_dir() for path in paths) > 1
    outputs = [(out_dir / kind).resolve() for kind in ("masks", "overlays", "scores")]
    files: dict[str, Path] = {}
    seen: set[Path] = set()
    for path in paths:
        root = path.resolve()
        own = [folder for folder in outputs if root in folder.parents]
        for file in find_images([path]):
            resolved = file.resolve()
            if resolved in seen or any(folder in resolved.parents for folder in own):
                continue
            seen.add(resolved)
            name = image_name(file.relative_to(path).as_posix() if path.is_dir() else file.name)
            if path.is_dir() and several_folders:
                name = f"{root.name}/{name}"
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
        _write_whole(out_dir / "overlays" / f"{name}.jpg", lambda file: picture.save(file, format="JPEG", quality=90))
    write_index_png(out_dir / "masks" / f"{name}.png", label)


def _write_scores(path: Path, prediction: Prediction) -> None:
    half = prediction.scores.astype(np.float16)
    _write_whole(path, lambda file: np.savez_compressed(file, scores=half, classes=np.array(prediction.classes)))


def _write_whole(path: Path, save: Callable[[BinaryIO], None]) -> None:
    """Write a file under another name and rename it, so that it is never seen half written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            save(file)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise AfaError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another folder"
        ) from None
