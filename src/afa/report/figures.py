"""The paper's figures, drawn from a run: attention and affinity, CAMs, labels, results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from afa.config import Config, Propagation
from afa.data.dataset import TaggedImages
from afa.data.open import open_data
from afa.data.split import VALIDATION
from afa.errors import AfaError
from afa.model.network import AfaNetwork
from afa.pseudo.cam import multi_scale_cam
from afa.pseudo.scores import class_shares
from afa.pseudo.walk import mean_attention_affinity
from afa.report.drawing import Token, blend_heat, blend_label, draw_star, draw_window, lay_out
from afa.report.pictures import Seen, evenly_spaced
from afa.runs.network import load_run
from afa.runs.run import Run
from afa.runtime import image_progress, pick_device

FIGURES: Final = {
    "affinity": ("query", "attention", "affinity"),
    "cam": ("image", "CAM, one scale", "CAM, all scales", "by attention", "by affinity"),
    "labels": ("image", "CAM", "propagated", "CAM + PAR", "propagated + PAR"),
    "results": ("image", "prediction", "prediction + CRF", "ground truth"),
}
"""Name of each figure's sheet and the captions of its columns: Figures 1 and 4, 2, 5 and the labels of 4, and 6."""

_Row = list[Image.Image | None]


@torch.inference_mode()
def write_figures(run: Path, *, data: str | None = None, count: int = 4, device: str = "auto") -> list[Path]:
    """Draw RUN/figures/{affinity,cam,labels,results}.png from evenly spaced images with tags.

    - affinity: two query points an image, where the CAM is strongest and where it is weakest; from there the mean
      attention of the last blocks and the learned affinity at the largest scale, with the window that the affinity is
      learned and walked in.
    - cam: of the tagged classes, before and after the random walk.
    - labels: before and after the refinement, at the background scores of their evaluation.
    - results: the segmentation by the run's protocol; it alone is not told the tags.

    Args:
        run: Run folder.
        data: Folder of the data set; None is that of the run.
        count: Images.
        device: `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        AfaError: Not a run folder, no data set there, or none of its images has tags.

    Source:
        Paper Figures 1, 2, 4, 5 and 6.
    """
    keys: dict[str, object] = {"data.class_subset": Run(run).classes()}
    config = Run(run).config(keys if data is None else keys | {"data.root": data})
    network = load_run(run, pick_device(device)).network
    opened = open_data(config.data)
    opened.leave_out_broken((VALIDATION,))
    images: TaggedImages = opened.masked() if opened.has_masks else opened.validation()
    picks = evenly_spaced(images, count)
    if not picks:
        raise AfaError(f"{opened.root}: no image with tags to draw; pass --data with another folder")
    draw = {"affinity": _affinity_rows, "cam": _cam_rows, "labels": _label_rows, "results": _result_rows}
    rows: dict[str, list[_Row]] = {name: [] for name in FIGURES}
    with image_progress("draw figures", total=len(picks)) as advance:
        for i in picks:
            seen = Seen.open(images, i, config, next(network.parameters()).device, enlarge=True)
            for name, sheet in rows.items():
                sheet += draw[name](network, config, seen)
            advance(1)
    folder = Run(run).figures
    folder.mkdir(exist_ok=True)
    for name, captions in FIGURES.items():
        lay_out(rows[name], captions).save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in FIGURES]


def _affinity_rows(network: AfaNetwork, config: Config, seen: Seen) -> Iterator[_Row]:
    found = multi_scale_cam(network.score, seen.view, scales=config.pseudo.scales, affinity=True)
    assert found.walk is not None
    logits, learned = found.walk.attention_logits, found.walk.affinity
    assert logits is not None
    assert learned is not None
    # From a token to all: neither map is symmetric in what it shows, so both are read by the query's row.
    attention = mean_attention_affinity(logits, scale=found.walk.attention_scale)
    # The tokens where the CAM is strongest and weakest.
    small = adaptive_avg_pool2d(found.cam[:, seen.present].amax(1), found.grid)[0]
    for query in (int(small.argmax()), int(small.argmin())):
        point = Token(*divmod(query, found.grid[1]))
        maps = [blend_heat(seen.picture, each[:, query].reshape(1, *found.grid)) for each in (attention, learned)]
        pictures = [draw_star(each, point, found.grid) for each in (seen.picture, *maps)]
        draw_window(pictures[2], point, found.grid, config.pseudo.affinity_radius)
        yield [*pictures]


def _cam_rows(network: AfaNetwork, config: Config, seen: Seen) -> Iterator[_Row]:
    one_scale = replace(config.pseudo, scales=(1.0,))
    maps = [seen.infer(network, each, "cam")["cam"] for each in (one_scale, config.pseudo)]
    walks: tuple[Propagation, ...] = ("attention", "affinity")
    for walk in walks:
        settings = replace(config.pseudo, propagation=walk)
        maps.append(class_shares(seen.infer(network, settings, "propagated")["propagated"]))
    heats = [blend_heat(seen.picture, scores[seen.present]) for scores in maps]
    yield [Image.fromarray(each) for each in (seen.picture, *heats)]


def _label_rows(network: AfaNetwork, config: Config, seen: Seen) -> Iterator[_Row]:
    kinds = ("cam_label", "propagated_label")
    labels = [
        seen.infer(network, config.pseudo, kind, refined=refined)[kind] for refined in (False, True) for kind in kinds
    ]
    yield _labeled(seen, labels)


def _result_rows(network: AfaNetwork, config: Config, seen: Seen) -> Iterator[_Row]:
    labels = [seen.segment(network, config, crf=crf) for crf in (False, True)]
    yield _labeled(seen, [*labels, seen.truth])


def _labeled(seen: Seen, labels: Sequence[Tensor | None]) -> _Row:
    """The image, and the image under each label."""
    drawn = (None if label is None else Image.fromarray(blend_label(seen.picture, label)) for label in labels)
    return [Image.fromarray(seen.picture), *drawn]
