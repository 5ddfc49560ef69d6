"""Chooses settings for a data set of which only the folder is given: encoder, schedule and scores. Says why.

What a user states wins over what is chosen here. The training itself is up to `afa.api`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import huggingface_hub
import torch

from afa.config import Config, load_config
from afa.data.open import DataSet
from afa.errors import AfaError
from afa.model.families import TOKEN_SIZES, MitSize
from afa.model.registry import BACKBONES, BackboneSpec, backbone_of
from afa.runtime import resolve_precision

BACKBONE: Final = "clip_b16"
"""Default encoder: its weights are free to use, and its text encoder knows what class names mean."""

FROZEN_EPOCHS: Final = 8
"""How often each image is seen with a frozen encoder, as long as steps and time stay within their limits."""

DEFAULT_MINUTES: Final = 60.0
"""What a training with a frozen encoder may take if the user does not say."""

EPOCHS: Final = 40
"""How often each image is seen, as long as the number of steps stays within its limits."""

MIN_STEPS: Final = 300
"""Fewest steps: with fewer, the phases have no time to follow each other."""

_FROZEN_MAX_STEPS: Final = 800
_LEAST_IMAGES, _LEAST_OF_CLASS = 500, 50
"""Fewest images that a plan is cut to, in all and for each class; the smaller sizes come after that."""
_FROZEN_SIDES: Final = (384, 320, 256, 224)
"""Longer sides of the images, the largest that the time allows first."""

_MAX_STEPS: Final = {"cpu": 1_000, "mps": 1_000, "cuda": 2_000}
_SCRATCH_STEPS: Final = 1_300
_SCRATCH_SIDE: Final = 128
# Shares of the steps: warm-up, classification alone, until the refined label.
_PHASES: Final = {"warmup_steps": 0.1, "cls_steps": 0.2, "refined_steps": 0.45}
_HUB_SECONDS: Final = 5.0

# Where nobody asks for the paper's figures, what the published code does differently by chance (docs/differences.md).
_PLAIN: Final[dict[str, Any]] = {
    "model.decoder_init": "uniform",
    "pseudo.propagated_scale": "largest",
    "pseudo.par_image": "exact",
    "loss.reduction": "batch",
    "evaluation.multiscale_rule": "direct",
}
# Plain vision transformers: attention sharp enough to saturate the affinity unless it is scaled; CAMs at one scale. The
# first half of the blocks stays frozen: with all of them trained every token learns what the image shows, and the
# CAMs cover all of it (docs/lab/2026-11.md).
_TOKENS: Final[dict[str, Any]] = {
    "model.drop_path": 0.0,
    "model.attention_scaling": True,
    "pseudo.scales": (1.0,),
    "loss.energy_weight": 0.0,
    "schedule.learning_rate": 4e-5,
    "schedule.freeze_norms": False,
}


@dataclass(frozen=True)
class Pace:
    """What this machine needs with a frozen encoder.

    Attributes:
        image: Seconds for one image through the encoder.
        step: Seconds for one training step from the feature cache.
    """

    image: float
    step: float


PaceFunction = Callable[[Config, int, torch.device], Pace]
"""(settings, number of classes, device) -> a measurement."""


def choose_defaults(
    layout: DataSet,
    device: torch.device,
    overrides: Mapping[str, Any] | None = None,
    *,
    minutes: float | None = None,
    measure: PaceFunction | None = None,
    need_weights: bool = True,
) -> tuple[Config, tuple[str, str, str, str]]:
    """Choose settings by data and device.

    Args:
        layout: The data set.
        device: Where to train.
        overrides: Dotted keys that the user states, those that the layout was found with among them; they win.
        minutes: What everything may take with a frozen encoder, scoring included; None: `DEFAULT_MINUTES` on a CPU.
        measure: Measures this machine; None: nothing is measured, and the time is not told.
        need_weights: Make sure that the encoder's weights can be had.

    Returns:
        The configuration, and four lines that say what was chosen and why: data, encoder, schedule, scores.

    Raises:
        AfaError: The weights are neither in the local cache nor can the hub be reached; no image to train on; a key
            is unknown or its value out of range; `minutes` for an encoder that is not frozen.
    """
    stated = dict(overrides or {})
    chosen = _choose_encoder(stated, need_weights=need_weights)
    if _stays_frozen(chosen, stated):
        return _choose_frozen(layout, device, chosen, stated, minutes, measure)
    if minutes is not None:
        raise AfaError(
            f"--minutes is {minutes:g}, but the time of training {chosen['model.backbone']} is not known before; use "
            "clip_b16, or --schedule.max_steps"
        )
    spec = BACKBONES.get(chosen["model.backbone"])
    scratch = not chosen["model.weights"] or spec is None
    num_images = len(layout.train())
    preset = "demo" if scratch else "paper"
    if scratch:
        chosen |= {"augment.short_side": _SCRATCH_SIDE, "evaluation.short_side": _SCRATCH_SIDE, "data.workers": -1}
    else:
        assert spec is not None
        chosen |= _PLAIN | _crop(spec, device) | {"train.precision": resolve_precision(device, "auto")}
        chosen |= {"train.eval_steps": 0, "train.save_steps": 200 if device.type == "cpu" else 500}
    batch_size = load_config(None, chosen | stated, preset=preset).schedule.batch_size
    most = _SCRATCH_STEPS if scratch else _MAX_STEPS[device.type]
    chosen["schedule.max_steps"] = min(most, max(MIN_STEPS, round(EPOCHS * num_images / batch_size)))
    steps = load_config(None, chosen | stated, preset=preset).schedule.max_steps
    chosen |= {f"schedule.{key}": round(share * steps) for key, share in _PHASES.items()}
    config = load_config(None, chosen | stated, preset=preset)
    return config, (
        f"data: {layout.describe()}",
        f"encoder: {_encoder_words(config, device)}; for others --model.weights FOLDER or HUB_ID",
        f"schedule: {_schedule_words(config, device, num_images, most)}; for more --schedule.max_steps N",
        f"scores: {_score_words(config, layout)}",
    )


def can_fetch(hub_id: str) -> bool:
    """Whether weights are in the local cache, or the hub answers for them."""
    if isinstance(huggingface_hub.try_to_load_from_cache(hub_id, "config.json"), str):
        return True
    try:
        huggingface_hub.get_hf_file_metadata(
            huggingface_hub.hf_hub_url(hub_id, "config.json"), timeout=_HUB_SECONDS, token=False
        )
    except Exception:  # any failure on the way to the hub
        return False
    return True


def _choose_encoder(stated: Mapping[str, Any], *, need_weights: bool) -> dict[str, Any]:
    """`model.backbone` and `model.weights`; if one of them is stated, it decides the other."""
    weights, backbone = stated.get("model.weights"), stated.get("model.backbone")
    if weights is not None:
        found = backbone or (backbone_of(weights) or BACKBONE if weights else "mit_tiny")
        return {"model.backbone": found, "model.weights": weights}
    backbone = backbone or BACKBONE
    spec = BACKBONES.get(backbone)
    if spec is None or not spec.weights:
        return {"model.backbone": backbone, "model.weights": ""}
    if need_weights and not can_fetch(spec.weights):
        raise AfaError(
            f"{spec.weights}: neither in the local cache nor can the Hugging Face hub be reached; download it "
            "elsewhere and pass --model.weights FOLDER (--model.weights '' trains from random weights, with far worse "
            "masks)"
        )
    return {"model.backbone": backbone, "model.weights": spec.weights}


def _stays_frozen(chosen: Mapping[str, Any], stated: Mapping[str, Any]) -> bool:
    """Whether class names and a frozen encoder give the CAM: unless the user says that something else learns."""
    size = TOKEN_SIZES.get(chosen["model.backbone"])
    learns = stated.get("model.classifier", "text") != "text" or "model.freeze_blocks" in stated
    return size is not None and size.language > 0 and bool(chosen["model.weights"]) and not learns


def _choose_frozen(
    layout: DataSet,
    device: torch.device,
    chosen: dict[str, Any],
    stated: dict[str, Any],
    minutes: float | None,
    measure: PaceFunction | None,
) -> tuple[Config, tuple[str, str, str, str]]:
    """Size and steps by what the machine does in the time."""
    images, preset = layout.train(), "frozen"
    num_images, tagged = len(images), 1 - float(images.negative.mean()) or 1.0  # share of those with a class
    chosen["model.freeze_blocks"] = TOKEN_SIZES[chosen["model.backbone"]].depth
    base = load_config(None, chosen | stated, preset=preset)
    batch_size = base.schedule.batch_size
    tried = min(_FROZEN_MAX_STEPS, max(MIN_STEPS, round(FROZEN_EPOCHS * num_images / batch_size)))
    most = base.schedule.max_steps if "schedule.max_steps" in stated else tried
    num_scored = 0
    if base.data.val_list and layout.has_validation:
        num_scored = len(layout.validation())
    limit = minutes if minutes is not None else DEFAULT_MINUTES if device.type == "cpu" else None
    words = ""
    sides: tuple[int, ...] = _FROZEN_SIDES
    if "augment.crop_size" in stated:
        sides = (base.augment.crop_size,)
    side, steps, taken = sides[0], most, min(num_images, most * batch_size)
    if base.train.max_images:
        taken = min(taken, math.ceil(base.train.max_images / tagged))
    if measure is not None:
        pace = measure(load_config(None, chosen | stated | {"augment.crop_size": side}, preset=preset),
                       len(layout.classes), device)  # fmt: skip
        largest = _Plan(side, most, taken, pace.image / 60, pace.step / 60, num_scored * pace.image / 60)
        plans = [largest.at(each) for each in sides]
        if limit is not None:
            fewest = max(_LEAST_IMAGES, _LEAST_OF_CLASS * len(layout.classes))
            least = taken if "train.max_images" in stated else fewest
            plans = [each.within(limit, least_steps=MIN_STEPS, least_images=least) for each in plans]
        plan = next((each for each in plans if each.fits), plans[-1])
        words = plan.describe(limit, replace(largest, steps=max(most, tried)))
        side, steps = plan.side, plan.steps
        if plan.images < taken:
            chosen["train.max_images"], taken = max(1, math.floor(plan.images * tagged)), plan.images
    short = round(side * 0.75)
    chosen |= {"augment.crop_size": side, "augment.short_side": short, "evaluation.short_side": short}
    phases = {"refined_steps": round(steps / 3), "warmup_steps": min(base.schedule.warmup_steps, round(steps / 10))}
    chosen |= {"schedule.max_steps": steps} | {f"schedule.{key}": value for key, value in phases.items()}
    config = load_config(None, chosen | stated, preset=preset)
    schedule = config.schedule
    which = f"{taken:,} of {num_images:,}" if config.train.max_images else f"{num_images:,}"
    epochs = schedule.max_steps * schedule.batch_size / (taken if config.train.max_images else num_images)
    return config, (
        f"data: {layout.describe()}",
        f"encoder: {_encoder_words(config, device)}; for others --model.weights FOLDER or HUB_ID",
        f"schedule: {schedule.max_steps:,} steps of {schedule.batch_size} images of {config.augment.crop_size} pixels, "
        f"{epochs:.3g} epochs of {which} images{words}",
        f"scores: {_score_words(config, layout)}",
    )


@dataclass(frozen=True)
class _Plan:
    """Size and steps, and what they take in minutes."""

    side: int
    steps: int
    images: int
    image: float
    step: float
    scoring: float
    fits: bool = True

    @property
    def minutes(self) -> float:
        return self.images * self.image + self.steps * self.step + self.scoring

    def at(self, side: int) -> _Plan:
        """The same at another size: the work grows with the area."""
        area = (side / self.side) ** 2
        return replace(self, side=side, image=area * self.image, step=area * self.step, scoring=area * self.scoring)

    def within(self, limit: float, *, least_steps: int, least_images: int) -> _Plan:
        """What fits into the time: rather fewer images than fewer steps, which the result needs more."""
        over = self.minutes - limit
        images = min(self.images, max(least_images, self.images - math.ceil(over / self.image)))
        over -= (self.images - images) * self.image
        steps = self.steps - max(0, math.ceil(over / self.step))
        least_steps = min(least_steps, self.steps)
        return replace(self, images=images, steps=max(least_steps, steps), fits=steps >= least_steps)

    def describe(self, limit: float | None, full: _Plan) -> str:
        """What it takes, and what the time for the full plan would buy."""
        spans = (
            (self.images * self.image, "the features"),
            (self.steps * self.step, "training"),
            (self.scoring, "scoring"),
        )
        parts = ", ".join(
            f"{minutes:.0f} for {what}" if minutes >= 1 else f"under 1 for {what}" for minutes, what in spans
        )
        words = f"; about {max(1, self.minutes):.0f} min here: {parts}"
        if not self.fits:
            return f"{words}; that is more than {limit:g} min: fewer images or --augment.crop_size would shorten it"
        more = [f"{full.images:,} images"] if full.images > self.images else []
        more += [f"{full.side} pixels"] if full.side > self.side else []
        more += [f"{full.steps:,} steps"] if full.steps > self.steps else []
        if not more:
            return f"{words}; more time would buy nothing that was tried"
        return f"{words}; --minutes {math.ceil(full.minutes)} would buy {' and '.join(more)}"


def _crop(spec: BackboneSpec, device: torch.device) -> dict[str, Any]:
    """Crops with as many tokens as the device can learn from in reasonable time, and the settings that go with them."""
    size, on_gpu = spec.size, device.type == "cuda"
    stride = 16 if isinstance(size, MitSize) else size.patch
    tokens = (32 if on_gpu else 24) if stride <= 16 else (16 if on_gpu else 12)
    keys: dict[str, Any] = {
        "augment.crop_size": tokens * stride,
        "augment.short_side": tokens * stride,
        "augment.scale_min": 0.7,
        "augment.scale_max": 1.5,
        "evaluation.short_side": tokens * stride,
        "model.affinity_init": "calibrated",
        "pseudo.affinity_radius": tokens // 5,
        "schedule.batch_size": 8,
    }
    if isinstance(size, MitSize):
        return keys
    return keys | _TOKENS | {"model.freeze_blocks": size.depth // 2}


def _encoder_words(config: Config, device: torch.device) -> str:
    model = config.model
    if not model.weights:
        return f"{model.backbone} from random weights, as model.weights is empty: expect coarse masks"
    spec = BACKBONES[model.backbone]
    license = f" ({spec.license})" if model.weights == spec.weights else ""
    words = f"{model.backbone} from {model.weights}{license}"
    if model.classifier == "text":
        origin = model.text_embeddings or "its text encoder"
        if model.second_backbone:
            words += f" beside {model.second_backbone}"
        return f"{words}, frozen; the class names, by {origin}, tell it what to look for"
    if model.freeze_blocks:
        return f"{words}, its first {model.freeze_blocks} blocks frozen, which keeps the class maps on the objects"
    return f"{words}, trained as a whole on {device.type}"


def _schedule_words(config: Config, device: torch.device, num_images: int, most: int) -> str:
    schedule = config.schedule
    epochs = schedule.max_steps * schedule.batch_size / num_images
    words = f"{schedule.max_steps:,} steps of {schedule.batch_size} crops of {config.augment.crop_size} pixels"
    limits = f"{EPOCHS} are the aim, {MIN_STEPS} to {most:,} steps the limits on {device.type}"
    return f"{words} in {config.train.precision}: {epochs:.3g} epochs of {num_images:,} images ({limits})"


def _score_words(config: Config, layout: DataSet) -> str:
    if not config.data.val_list or not layout.has_validation:
        return "none, there are no images for validation"
    if layout.has_masks:
        return "mIoU of the images for validation that have masks"
    return "F1 of the tags of the images for validation; without masks (docs/data.md) nothing tells the mIoU"
