"""Masks as commands: of image files, of tagged images by a run, and of tagged images by class names alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from afa.api.settings import at_work, file_config, rooted, run_config
from afa.config import refuse_unread
from afa.data.open import open_data
from afa.data.readers.tag_files import read_tags
from afa.data.stores import is_remote
from afa.errors import AfaError
from afa.inference import files as prediction
from afa.inference import shards as sharding
from afa.inference.masks import MasksSummary, PredictSummary, joined_masks, summarize_masks
from afa.inference.output import Output
from afa.inference.predictor import Predictor
from afa.inference.sources import Source, is_sharded, shard_sources
from afa.report.masks import write_masks_page
from afa.runs.network import build_network, load_run


def predict(
    run: str | Path,
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    tags: str | Path | None = None,
    scores: bool = False,
    crf: bool = False,
    overlay: bool = True,
    formats: str = "",
    resume: bool = False,
    out_shards: int = 0,
    rle: bool = False,
    tiles: str | int = "off",
    max_pixels: int | None = None,
    progress: bool = True,
    **overrides: Any,
) -> PredictSummary:
    """Segment image files into a folder, as `afa predict`; `Predictor` segments images in memory.

    Args:
        run: Run folder.
        images: Image files and folders that are walked; shards, by file, folder, pattern with braces or address.
        out: Folder of the results, or address of a store.
        tags: File of tags of the images: only tagged classes, and those that it does not know, are predicted.
        scores: Also write class scores.
        crf: Refine the masks by the dense CRF, whatever the run's protocol.
        overlay: Also write the colored masks over the images.
        formats: Formats of other tools to write as well, names separated by commas.
        resume: Go on with the masks that are in `out` already.
        out_shards: Images of each shard of masks; 0 writes files, or to a store a shard for each shard that is read.
        rle: In shards, run lengths as of COCO in place of PNGs.
        tiles: As of `Predictor`.
        max_pixels: As of `Predictor`.
        progress: Show progress on standard error.
        overrides: Keys of the run's configuration to change, of those that this reads.

    Raises:
        AfaError: As `afa.inference.files.predict_files` and `afa.formats.write.write_format`; not a run folder.
    """
    run = Path(run)
    texts = [str(images)] if isinstance(images, str | Path) else [str(path) for path in images]
    sharded = [text for text in texts if is_sharded(text)]
    paths = [Path(text) for text in texts if text not in sharded]
    size = out_shards or (sharding.DEFAULT_SIZE if paths and is_remote(str(out)) else 0)
    output = Output(out, formats=formats, shard_size=size, rle=rle, scores=scores)
    config = run_config(run, overrides, "predict")
    if crf:
        config = dataclasses.replace(config, evaluation=config.evaluation.with_crf(True))
    with at_work(config, progress) as (device, processes):
        loaded = load_run(run, device)
        predictor = Predictor(loaded.network, loaded.classes, config=config, tiles=tiles, max_pixels=max_pixels)
        known = None if tags is None else read_tags(Path(tags), predictor.classes, config.data.negatives)
        settings: dict[str, Any] = {"tags": known, "scores": scores}
        if not output.in_shards:
            settings |= {"overlay": overlay, "processes": processes}
        if not sharded and not output.in_shards:
            summary = prediction.predict_files(predictor, paths, output.folder, resume=resume, **settings)
            files = prediction.output_names(paths, output.folder) if output.formats and processes.is_main else {}
            return output.convert(summary, files, predictor.classes, processes)

        def make(part: Mapping[str, Path], place: Path, *, resume: bool = True) -> PredictSummary:
            return prediction.predict_files(predictor, part, place, resume=resume, **{"overlay": False, **settings})

        sources = shard_sources(sharded, config.data)
        if paths:
            named = prediction.output_names(paths, output.folder)
            sources.insert(0, Source.of("images", lambda: named))
        if output.in_shards:
            shards = output.shards(predictor.classes, config.data)
            return shards.write(make, sources, resume=resume, processes=processes)
        summary = sharding.make_parts(make, sources, output.folder, resume=resume, processes=processes)
        found = [source.read(bring=False)[0] or {} for source in sources if output.formats and processes.is_main]
        files = {name: path for part in found for name, path in part.items()}
        return output.convert(summary, files, predictor.classes, processes)


def pseudo_labels(
    run: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    kind: str = "refined",
    list_file: str | None = None,
    formats: str = "",
    out_shards: int = 0,
    rle: bool = False,
    tiles: str | int = "off",
    max_pixels: int | None = None,
    progress: bool = True,
    **overrides: Any,
) -> PredictSummary:
    """Write pseudo labels of tagged images, as `afa pseudo`.

    Args:
        run: Run folder.
        data: Folder of the data set.
        out: Folder of the labels, or address of a store; those that are there already are left as they are.
        kind: `refined`, `initial`, `propagated` or `cam`.
        list_file: Names of the images, one a line; None is what the data has to train on.
        formats: Formats of other tools to write as well, names separated by commas.
        out_shards: As of `predict`; to a store 10,000 if it is 0.
        rle: As of `predict`.
        tiles: `auto` makes images of more than 1,024 pixels a side in tiles as large as the training crops; a number
            is the side of the tiles, and larger images are tiled; `off` tiles none.
        max_pixels: As of `Predictor`.
        progress: Show progress on standard error.
        overrides: Keys of the run's configuration to change, of those that this reads.

    Raises:
        AfaError: As `afa.inference.files.pseudo_files` and `afa.formats.write.write_format`; not a run folder; the
            data set is missing or broken.
    """
    run, output = Path(run), Output(out, formats=formats, shard_size=out_shards, rle=rle)
    config = run_config(run, overrides, "pseudo", data=data)
    with at_work(config, progress) as (device, processes):
        network = load_run(run, device).network
        images = open_data(config.data).train(list_file=list_file)
        tiling = prediction.pseudo_tiling(network, config, tiles, max_pixels=max_pixels)
        return output.write_labels(network, images, config, processes, kind=kind, tiling=tiling)


def masks(
    data: str | Path,
    out: str | Path,
    *,
    file: str | Path | None = None,
    list_file: str | None = None,
    formats: str = "",
    examples: int = 8,
    out_shards: int = 0,
    rle: bool = False,
    tiles: str | int = "off",
    max_pixels: int | None = None,
    progress: bool = True,
    **overrides: Any,
) -> MasksSummary:
    """Write masks of tagged images without training, as `afa masks`: from class names and a frozen encoder.

    Args:
        data: Folder of the data set; no mask of it is read.
        out: Folder of the masks, or address of a store; those that are there already are left as they are.
        file: TOML file whose settings win over those of the preset `frozen`.
        list_file: Names of the images, one a line; None is every image with tags.
        formats: Formats of other tools to write as well, names separated by commas.
        examples: How many images the page OUT/masks.html shows; there is none beside shards.
        out_shards: As of `pseudo_labels`.
        rle: As of `predict`.
        tiles: As of `pseudo_labels`.
        max_pixels: As of `Predictor`.
        progress: Show progress on standard error.
        overrides: Keys of the configuration that win.

    Returns:
        What was written, what failed, and how sure it is.

    Raises:
        AfaError: As `open_data`, `build_network`, `afa.inference.files.pseudo_files` and
            `afa.formats.write.write_format`; `model.classifier` is not text.
    """
    output = Output(out, formats=formats, shard_size=out_shards, rle=rle)
    refuse_unread("masks", overrides)
    config = file_config(file, rooted(data, overrides), None if file else "frozen")
    if config.model.classifier != "text":
        raise AfaError("model.classifier is learned, and nothing was learned yet; set it to text, or use afa train")
    with at_work(config, progress) as (device, processes):
        opened = open_data(config.data)
        images = opened.tagged() if list_file is None else opened.train(list_file=list_file)
        torch.manual_seed(config.train.seed)
        network = build_network(config.model, len(images.classes), words=opened.words).to(device).eval()
        tiling = prediction.pseudo_tiling(network, config, tiles, max_pixels=max_pixels)
        parts: list[MasksSummary] = []

        def look(*made: Any) -> None:
            parts.append(summarize_masks(*made))

        how: dict[str, Any] = {"kind": "cam", "refine": True, "tiling": tiling, "overlay": True, "look": look}
        written = output.write_labels(network, images, config, processes, **how)
        if output.in_shards:
            return joined_masks(written, [each for made in processes.gather(parts) for each in made])
        summary = summarize_masks(written, images, output.folder, processes=processes)
        if processes.is_main:
            write_masks_page(network, images, output.folder, summary, config=config, count=examples)
        return summary
