"""An image that the encoder has seen once, and what settings alone make of it: maps, labels, attention from a point.

`EncodedImage` is the slow half, made once an image. `make_stages` and `look_from` are the fast half: they depend on
settings, tags or a point, and run no encoder. Nothing here knows files or pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from afa.config import Config
from afa.errors import AfaError
from afa.evaluation.protocols import (
    LogitMaps,
    crf,
    image_tensor,
    logit_maps,
    pseudo_sizes,
    pseudo_view,
    through_crf,
    view_sizes,
)
from afa.model.attention import watch
from afa.model.backbone import BackboneOutput
from afa.model.network import AfaNetwork
from afa.pseudo.cam import ViewScore, scale_view
from afa.pseudo.pipeline import infer_pseudo
from afa.pseudo.scores import class_shares
from afa.runtime import autocast
from afa.types import NetworkOutput, RawAttention, normalize_image

if TYPE_CHECKING:
    from afa.model.language import TextClassifier

MAX_SIDE: Final = 1024
"""Longer side above which photographs are scaled down before the network sees them, pixels."""

_LONGEST: Final = 3 * MAX_SIDE

Pixels = NDArray[np.uint8]


class KeptViews(ViewScore):
    """Encoder passes over the views of one image, each made once.

    Args:
        network: In eval mode.
        image: (1, 3, H, W) RGB in [0, 1].
        precision: Arithmetic of the network.
        watched: Scale of the view, not mirrored, whose attention is kept.

    Attributes:
        attention: Queries and keys of all blocks in that view, float16; none before it was encoded.
        size: (height, width) of that view, pixels.
    """

    def __init__(self, network: AfaNetwork, image: Tensor, precision: str, watched: float) -> None:
        self.network = network
        self.text: TextClassifier | None = None
        self._normalized = normalize_image(image)
        self._precision = precision
        self._watched = watched
        self.attention: list[RawAttention] = []
        self.size = (0, 0)
        self._encoded: dict[tuple[float, bool], BackboneOutput] = {}
        self._scored: dict[tuple[object, ...], NetworkOutput] = {}

    def __call__(self, image: Tensor, affinity: bool) -> NetworkOutput:
        """Score the (1, 3, H, W) normalized image itself: the view at scale 1."""
        assert image.shape == self._normalized.shape
        return self.view(1.0, (False,), affinity)

    def view(self, scale: float, flips: Sequence[bool], affinity: bool) -> NetworkOutput:
        """As `ViewScore.view`; class scores are those of `text` where it is set."""
        found = [self._score(scale, flip, affinity) for flip in flips]
        if len(found) == 1:
            return found[0]
        return NetworkOutput(
            torch.cat([each.image_logits for each in found]), torch.cat([each.class_scores for each in found])
        )

    def _score(self, scale: float, flip: bool, affinity: bool) -> NetworkOutput:
        key = (scale, flip, affinity, self.text)
        if key not in self._scored:
            encoded = self._encode(scale, flip)
            encoded = encoded if affinity else replace(encoded, attention=None)
            with autocast(self._normalized.device, self._precision):
                found = self.network.classify(encoded, text=self.text)
            self._scored = {kept: value for kept, value in self._scored.items() if kept[-1] in (None, self.text)}
            self._scored[key] = found
        return self._scored[key]

    def _encode(self, scale: float, flip: bool) -> BackboneOutput:
        if (scale, flip) not in self._encoded:
            view = scale_view(self._normalized, scale)
            view = view.flip(-1) if flip else view
            backbone = self.network.backbone
            watched = scale == self._watched and not flip
            modules = [layer.module for layer in backbone.attention_layers()] if watched else []
            with autocast(view.device, self._precision), watch(modules, backbone.num_prefix_tokens) as taken:
                encoded: BackboneOutput = backbone(view, attention=not flip)
            if watched:
                self.attention = [RawAttention(each.query.half(), each.key.half()) for each in taken]
                self.size = (view.shape[2], view.shape[3])
            self._encoded[scale, flip] = replace(encoded, features=encoded.features[-1:])
        return self._encoded[scale, flip]


class EncodedImage:
    """An image and all that its pixels alone decide: encoder passes for the CAMs, logits of the segmentation.

    Args:
        network: In eval mode; its parameters say the device.
        config: Of its run: sizes, scales and protocol of the passes.
        pixels: (H, W, 3) uint8 RGB.
        tags: (C,) above 0 where present; None takes the classes that the network finds.
        truth: (H, W) mask; None where there is none.

    Raises:
        AfaError: It is so narrow that the network would see more than `_LONGEST` pixels in a row.
    """

    def __init__(
        self,
        network: AfaNetwork,
        config: Config,
        pixels: Pixels,
        tags: NDArray[np.float32] | None = None,
        truth: Pixels | None = None,
    ) -> None:
        self.size = pixels.shape[:2]
        shrink = min(1.0, MAX_SIDE / max(self.size))
        self.shrunk = shrink < 1
        if self.shrunk:
            height, width = (max(1, round(side * shrink)) for side in self.size)
            pixels = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
        sizes = (*view_sizes(pixels.shape[:2], config), *pseudo_sizes(pixels.shape[:2], config))
        if max(map(max, sizes)) > _LONGEST:
            height, width = self.size
            raise AfaError(f"the picture of {width} x {height} pixels is too narrow for the network; cut it in parts")
        self.pixels = pixels
        self.truth = truth
        self.image = pseudo_view(image_tensor(pixels, device=next(network.parameters()).device), config)
        self.largest = max(config.pseudo.scales)
        self.views = KeptViews(network, self.image, config.train.precision, self.largest)
        plain = replace(config, evaluation=config.evaluation.with_crf(False))
        (self.maps,) = logit_maps(network, [pixels], plain)
        self.tags = self._found() if tags is None else tags
        with torch.inference_mode():
            for scale in config.pseudo.scales:  # now, so that no slider waits for them
                self.views.view(scale, (False, True) if config.pseudo.mirror else (False,), False)
            self.views.view(self.largest, (False,), True)
            if config.pseudo.propagated_scale == "one":
                self.views.view(1.0, (False,), True)

    def _found(self) -> NDArray[np.float32]:
        """(C,) classes that the network finds in the image: those of positive logits, at least the likeliest."""
        logits = self.maps.image.float().cpu().numpy()
        found: NDArray[np.float32] = ((logits > 0) | (logits == logits.max())).astype(np.float32)
        return found

    @cached_property
    def attention(self) -> NetworkOutput:
        """The unflipped pass at the largest scale, with the affinity."""
        with torch.inference_mode():
            return self.views.view(self.largest, (False,), True)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) tokens of that pass."""
        height, width = self.attention.class_scores.shape[2:]
        return height, width


@dataclass(frozen=True)
class Stages:
    """What the method makes of an image, in its order.

    Attributes:
        cam: (T, H', W') in [0, 1], CAMs of the T tagged classes.
        propagated: (T, H', W') their shares after the random walk; None without a walk.
        cam_label: (H', W') label of the CAM alone, at `pseudo.background_cam`.
        propagated_label: The same after the walk; None without one.
        pseudo: (H', W') what the segmentation would learn from: 0..C, and 255 where it is left open.
        prediction: (H, W) classes of the segmentation, at the size of the pixels; None under other words.
        certainty: (H, W) softmax of the predicted class; None likewise.
    """

    cam: Tensor
    propagated: Tensor | None
    cam_label: Tensor
    propagated_label: Tensor | None
    pseudo: Tensor
    prediction: Tensor | None
    certainty: Tensor | None


@torch.inference_mode()
def make_stages(
    seen: EncodedImage,
    config: Config,
    tags: NDArray[np.float32],
    *,
    told: bool = False,
    text: TextClassifier | None = None,
) -> Stages:
    """Make everything that settings and tags decide, without a pass of the encoder.

    Args:
        seen: The image.
        config: Its `pseudo` section, `pseudo.crf` for the pseudo label, and the CRF of `evaluation`.
        tags: (C,) above 0 where present; with `text`, of its words.
        told: Rule out classes that are no tag in the prediction, too.
        text: Other words to look for; the segmentation does not know them.
    """
    views, walks = seen.views, config.pseudo.propagation != "none"
    views.text = text
    present = torch.from_numpy(tags).to(seen.image.device)[None]  # (1, C)
    score = partial(infer_pseudo, views, seen.image, present, config=config.pseudo)
    want = ("cam", "cam_label", *(("propagated", "propagated_label") if walks else ()))
    finish = partial(crf, config=config.evaluation) if config.pseudo.crf else None
    made = score(want=want) | score(want=("refined_label",), crf=finish)
    made = {key: value[0] for key, value in made.items()}
    if not tags.any():  # nothing competes with the background
        made |= {key: torch.zeros_like(value) for key, value in made.items() if key.endswith("label")}
    views.text = None
    chosen = present[0] > 0
    propagated = class_shares(made["propagated"])[chosen] if walks else None
    prediction = certainty = None
    if text is None:
        scores = _prediction_scores(seen, config, tags if told else None)
        certainty, prediction = scores.max(0)
    return Stages(
        cam=made["cam"][chosen],
        propagated=propagated,
        cam_label=made["cam_label"],
        propagated_label=made.get("propagated_label"),
        pseudo=made["refined_label"],
        prediction=prediction,
        certainty=certainty,
    )


def _prediction_scores(seen: EncodedImage, config: Config, tags: NDArray[np.float32] | None) -> Tensor:
    """(1 + C, H, W) softmax at the size of the pixels."""
    allowed = None if tags is None else np.array([True, *(tags > 0)])
    maps: LogitMaps = seen.maps.allow(allowed)
    if config.evaluation.crf:
        (maps,) = through_crf([maps], [seen.pixels], config=config.evaluation)
        maps = maps.allow(allowed)
    return maps.scores((seen.pixels.shape[0], seen.pixels.shape[1]))


@dataclass(frozen=True)
class Look:
    """What one token of an image looks at.

    Attributes:
        row: Its place in the grid of the affinity.
        column: Likewise.
        attention: (heads, h, w) attention of each block, which sums to 1; grids of keys differ where an encoder reduces
            them.
        affinity: (h, w) learned affinity, in (0, 1).
    """

    row: int
    column: int
    attention: tuple[Tensor, ...]
    affinity: Tensor

    def attention_map(self, block: int = 0, head: int = 0) -> Tensor:
        """(h, w) attention of a block and head, from 1; 0 is the mean over the heads, or over all blocks and heads."""
        if block:
            heads = self.attention[block - 1]
            return heads[head - 1] if head else heads.mean(0)
        size = max((each.shape[1:] for each in self.attention), key=torch.Size.numel)
        means = [each.mean(0)[None, None] for each in self.attention]
        shares = [interpolate(each, size=size, mode="bilinear")[0, 0] for each in means]
        return torch.stack([each / each.sum() for each in shares]).mean(0)


def _token(x: float, y: float, grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the token at a point."""
    row, column = (min(side - 1, max(0, int(at * side))) for at, side in zip((y, x), grid, strict=True))
    return row, column


@torch.inference_mode()
def look_from(seen: EncodedImage, x: float, y: float) -> Look:
    """Read attention and affinity from a point of an image, as the paper's Figures 1 and 4 show them.

    Args:
        seen: The image.
        x: Place from the left, 0 to 1.
        y: Place from the top, 0 to 1.
    """
    grid, layers = seen.grid, seen.views.network.backbone.attention_layers()
    row, column = _token(x, y, grid)
    affinity = seen.attention.affinity
    assert affinity is not None
    size, attention = seen.views.size, []
    for layer, block in zip(layers, seen.views.attention, strict=True):
        queries = layer.query_grid(*size)
        at, across = _token(x, y, queries)
        query, key = block.query[0, :, at * queries[1] + across].float(), block.key[0].float()  # (n, d), (n, h w, d)
        logits = (key @ query[:, :, None])[:, :, 0] * query.shape[1] ** -0.5  # (n, h w)
        attention.append(logits.softmax(-1).unflatten(1, layer.key_grid(*size)))
    return Look(row, column, tuple(attention), affinity[0, row * grid[1] + column].float().view(grid))


def at_size(label: Tensor, size: Sequence[int]) -> Pixels:
    """Resize a label by nearest neighbor: (H1, W1) -> (H, W) uint8, `size` being (height, width)."""
    resized = interpolate(label[None, None].float(), size=tuple(size), mode="nearest-exact")[0, 0]
    found: Pixels = resized.to(torch.uint8).cpu().numpy()
    return found
