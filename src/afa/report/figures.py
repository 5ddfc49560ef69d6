"""The paper's figures, made from a run: sheets of PNG in RUN/figures.

Runs the network on a few images; how pictures are colored and put on a sheet is up to afa.report.examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from afa.config import Config, Propagation, PseudoConfig, load_config
from afa.data.layout import find_layout
from afa.data.voc import ScoredImages, TaggedImages
from afa.errors import AfaError
from afa.evaluation.protocols import CRF, image_tensor, logit_maps, pseudo_view
from afa.model.network import AfaNetwork
from afa.pseudo.cam import multi_scale_cam
from afa.pseudo.pipeline import infer_pseudo
from afa.pseudo.walk import mean_attention_affinity
from afa.report.examples import (
    DISPLAY_SIZE,
    blend_heat,
    blend_label,
    evenly_spaced,
    lay_out,
    resized_label,
    stretched_heat,
)
from afa.runs.build import load_run, read_classes
from afa.runtime import pick_device, progress_bar
from afa.types import NetworkOutput

FIGURES: Final = {
    "affinity": ("query", "attention", "affinity"),
    "cam": ("image", "CAM, one scale", "CAM, all scales", "by attention", "by affinity"),
    "labels": ("image", "CAM", "propagated", "CAM + PAR", "propagated + PAR"),
    "results": ("image", "prediction", "prediction + CRF", "ground truth"),
}
"""Name of each sheet and the captions of its columns: Figures 1 and 4, 2, 5 and the labels of 4, and 6."""

_STAR: Final = (255, 220, 40)


class _Point(NamedTuple):
    """A token of the affinity's grid."""

    row: int
    column: int


@dataclass(frozen=True)
class _Seen:
    """An image and what all sheets draw from it."""

    pixels: NDArray[np.uint8]
    picture: NDArray[np.uint8]
    view: Tensor
    tags: Tensor
    truth: NDArray[np.uint8] | None

    @property
    def size(self) -> tuple[int, int]:
        return self.picture.shape[0], self.picture.shape[1]


@torch.inference_mode()
def write_figures(
    run: Path, *, data: str | None = None, count: int = 4, device: str = "auto", progress: bool = True
) -> list[Path]:
    """Draw RUN/figures/{affinity,cam,labels,results}.png from evenly spaced images with tags.

    affinity: two query points an image, one where the CAM is strongest and one where it is weakest; the mean attention
    of the last blocks and the learned affinity from there, with the window that the affinity is learned and walked in,
    at the largest scale. cam: of the tagged classes, and after a step of the random
    walk. labels: before and after the refinement, at the background scores of their evaluation. results: of the
    segmentation by the run's protocol, which alone is not told the tags.

    Args:
        run: Run folder.
        data: Folder of the data set; None is that of the run.
        count: Images.
        device: `auto`, `cpu`, `cuda` or `mps`.
        progress: Show progress on standard error.

    Returns:
        The sheets.

    Raises:
        AfaError: Not a run folder, no data set there, or none of its images has tags.

    Source:
        Paper Figures 1, 2, 4, 5 and 6.
    """
    keys: dict[str, object] = {"data.class_subset": read_classes(run)}
    config = load_config(run / "config.toml", keys if data is None else keys | {"data.root": data})
    loaded = load_run(run, pick_device(device))
    layout = find_layout(config.data)
    images: TaggedImages = layout.scored() if layout.has_masks else layout.validation()
    picks = evenly_spaced(images, count)
    if not picks:
        raise AfaError(f"{layout.root}: no image with tags to draw; pass --data with another folder")
    draw: dict[str, Callable[[AfaNetwork, Config, _Seen], Iterator[list[Image.Image | None]]]] = {
        "affinity": _affinity_rows,
        "cam": _cam_rows,
        "labels": _label_rows,
        "results": _result_rows,
    }
    rows: dict[str, list[list[Image.Image | None]]] = {name: [] for name in FIGURES}
    with progress_bar(enabled=progress) as bar:
        task = bar.add_task("figures", total=len(picks), rate="")
        for i in picks:
            seen = _see(images, i, config, next(loaded.network.parameters()).device)
            for name, sheet in rows.items():
                sheet += draw[name](loaded.network, config, seen)
            bar.update(task, advance=1)
    folder = run / "figures"
    folder.mkdir(exist_ok=True)
    for name, captions in FIGURES.items():
        lay_out(rows[name], captions).save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in FIGURES]


def _see(images: TaggedImages, i: int, config: Config, device: torch.device) -> _Seen:
    pixels = images.image(i)
    scale = DISPLAY_SIZE / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return _Seen(
        pixels=pixels,
        picture=np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)),
        view=pseudo_view(
            image_tensor(pixels, device=device), config=config.pseudo, short_side=config.evaluation.short_side
        ),
        tags=torch.from_numpy(images.tags(i)).to(device)[None],
        truth=images.mask(i) if isinstance(images, ScoredImages) else None,
    )


def _affinity_rows(network: AfaNetwork, config: Config, seen: _Seen) -> Iterator[list[Image.Image | None]]:
    found = multi_scale_cam(network.score, seen.view, scales=config.pseudo.scales, affinity=True)
    assert found.walk is not None
    logits, learned = found.walk.attention_logits, found.walk.affinity
    assert logits is not None
    assert learned is not None
    # From a token to all: neither map is symmetric in what it shows, so both are read by the query's row.
    attention = mean_attention_affinity(logits, scale=found.walk.attention_scale)
    present = found.cam[0, seen.tags[0] > 0].amax(0)
    for point in _query_points(present, found.grid):
        query = point.row * found.grid[1] + point.column
        maps = [_heated(seen, each[:, query].reshape(1, *found.grid)) for each in (attention, learned)]
        pictures = [_starred(each, point, found.grid) for each in (seen.picture, *maps)]
        _draw_window(pictures[2], point, found.grid, config.pseudo.affinity_radius)
        yield [*pictures]


def _cam_rows(network: AfaNetwork, config: Config, seen: _Seen) -> Iterator[list[Image.Image | None]]:
    one_scale = replace(config.pseudo, scales=(1.0,))
    cams = [_infer(network, seen, each, "cam")[0] for each in (one_scale, config.pseudo)]
    propagated = []
    walks: tuple[Propagation, ...] = ("attention", "affinity")
    for walk in walks:
        scores = _infer(network, seen, replace(config.pseudo, propagation=walk), "propagated")[0]
        # The walk weakens all scores of a lonely token alike; which class they favor is what the label will say.
        propagated.append((scores / scores.sum(0, keepdim=True).clamp(min=1e-12))[1:])
    present = seen.tags[0] > 0
    heats = [Image.fromarray(_heated(seen, scores[present])) for scores in (*cams, *propagated)]
    yield [Image.fromarray(seen.picture), *heats]


def _label_rows(network: AfaNetwork, config: Config, seen: _Seen) -> Iterator[list[Image.Image | None]]:
    labels = [
        _infer(network, seen, config.pseudo, kind, refined=refined)[0]
        for refined in (False, True)
        for kind in ("cam_label", "propagated_label")
    ]
    yield [Image.fromarray(seen.picture), *(_labeled(seen, label) for label in labels)]


def _result_rows(network: AfaNetwork, config: Config, seen: _Seen) -> Iterator[list[Image.Image | None]]:
    size = (seen.pixels.shape[0], seen.pixels.shape[1])
    protocol = config.evaluation.protocol.removesuffix(CRF)
    labels = [
        logit_maps(network, [seen.pixels], protocol=each, config=config.evaluation)[0].label(size)
        for each in (protocol, protocol + CRF)
    ]
    truth = None if seen.truth is None else _labeled(seen, torch.from_numpy(seen.truth))
    yield [Image.fromarray(seen.picture), *(_labeled(seen, label) for label in labels), truth]


def _infer(network: AfaNetwork, seen: _Seen, config: PseudoConfig, kind: str, *, refined: bool = False) -> Tensor:
    def score(view: Tensor, affinity: bool) -> NetworkOutput:
        return network.score(view, affinity)

    return infer_pseudo(score, seen.view, seen.tags, config=config, want=(kind,), refined=refined)[kind]


def _query_points(cam: Tensor, grid: tuple[int, int]) -> list[_Point]:
    """Tokens where an (H, W) CAM is strongest and weakest."""
    small = torch.nn.functional.adaptive_avg_pool2d(cam[None, None], grid)[0, 0]
    return [_Point(*divmod(int(index), grid[1])) for index in (small.argmax(), small.argmin())]


def _heated(seen: _Seen, scores: Tensor) -> NDArray[np.uint8]:
    return blend_heat(seen.picture, stretched_heat(scores, seen.size))


def _labeled(seen: _Seen, label: Tensor) -> Image.Image:
    return Image.fromarray(blend_label(seen.picture, resized_label(label, seen.size)))


def _starred(picture: NDArray[np.uint8], point: _Point, grid: tuple[int, int]) -> Image.Image:
    """Draw a star at the center of a token."""
    image = Image.fromarray(picture)
    x, y = ((at + 0.5) * side / cells for at, side, cells in zip(point[::-1], image.size, grid[::-1], strict=True))
    radius = max(image.size) / 22
    corners = []
    for i in range(10):
        angle, reach = math.pi * (i / 5 - 0.5), radius * (1 if i % 2 == 0 else 0.42)
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    ImageDraw.Draw(image).polygon(corners, fill=_STAR, outline=(0, 0, 0))
    return image


def _draw_window(image: Image.Image, point: _Point, grid: tuple[int, int], radius: int) -> None:
    """Outline the tokens within a radius of one."""
    ends = [
        (max(0, at - radius) * side / cells, min(cells, at + radius + 1) * side / cells - 1)
        for at, side, cells in zip(point[::-1], image.size, grid[::-1], strict=True)
    ]
    (left, right), (top, bottom) = ends
    ImageDraw.Draw(image).rectangle((left, top, right, bottom), outline=_STAR, width=2)
