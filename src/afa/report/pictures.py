"""Pictures of the network's results for some images: the examples of the report.

They run the network and write PNGs. How examples are laid out on the page is up to its template.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from afa.config import Config, PseudoConfig
from afa.data.dataset import MaskedImages, TaggedImages
from afa.errors import BrokenImageError
from afa.evaluation.protocols import image_tensor, logit_maps, pseudo_view
from afa.evaluation.worth import Worth, spread_evenly, threshold_settings
from afa.model.network import AfaNetwork
from afa.pseudo.pipeline import infer_pseudo
from afa.pseudo.scores import class_shares
from afa.report.drawing import DISPLAY_SIZE, Pixels, blend_heat, blend_label, lay_out
from afa.runs.files import write_whole
from afa.runs.run import Run
from afa.runtime import image_progress

PICTURES: Final = {
    "image": "image",
    "cam": "CAM",
    "propagated": "propagated CAM",
    "pseudo": "pseudo label",
    "prediction": "prediction",
    "truth": "ground truth",
}
"""Pictures of an example and their captions, in the order of the method; `truth` only of images with masks."""

THRESHOLD_PICTURES: Final = {"lower": "lower background scores", "set": "as set", "higher": "higher background scores"}
"""Further pictures, those of RUN/thresholds: labels by the names of `threshold_settings`."""

_SHEET_ROWS: Final = 5
_THRESHOLD_EXAMPLES: Final = 4


def write_examples(
    network: AfaNetwork,
    images: TaggedImages,
    run: Path,
    *,
    config: Config,
    count: int,
    trained: bool = True,
    first: Sequence[int] = (),
) -> Path | None:
    """Write RUN/examples: a folder of pictures for each of some evenly spaced images, sheet.png and index.json.

    The pseudo labels see an image's true tags, the prediction sees the image alone. What an earlier call left
    in RUN/examples is removed. The network is in eval mode during the call.

    Args:
        network: Its parameters say the device.
        images: Where examples are taken from, `MaskedImages` where there are masks. Up to a quarter hold none of the
            classes; images of which nothing is known, and broken ones, are passed over.
        run: Run folder.
        config: Its `pseudo` and `evaluation` sections apply.
        count: How many examples; fewer when there are fewer images with tags.
        first: Positions of images that come first; the others are evenly spaced.
        trained: Off, the pictures are image, CAM and pseudo label alone: decoder and affinity have learned nothing.

    Returns:
        The sheet; None without an example.
    """
    others = [i for i in evenly_spaced(images, count, negatives=count // 4) if i not in first]
    draw = _example_pictures if trained else _untrained_pictures
    picks = [*first, *others][:count]
    return _write_drawn(Run(run).examples, network, images, picks, draw, config=config)


def write_ranked(
    network: AfaNetwork, images: TaggedImages, run: Path, ranked: Sequence[str], *, config: Config, count: int
) -> None:
    """Write RUN/worst and RUN/best, as `write_examples` does: `count` // 4 of the best, and twice as many of the worst.

    `ranked` has the names of the images, the lowest score first.
    """
    places, few = {name: i for i, name in enumerate(images.names)}, count // 4
    for folder, names in ((Run(run).worst, ranked[: 2 * few]), (Run(run).best, ranked[::-1][:few])):
        shutil.rmtree(folder, ignore_errors=True)
        if names:
            picks = [places[name] for name in names]
            _write_drawn(folder, network, images, picks, _example_pictures, config=config)


def _opened(
    images: TaggedImages, picks: Iterable[int], config: Config, device: torch.device
) -> Iterator[tuple[int, Seen]]:
    """The images at some places, without those that are broken: whoever made the masks has told."""
    for i in picks:
        try:
            seen = Seen.open(images, i, config, device, enlarge=False)
        except BrokenImageError:
            continue
        yield i, seen


def write_worth(network: AfaNetwork, images: TaggedImages, run: Path, worth: Worth, *, config: Config) -> None:
    """Write RUN/uncertain, the images whose prediction is least certain, and RUN/thresholds, as `write_examples`."""
    places = {name: i for i, name in enumerate(images.names)}
    uncertain = [places[name] for name, _ in worth.uncertain]
    spread = evenly_spaced(images, _THRESHOLD_EXAMPLES)
    _write_drawn(Run(run).uncertain, network, images, uncertain, _example_pictures, config=config)
    _write_drawn(Run(run).thresholds, network, images, spread, _threshold_pictures, config=config)


def _write_drawn(
    folder: Path,
    network: AfaNetwork,
    images: TaggedImages,
    picks: Sequence[int],
    draw: Callable[[AfaNetwork, Config, Seen], dict[str, Pixels]],
    *,
    config: Config,
) -> Path | None:
    """Write a folder of pictures for each of the images at some places, then the sheet and index.json."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    was_training = network.training
    network.eval()
    index: list[dict[str, object]] = []
    device = next(network.parameters()).device
    with image_progress(f"draw {folder.name}", total=len(picks)) as advance:
        for number, (i, seen) in enumerate(_opened(images, picks, config, device)):
            name = f"{number:03d}"
            (folder / name).mkdir()
            for key, picture in draw(network, config, seen).items():
                Image.fromarray(picture).save(folder / name / f"{key}.png")
            tags = [c for c, present in zip(images.classes, images.tags(i), strict=True) if present]
            index.append({"name": images.names[i], "tags": tags, "folder": name})
            advance(1)
    network.train(was_training)
    sheet = folder / "sheet.png" if index else None
    if sheet is not None:
        draw_sheet([folder / str(entry["folder"]) for entry in index[:_SHEET_ROWS]]).save(sheet)
    # Last and in one piece, so that an index never lists a missing picture.
    write_whole(folder / "index.json", json.dumps(index, indent=1) + "\n")
    return sheet


def draw_sheet(folders: Sequence[Path]) -> Image.Image:
    """Put the examples of some folders on one RGB sheet: a row an example, a column a picture, captions on top."""
    captions = PICTURES | THRESHOLD_PICTURES
    keys = [key for key in captions if any((folder / f"{key}.png").is_file() for folder in folders)]
    paths = [[folder / f"{key}.png" for key in keys] for folder in folders]
    rows = [[Image.open(path) if path.is_file() else None for path in row] for row in paths]
    return lay_out(rows, [captions[key] for key in keys])


def evenly_spaced(images: TaggedImages, count: int, *, negatives: int = 0) -> list[int]:
    """Positions of at most `count` images with tags, from the first to the last, then some that hold no class."""
    known = images.has_tags if isinstance(images, MaskedImages) else lambda _: True
    tagged = [i for i in range(len(images)) if known(i) and images.tags(i).any()]
    empty = np.flatnonzero(images.negative)
    few = empty[spread_evenly(len(empty), negatives)].tolist()
    return [*(tagged[pick] for pick in spread_evenly(len(tagged), count - len(few))), *few]


@dataclass(frozen=True)
class Seen:
    """An image and what is drawn from it.

    Attributes:
        pixels: (H, W, 3) as it is.
        picture: (h, w, 3), its longest side DISPLAY_SIZE.
        view: (1, 3, H', W') in [0, 1], as pseudo labels see it.
        tags: (1, C).
        truth: (H, W) mask; None where there is none.
    """

    pixels: Pixels
    picture: Pixels
    view: Tensor
    tags: Tensor
    truth: Tensor | None

    @classmethod
    def open(cls, images: TaggedImages, i: int, config: Config, device: torch.device, *, enlarge: bool) -> Seen:
        """Read an image; `enlarge` also scales small ones up."""
        pixels = images.image(i)
        height, width = pixels.shape[:2]
        scale = DISPLAY_SIZE / max(height, width)
        scale = scale if enlarge else min(1.0, scale)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        view = image_tensor(pixels, device=device)
        return cls(
            pixels=pixels,
            picture=np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)),
            view=pseudo_view(view, config),
            tags=torch.from_numpy(images.tags(i)).to(device)[None],
            truth=torch.from_numpy(images.mask(i)) if isinstance(images, MaskedImages) else None,
        )

    @property
    def present(self) -> Tensor:
        """(C,) the tagged classes."""
        return self.tags[0] > 0

    def segment(self, network: AfaNetwork, config: Config, *, crf: bool) -> Tensor:
        """(H, W) mask under the protocol, with the dense CRF or without it, in full precision."""
        evaluation, train = config.evaluation.with_crf(crf), replace(config.train, precision="fp32")
        (maps,) = logit_maps(network, [self.pixels], replace(config, evaluation=evaluation, train=train))
        return maps.label((self.pixels.shape[0], self.pixels.shape[1]))

    def infer(self, network: AfaNetwork, config: PseudoConfig, *want: str, refined: bool = False) -> dict[str, Tensor]:
        """What `infer_pseudo` gives for this image, without its axis of images."""
        found = infer_pseudo(network.score, self.view, self.tags, config=config, want=want, refined=refined)
        return {key: value[0] for key, value in found.items()}


@torch.inference_mode()
def _example_pictures(network: AfaNetwork, config: Config, seen: Seen) -> dict[str, Pixels]:
    """The pictures of an example by name, all of one size."""
    walks = ("propagated",) if config.pseudo.propagation != "none" else ()
    pseudo = seen.infer(network, config.pseudo, "cam", *walks, "refined_label")
    drawn = {"image": seen.picture, "cam": blend_heat(seen.picture, pseudo["cam"][seen.present])}
    if walks:
        drawn["propagated"] = blend_heat(seen.picture, class_shares(pseudo["propagated"])[seen.present])
    drawn["pseudo"] = blend_label(seen.picture, pseudo["refined_label"])
    drawn["prediction"] = blend_label(seen.picture, seen.segment(network, config, crf=config.evaluation.crf))
    return drawn if seen.truth is None else drawn | {"truth": blend_label(seen.picture, seen.truth)}


@torch.inference_mode()
def _untrained_pictures(network: AfaNetwork, config: Config, seen: Seen) -> dict[str, Pixels]:
    pseudo = seen.infer(network, config.pseudo, "cam", "cam_label", refined=True)
    return {
        "image": seen.picture,
        "cam": blend_heat(seen.picture, pseudo["cam"][seen.present]),
        "pseudo": blend_label(seen.picture, pseudo["cam_label"]),
    }


@torch.inference_mode()
def _threshold_pictures(network: AfaNetwork, config: Config, seen: Seen) -> dict[str, Pixels]:
    drawn = {
        "image": seen.picture,
        "cam": blend_heat(seen.picture, seen.infer(network, config.pseudo, "cam")["cam"][seen.present]),
    }
    for name, settings in threshold_settings(config).items():
        label = seen.infer(network, settings.pseudo, "initial_label")["initial_label"]
        drawn[name] = blend_label(seen.picture, label)
    return drawn
