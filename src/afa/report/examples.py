"""Pictures of what the network makes of some validation images: from CAM to prediction, for the report.

Runs the network and writes small PNGs; how they are laid out is up to afa.report.html.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from afa.config import Config
from afa.data.palette import overlay
from afa.data.voc import ScoredImages, TaggedImages
from afa.evaluation.protocols import image_tensor, pseudo_view, seg_logits
from afa.model.network import AfaNetwork
from afa.pseudo.pipeline import infer_pseudo
from afa.training.checkpoint import write_atomically
from afa.types import NetworkOutput

PICTURES = ("image", "cam", "propagated", "pseudo", "prediction", "truth")
"""Pictures of an example, in the order of the method; `truth` only of images that come with masks."""

DISPLAY_SIZE = 256
"""Longest side of a picture, pixels."""

_SHEET_ROWS = 5
_CAPTIONS = {
    "image": "image",
    "cam": "CAM",
    "propagated": "propagated CAM",
    "pseudo": "pseudo label",
    "prediction": "prediction",
    "truth": "ground truth",
}
_HEAT_ANCHORS = (
    (6, 4, 20),
    (60, 16, 92),
    (140, 36, 104),
    (208, 66, 68),
    (243, 126, 38),
    (251, 197, 60),
    (252, 252, 190),
)


def write_examples(
    network: AfaNetwork,
    images: TaggedImages,
    run: Path,
    *,
    config: Config,
    device: torch.device,
    count: int,
) -> None:
    """Write RUN/examples: a folder of pictures for each of some evenly spaced images, sheet.png and index.json.

    The pseudo labels see an image's true tags, the prediction sees the image alone. What an earlier call left
    in RUN/examples is removed. The network is in eval mode during the call.

    Args:
        network: On `device`.
        images: Where examples are taken from, `ScoredImages` where there are masks; images without tags are
            passed over.
        run: Run folder.
        config: Its `pseudo` and `evaluation` sections apply.
        device: Where the network runs.
        count: How many examples; fewer when there are fewer images with tags.
    """
    folder = run / "examples"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    was_training = network.training
    network.eval()
    index: list[dict[str, object]] = []
    for number, i in enumerate(evenly_spaced(images, count)):
        name = f"{number:03d}"
        (folder / name).mkdir()
        for key, picture in _draw_example(network, images, i, config=config, device=device).items():
            Image.fromarray(picture).save(folder / name / f"{key}.png")
        tags = [c for c, present in zip(images.classes, images.tags(i), strict=True) if present]
        index.append({"name": images.names[i], "tags": tags, "folder": name})
    network.train(was_training)
    if index:
        rows = [str(entry["folder"]) for entry in index[:_SHEET_ROWS]]
        draw_sheet([folder / row for row in rows]).save(folder / "sheet.png")
    # Last and in one piece: whoever finds an index finds all its pictures.
    write_atomically(folder / "index.json", json.dumps(index, indent=1) + "\n")


def draw_sheet(folders: Sequence[Path]) -> Image.Image:
    """Put the pictures of several examples on one sheet: a row an example, a column a picture, captions on top.

    Args:
        folders: Folders of examples as `write_examples` leaves them.

    Returns:
        RGB image on white.
    """
    paths = [[folder / f"{key}.png" for key in PICTURES] for folder in folders]
    rows = [[Image.open(path) if path.is_file() else None for path in row] for row in paths]
    return lay_out(rows, [_CAPTIONS[key] for key in PICTURES])


def lay_out(rows: Sequence[Sequence[Image.Image | None]], captions: Sequence[str]) -> Image.Image:
    """Put pictures on a sheet, with captions on top.

    Args:
        rows: Pictures of any size, as many a row as there are captions; None leaves a place empty.
        captions: Texts of the columns.

    Returns:
        RGB image on white.
    """
    side, gap, header = DISPLAY_SIZE * 3 // 4, 6, 26
    width = len(captions) * (side + gap) + gap
    sheet = Image.new("RGB", (width, header + len(rows) * (side + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, caption in enumerate(captions):
        left = gap + column * (side + gap)
        draw.text((left + side / 2, header / 2), caption, fill="black", font=font, anchor="mm")
        for row, pictures in enumerate(rows):
            if (picture := pictures[column]) is not None:
                picture = ImageOps.contain(picture, (side, side))
                top = header + gap + row * (side + gap)
                sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
    return sheet


def heat_colors(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colors of a heat map, from near black over purple and orange to pale yellow, ever brighter.

    Args:
        values: Any shape, in [0, 1].

    Returns:
        The shape + (3,), uint8 RGB.
    """
    positions = np.linspace(0.0, 1.0, len(_HEAT_ANCHORS))
    channels = [np.interp(values, positions, channel) for channel in np.array(_HEAT_ANCHORS, dtype=float).T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def blend_heat(image: NDArray[np.uint8], heat: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Lay a heat map over an image; the photograph stays visible as gray.

    Args:
        image: (H, W, 3) uint8 RGB.
        heat: (H, W) float in [0, 1].

    Returns:
        (H, W, 3) uint8.
    """
    blended: NDArray[np.float64] = 0.35 * _gray(image) + 0.65 * heat_colors(heat)
    return blended.round().astype(np.uint8)


def blend_label(image: NDArray[np.uint8], label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay class colors over an image; the photograph stays visible as gray, darker in the background.

    Args:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) uint8 class indices, 255 = ignored.

    Returns:
        (H, W, 3) uint8.
    """
    # One of VOC's colors is a plain gray, and others are nearly black: all stand out from a dim gray.
    gray = _gray(image)
    gray[label == 0] //= 2
    return overlay(gray, label, alpha=0.65)


def _gray(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) -> (H, W, 3) with three equal channels."""
    return np.array(Image.fromarray(image).convert("L").convert("RGB"))


def evenly_spaced(images: TaggedImages, count: int) -> list[int]:
    """Positions of at most `count` images with tags, from the first to the last."""
    known = images.has_tags if isinstance(images, ScoredImages) else lambda _: True
    tagged = [i for i in range(len(images)) if known(i) and images.tags(i).any()]
    picks = np.linspace(0, len(tagged) - 1, min(count, len(tagged))).round().astype(int)
    return [tagged[pick] for pick in picks]


@torch.inference_mode()
def _draw_example(
    network: AfaNetwork, images: TaggedImages, i: int, *, config: Config, device: torch.device
) -> dict[str, NDArray[np.uint8]]:
    """The pictures of image `i` by name, all of one size."""
    pixels = images.image(i)
    height, width = pixels.shape[:2]
    tags = torch.from_numpy(images.tags(i)).to(device)[None]

    def score(view: Tensor, affinity: bool) -> NetworkOutput:
        return network.score(view, affinity=affinity)

    view = pseudo_view(
        image_tensor(pixels, device=device), config=config.pseudo, short_side=config.evaluation.short_side
    )
    pseudo = infer_pseudo(score, view, tags, config=config.pseudo, want=("cam", "propagated", "refined_label"))
    logits = seg_logits(network, pixels, protocol=config.evaluation.protocol, config=config.evaluation)

    scale = min(1.0, DISPLAY_SIZE / max(height, width))
    shown = (max(1, round(height * scale)), max(1, round(width * scale)))
    picture = np.asarray(Image.fromarray(pixels).resize(shown[::-1], Image.Resampling.LANCZOS))
    present = tags[0] > 0
    # The walk weakens all scores of a lonely token alike; which class they favor is what the label will say.
    shares = pseudo["propagated"][0] / pseudo["propagated"][0].sum(0, keepdim=True).clamp(min=1e-12)
    drawn = {
        "image": picture,
        "cam": blend_heat(picture, stretched_heat(pseudo["cam"][0, present], shown)),
        "propagated": blend_heat(picture, stretched_heat(shares[1:][present], shown)),
        "pseudo": blend_label(picture, resized_label(pseudo["refined_label"][0], shown)),
        "prediction": blend_label(picture, resized_label(logits.argmax(0), shown)),
    }
    if not isinstance(images, ScoredImages):
        return drawn
    return drawn | {"truth": blend_label(picture, resized_label(torch.from_numpy(images.mask(i)), shown))}


def stretched_heat(scores: Tensor, size: tuple[int, int]) -> NDArray[np.float64]:
    """Draw scores as one heat map.

    Args:
        scores: (classes, H, W), any range.
        size: (h, w).

    Returns:
        (h, w) maximum over the classes, stretched to [0, 1].
    """
    heat = scores.float().amax(0)[None, None]
    heat = interpolate(heat, size=size, mode="bilinear", align_corners=False, antialias=True)[0, 0]
    heat = heat - heat.min()
    stretched: NDArray[np.float64] = (heat / heat.max().clamp(min=1e-6)).cpu().double().numpy()
    return stretched


def resized_label(label: Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize a label by nearest neighbor.

    Args:
        label: (H, W) class indices, 255 = ignored.
        size: (h, w).

    Returns:
        (h, w) uint8.
    """
    resized = interpolate(label[None, None].float(), size=size, mode="nearest-exact")[0, 0]
    label_map: NDArray[np.uint8] = resized.to(torch.uint8).cpu().numpy()
    return label_map
