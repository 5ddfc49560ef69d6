"""The pictures of the page as values that JSON holds: layers as data URIs, so that no file is served, and captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from afa.config import Config
from afa.data.palette import tint, voc_palette
from afa.explore.encoded import EncodedImage, Look, Pixels, Stages, at_size
from afa.explore.scores import mean_iou
from afa.report.drawing import heat_map, heat_maps
from afa.report.render import data_uri
from afa.types import IGNORE_INDEX

_DISPLAY: Final = 560
_SMALL: Final = 96
_GAP: Final = 3


def show_stages(
    seen: EncodedImage,
    stages: Stages,
    config: Config,
    classes: Sequence[str],
    tags: NDArray[np.float32],
    colored: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The photograph, the panes in the order of the method, and the legend.

    Args:
        seen: The image.
        stages: Its maps.
        config: The settings that made them, for the captions.
        classes: C names.
        tags: (C,) the tags.
        colored: Names in the order of their colors, all of `classes` among them; None takes `classes`.
    """
    size = _display(seen)
    places = np.arange(256, dtype=np.uint8)
    places[1 : 1 + len(classes)] = [min(254, 1 + (colored or classes).index(name)) for name in classes]
    photo = Image.fromarray(seen.pixels).resize(size[::-1], Image.Resampling.BILINEAR)
    return {
        "photo": data_uri(photo, "JPEG", quality=85),
        "ratio": size[1] / size[0],
        "panes": list(_panes(seen, stages, config, classes, tags, size, places)),
        "legend": _legend(seen, stages, classes, places),
    }


def _panes(
    seen: EncodedImage,
    stages: Stages,
    config: Config,
    classes: Sequence[str],
    tags: NDArray[np.float32],
    size: tuple[int, int],
    places: Pixels,
) -> Iterator[dict[str, str]]:
    chosen = [name for name, on in zip(classes, tags, strict=True) if on]
    told = ", ".join(chosen) or "no tag"
    truth = _truth(seen, stages)
    pseudo, judged = config.pseudo, _Judged(truth, len(classes))
    yield _pane("image", "image", "What the network saw" + (", scaled down." if seen.shrunk else "."))
    text = f"Where the classifier sees {told}. Bright is strong."
    yield _pane("cam", "CAM", text + judged(stages.cam_label), _heat(stages.cam, size))
    if stages.propagated is None:
        yield _pane(
            "propagated",
            "propagated CAM",
            "No random walk is on (pseudo.propagation is none); choose one under Random walk.",
            None,
        )
    else:
        text = f"The CAM after a random walk along the {pseudo.propagation}."
        layer = _heat(stages.propagated, size)
        yield _pane("propagated", "propagated CAM", text + judged(stages.propagated_label), layer)
    share = float((stages.pseudo == IGNORE_INDEX).float().mean())
    text = f"What the segmentation learns from: it is told {told}. Hatched: {share:.0%} left open."
    yield _pane("pseudo", "pseudo label", text + judged(stages.pseudo), _label(stages.pseudo, size, places))
    if stages.prediction is not None and stages.certainty is not None:
        text = f"What the segmentation says by itself, {float(stages.certainty.mean()):.0%} certain."
        yield _pane(
            "prediction", "prediction", text + judged(stages.prediction), _label(stages.prediction, size, places)
        )
        text = "Where the prediction is least certain. Bright is doubt."
        yield _pane("doubt", "doubt", text, _heat(1 - stages.certainty[None], size))
    if truth is not None:
        layer = _label(torch.from_numpy(truth), size, places)
        yield _pane("truth", "ground truth", "The mask. It never trains; it only judges.", layer)


def _truth(seen: EncodedImage, stages: Stages) -> Pixels | None:
    """The mask, where the labels have its classes: not under other words."""
    return None if stages.prediction is None else seen.truth


class _Judged:
    """The end of a caption: how good a label is, where there is a mask."""

    def __init__(self, truth: Pixels | None, num_classes: int) -> None:
        self.truth, self.num_classes = truth, num_classes

    def __call__(self, label: Tensor | None) -> str:
        if label is None or self.truth is None:
            return ""
        found = mean_iou(at_size(label, self.truth.shape), self.truth, self.num_classes)
        return "" if found is None else f" IoU with the mask: {found:.0f} %."


def show_look(seen: EncodedImage, look: Look, *, block: int, head: int, learned: bool) -> dict[str, Any]:
    """The panes of a point: attention, learned affinity, and a sheet of all blocks and heads.

    Args:
        seen: The image.
        look: From the point.
        block: Whose attention is shown large, from 1; 0 for the mean of all.
        head: Likewise; 0 for the mean over the heads.
        learned: Whether the affinity was learned.
    """
    size, (height, width) = _display(seen), seen.grid
    title = f"attention, {map_name(block, head)}"
    chosen = look.attention_map(block, head)
    affinity = "Which places the affinity head takes for the same class as the star: the walk follows it."
    if not learned:
        affinity = "This run did not train its affinity head (loss.affinity_weight is 0), so there is nothing to see."
    return {
        "point": {
            "x": (look.column + 0.5) / width,
            "y": (look.row + 0.5) / height,
            "dx": 1 / width,
            "dy": 1 / height,
        },
        "look": [
            _pane("attention", title, "What the encoder looks at from the star.", _heat(chosen[None], size)),
            _pane("affinity", "learned affinity", affinity, _heat(look.affinity[None], size) if learned else None),
        ],
        "sheet": {
            "src": _sheet(look, size),
            "heads": [len(each) for each in look.attention],
            "block": block,
            "head": head,
        },
    }


def map_name(block: int, head: int) -> str:
    """Name of an attention map; see `Look.attention_map`."""
    if block == 0:
        return "mean of all"
    return f"block {block}, head {head}" if head else f"block {block}, mean"


def _sheet(look: Look, display: tuple[int, int]) -> str:
    """All maps: a row a block, its mean before its heads."""
    shrink = _SMALL / max(display)
    size = (max(1, round(display[0] * shrink)), max(1, round(display[1] * shrink)))
    columns = 1 + max(map(len, look.attention))
    sheet = np.zeros((len(look.attention), size[0] + _GAP, columns, size[1] + _GAP, 3), dtype=np.uint8)
    for row, heads in enumerate(look.attention):
        maps = heat_maps(torch.cat([heads.mean(0, keepdim=True), heads]).cpu(), size)
        sheet[row, : size[0], : len(maps), : size[1]] = maps.swapaxes(0, 1)
    picture = Image.fromarray(sheet.reshape(sheet.shape[0] * sheet.shape[1], -1, 3))
    draw = ImageDraw.Draw(picture)
    for row in range(len(look.attention)):
        place = (3, row * (size[0] + _GAP) + 2)
        draw.text(
            place,
            f"block {row + 1}",
            fill="white",
            font=ImageFont.load_default(11),
            stroke_width=1,
            stroke_fill="black",
        )
    return data_uri(picture, "JPEG", quality=85)


def _display(seen: EncodedImage) -> tuple[int, int]:
    """(height, width) at which layers are drawn."""
    height, width = seen.pixels.shape[:2]
    scale = _DISPLAY / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _pane(key: str, title: str, text: str, layer: str | None = "") -> dict[str, str]:
    """A picture of the page; an empty layer is the photograph alone, none has no picture."""
    return {"key": key, "title": title, "text": text, "layer": layer or "", "empty": "yes" if layer is None else ""}


def _heat(scores: Tensor, size: tuple[int, int]) -> str:
    half = (max(1, size[0] // 2), max(1, size[1] // 2))  # heat is smooth, and the browser enlarges it
    return data_uri(Image.fromarray(heat_map(scores.cpu(), half)), "JPEG", quality=85)


def _label(label: Tensor, size: tuple[int, int], places: Pixels) -> str:
    color, weight = tint(places[at_size(label, size)], alpha=0.75)
    layer = np.dstack([color, np.rint(255 * weight).astype(np.uint8)])
    return data_uri(Image.fromarray(layer), "PNG", compress_level=1)


def _legend(seen: EncodedImage, stages: Stages, classes: Sequence[str], places: Pixels) -> list[dict[str, str]]:
    """Color and name of each class that a label shows."""
    palette, shown = voc_palette(), np.zeros(256, dtype=bool)
    labels = [stages.pseudo] + ([] if stages.prediction is None else [stages.prediction])
    maps: list[Pixels] = [each.to(torch.uint8).cpu().numpy() for each in labels]
    truth = _truth(seen, stages)
    for each in maps + ([] if truth is None else [truth]):
        shown |= np.bincount(each.ravel(), minlength=256) > 0
    return [
        {"name": name, "color": "#{:02x}{:02x}{:02x}".format(*palette[places[value]].tolist())}
        for value, name in enumerate(classes, start=1)
        if shown[value]
    ]
