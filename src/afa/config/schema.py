"""Every knob of afa, typed: a preset, then a TOML file, then flags, give one frozen `Config`.

A default is the `paper` preset on PASCAL VOC: what the published code does (docs/differences.md lists where
that departs from the paper). Each field states its unit, range and source. Unknown keys, wrong types and values
out of range are errors that name the key, the value and what is allowed. This module reads TOML and
nothing else; what the values mean is up to the modules that take them.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from afa.errors import AfaError

Pooling = Literal["gmp", "gap", "topk"]
Refinement = Literal["par", "par_color", "pamr", "crf", "none"]
Propagation = Literal["affinity", "attention", "none"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Supervision = Literal["tags", "masks"]
SUPERVISION_NAMES: Final[dict[Supervision, str]] = {
    "tags": "weakly supervised (image tags)",
    "masks": "fully supervised (masks)",
}
"""The words for a run's supervision wherever its results are shown."""
LayoutName = Literal["auto", "voc", "table", "imagefolder", "hf", "coco", "labelstudio", "cvat"]


def _knob(default: Any, *, low: float | None = None, high: float | None = None) -> Any:
    """Declare a field with an inclusive range that `Config` checks (for tuples: of each element)."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class DataConfig:
    """Where images, tags and lists lie. Paths are relative to `root` unless absolute."""

    root: str = ""
    """Folder of the data set. Required by train and evaluate."""
    image_dir: str = "JPEGImages"
    """Folder of the images, found by name with any common suffix."""
    mask_dir: str = "SegmentationClassAug"
    """Folder of the index-PNG masks; read by evaluation only, may be absent."""
    train_list: str = "lists/train.txt"
    """Text file, one image name a line."""
    val_list: str = "lists/val.txt"
    """Text file, one image name a line: images that evaluation scores. Empty: no evaluation."""
    tags: str = ""
    """Tags: CSV `image,tags`, `.npy` dictionary of one-hot vectors, or a folder of VOC XML. Empty: the first
    of lists/tags.csv, tags.csv, lists/cls_labels_onehot.npy, cls_labels_onehot.npy, Annotations/ that exists."""
    classes: tuple[str, ...] = ()
    """Names of the C foreground classes in index order (mask value = position + 1). Empty: classes.txt of
    the root when there is one, else the 20 classes of VOC."""
    class_subset: tuple[str, ...] = ()
    """Train and evaluate on these classes only: other tags are dropped, other classes' pixels are ignored (255),
    and images left without a tag are an error. Empty: all classes."""
    layout: LayoutName = "auto"
    """How images and tags lie in `root` (docs/data.md): auto finds out and says it."""
    split_fraction: float = _knob(0.2, low=0.0, high=0.9)
    """Share of the images set aside for validation where the data states no split; the VOC layout always does."""
    split_seed: int = _knob(0, low=0, high=2**31 - 1)
    """Seed of that split: the same images, tags and seed give the same sides."""
    workers: int = _knob(-1, low=-1, high=256)
    """Threads that decode images; 0 works in the training thread, -1 picks by cores."""
    cache_gib: float = _knob(-1.0, low=-1.0, high=1e6)
    """Memory for decoded images, GiB over all processes of a machine: those that fit are decoded once. -1 takes up to
    a quarter of what is free at the start (Linux; elsewhere none), 0 decodes each time. Results are the same."""

    feature_dir: str = ""
    """Folder of the feature cache, on a fast disk; runs may share it. Empty: the folder `features` of the run."""


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation. Source: paper section 4.1."""

    crop_size: int = _knob(512, low=32, high=4096)
    """Side of the square crop, pixels; best a multiple of the encoder's stride: 32 for MiT, its patch for others."""
    scale_min: float = _knob(0.5, low=0.05, high=10.0)
    """Smallest random rescaling factor."""
    scale_max: float = _knob(2.0, low=0.05, high=10.0)
    """Largest random rescaling factor."""
    flip_probability: float = _knob(0.5, low=0.0, high=1.0)
    """Probability of a horizontal flip."""
    short_side: int = _knob(0, low=0, high=4096)
    """Images are first scaled so that their shorter side has this many pixels; 0 keeps the native size
    (the reference)."""
    whole_images: bool = False
    """No random scale and place: each image as a whole, as large as fits into the crop, in its middle. It is still
    flipped at random."""


@dataclass(frozen=True)
class ModelConfig:
    """The network. Source: paper sections 3.1, 3.3 and 4.1."""

    backbone: str = "mit_b1"
    """Architecture: mit_b0 .. mit_b5, dinov2_small_reg, clip_b16, ... (docs/backbones.md), or a tiny one for
    generated data: mit_tiny (0.7 M parameters), dinov2_tiny."""
    weights: str = "nvidia/mit-b1"
    """Initial encoder weights: a local folder, a hub id, an original SegFormer `mit_b*.pth`, or empty for
    random ones. nvidia/mit-b* are under NVIDIA's non-commercial license."""
    drop_path: float = _knob(0.1, low=0.0, high=0.9)
    """Stochastic depth of the last block; linear over depth."""
    pooling: Pooling = "gmp"
    """Global pooling of the classifier: gmp = maximum, gap = mean, topk = mean of the largest values (Table 1)."""
    pooling_percent: float = _knob(25.0, low=0.0, high=100.0)
    """Share of the positions that `topk` averages, percent; at least one position."""
    decoder_width: int = _knob(256, low=8, high=4096)
    """Channels of the all-MLP decoder."""
    decoder_dropout: float = _knob(0.1, low=0.0, high=0.9)
    """Dropout before the decoder's last layer."""
    affinity_blocks: int = _knob(2, low=1, high=64)
    """How many of the last blocks give their attention to the affinity head."""
    freeze_blocks: int = _knob(0, low=0, high=64)
    """The encoder's embedding and its first blocks up to this number keep their initial weights."""
    feature_levels: int = _knob(4, low=1, high=24)
    """Feature maps of a plain vision transformer that the decoder sees, of evenly spaced blocks; MiT has 4."""
    attention_scaling: bool = False
    """Divide Q K^T by sqrt(d) before the affinity head (paper, Eq. 1); the reference does not."""


@dataclass(frozen=True)
class PseudoConfig:
    """From class scores to pseudo labels. Source: paper sections 3.2 to 3.4."""

    scales: tuple[float, ...] = _knob((1.0, 0.5, 1.5), low=0.1, high=4.0)
    """Input scales of the multi-scale CAM, each with its horizontal flip."""
    reuse_training_pass: bool = True
    """Take the scale-1, unflipped scores from the training forward instead of a pass of their own. That
    forward has stochastic depth on, as the reference's own passes have."""
    background_low: float = _knob(0.35, low=0.0, high=1.0)
    """beta_l: background score of the label that claims foreground easily (Eq. 4)."""
    background_high: float = _knob(0.55, low=0.0, high=1.0)
    """beta_h: background score of the label that claims foreground cautiously (Eq. 4)."""
    background_cam: float = _knob(0.45, low=0.0, high=1.0)
    """Background score when CAMs are scored as labels."""
    background_propagated: float = _knob(0.35, low=0.0, high=1.0)
    """Background score when propagated CAMs are scored as labels."""
    label_rule: Literal["two_pass", "threshold"] = "two_pass"
    """How two background scores become one label: two_pass = softmax, refine and argmax once for each, then
    merge (reference); threshold = refine the CAM, then Eq. 4 as printed (paper)."""
    refinement: Refinement = "par"
    """Low-level refinement: par, par_color (no position term), pamr, none (Table 4), or crf: the dense CRF with the
    published settings, many times slower."""
    refinement_region: Literal["reference", "canvas"] = "reference"
    """Where refinement looks: reference = the initial label on the whole canvas, the refined label inside
    the valid box; canvas = both on the whole canvas, so that one kernel serves every crop."""
    refinement_stride: int = _knob(2, low=1, high=8)
    """Labels are refined at 1/stride of the image size."""
    dilations: tuple[int, ...] = _knob((1, 2, 4, 8, 12, 24), low=1, high=256)
    """Dilations of the 8 neighbors, pixels."""
    iterations: int = _knob(10, low=0, high=1000)
    """Refinement iterations (COCO: 15)."""
    rgb_bandwidth: float = _knob(0.3, low=1e-6, high=1e3)
    """w1 of Eq. 8."""
    pos_bandwidth: float = _knob(0.3, low=1e-6, high=1e3)
    """w2 of Eq. 8."""
    pos_weight: float = _knob(0.01, low=0.0, high=1e3)
    """w3 of Eq. 9."""
    affinity_radius: int = _knob(8, low=1, high=1024)
    """Pairs farther apart than this Chebyshev distance, in tokens, carry no affinity."""
    affinity_power: float = _knob(2.0, low=0.0, high=64.0)
    """alpha of Eq. 6."""
    walk_epsilon: float = _knob(0.1, low=0.0, high=1e3)
    """Added to the degree that normalizes the transition matrix; the paper has 0, the reference 0.1."""
    propagation: Propagation = "affinity"
    """What the random walk walks on: the learned affinity, the mean attention of the last blocks, or none: no
    walk (Table 3)."""
    softmax_scores: bool = True
    """Softmax over background and present classes before refinement and walk (reference); off: the
    scores as they are (paper)."""
    crf: bool = False
    """Pseudo labels that are written or scored also go through the dense CRF of `evaluation.crf_*`, after the
    refinement. Training never does."""


@dataclass(frozen=True)
class LossConfig:
    """Weights and forms of the losses. Source: paper Eq. 5, 11, 12."""

    segmentation_weight: float = _knob(0.1, low=0.0, high=1e3)
    """lambda_1 of Eq. 12."""
    affinity_weight: float = _knob(0.1, low=0.0, high=1e3)
    """lambda_2 of Eq. 12. 0 switches the affinity learning off (Tables 2 and 3, w/o AFA)."""
    energy_weight: float = _knob(0.01, low=0.0, high=1e3)
    """lambda_3 of Eq. 12: weight of the dense energy loss. 0 leaves it out, as the released code does."""
    segmentation_form: Literal["balanced", "plain"] = "balanced"
    """balanced = half background pixels, half foreground pixels (reference); plain = one mean over all
    labelled pixels (paper)."""
    affinity_form: Literal["balanced", "paper"] = "balanced"
    """balanced = halves, each over count + 1 (reference); paper = sums over the bare counts, no halves."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Optimizer and phases. Source: paper section 4.1. Steps are counted from 0."""

    max_steps: int = _knob(20_000, low=1)
    """Training steps."""
    batch_size: int = _knob(8, low=1)
    """Images per step, over all processes."""
    cls_steps: int = _knob(2_000, low=0)
    """Steps that learn the classification alone (COCO: 5,000)."""
    refined_steps: int = _knob(6_000, low=0)
    """Steps after which the segmentation learns from the refined label (COCO: 15,000)."""
    affinity_target: Literal["initial", "segmentation"] = "initial"
    """Label that supervises the affinity: always the initial label (VOC), or whatever label the segmentation learns
    from at that step (COCO)."""
    learning_rate: float = _knob(6e-5, low=0.0, high=10.0)
    """AdamW learning rate of the encoder after the warm-up."""
    head_lr_factor: float = _knob(10.0, low=0.0, high=1e4)
    """Learning rate of everything else, over the encoder's."""
    weight_decay: float = _knob(0.01, low=0.0, high=10.0)
    """AdamW weight decay."""
    betas: tuple[float, float] = _knob((0.9, 0.999), low=0.0, high=1.0)
    """AdamW betas."""
    warmup_steps: int = _knob(1_500, low=0)
    """Steps of linear warm-up."""
    warmup_ratio: float = _knob(1e-6, low=0.0, high=1.0)
    """Learning rate at step 0, over the full one."""
    poly_power: float = _knob(1.0, low=0.0, high=10.0)
    """Exponent of the polynomial decay."""
    poly_offset: bool = False
    """Count the decay from the end of the warm-up; the reference counts it from step 0."""
    freeze_norms: bool = True
    """Keep the encoder's norm layers at their initial values (reference). Off for training from scratch."""
    grad_clip: float = _knob(0.0, low=0.0, high=1e6)
    """Largest gradient norm; 0 clips nothing (the reference)."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How masks are scored. Source: docs/method.md, "Evaluation"."""

    protocol: Literal["single", "multiscale", "single+crf", "multiscale+crf"] = "single"
    """single = one pass at native size; multiscale = long side `long_side`, `scales` with flips, mean over
    flip, maximum over scales. +crf: their softmax goes through the dense CRF."""
    scales: tuple[float, ...] = _knob((1.0, 0.5, 0.75), low=0.1, high=4.0)
    """Scales of the multiscale protocol (0.5 to 1.5 by the authors' word; these by their script)."""
    long_side: int = _knob(512, low=32, high=8192)
    """Longer side of the image in the multiscale protocol, pixels."""
    batch_size: int = _knob(0, low=0, high=256)
    """Images of one size that go through the network together; larger ones than 512 x 512 fewer. 0 = automatic: 8 on
    a GPU, else 1."""
    short_side: int = _knob(0, low=0, high=4096)
    """Single scale and pseudo labels: images are scaled to this shorter side first, logits and labels are scaled
    back to the native size; 0 = native."""
    crf_iterations: int = _knob(10, low=0, high=1000)
    """Mean-field updates of the dense CRF."""
    crf_gaussian_weight: float = _knob(3.0, low=0.0, high=1e3)
    """Weight of its kernel of positions."""
    crf_gaussian_xy: float = _knob(3.0, low=0.1, high=1e4)
    """Bandwidth of that kernel, pixels."""
    crf_bilateral_weight: float = _knob(4.0, low=0.0, high=1e3)
    """Weight of its kernel of positions and colors."""
    crf_bilateral_xy: float = _knob(64.0, low=0.1, high=1e4)
    """Bandwidth of that kernel over positions, pixels."""
    crf_bilateral_rgb: float = _knob(5.0, low=0.1, high=1e3)
    """Bandwidth of that kernel over colors, levels of 0..255."""


@dataclass(frozen=True)
class TrainConfig:
    """How a run is carried out; nothing here belongs to the method."""

    seed: int = _knob(0, low=0, high=2**31 - 1)
    """Seed of everything random: the order, augmentation, initial weights, dropout."""
    supervision: Supervision = "tags"
    """tags = weak supervision, the method. masks = full supervision, for comparison (Table 5): the segmentation learns
    from the true masks of the training list, without pseudo labels; everything that shows results says so."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto = cuda, else mps, else cpu."""
    precision: Precision = "fp32"
    """Arithmetic of the network; pseudo labels and losses are always fp32. auto = bf16 where the device has fast bf16
    (GPUs since Ampere, CPUs with AVX-512 BF16 or AMX), else fp32."""
    log_steps: int = _knob(20, low=1)
    """Steps between two lines of metrics.jsonl."""
    eval_steps: int = _knob(2_000, low=0)
    """Steps between two evaluations of `eval_images` images; 0 = only at the end."""
    eval_images: int = _knob(100, low=1)
    """Images of an evaluation during training; the one at the end scores the whole list."""
    save_steps: int = _knob(500, low=1)
    """Steps between two checkpoints."""
    label: str = ""
    """What `afa report --compare` calls the run; empty: its folder's name. `tableN: ROW` names a row of the paper's
    tables (docs/reproduce.md), whose figures are shown beside the run's."""
    example_images: int = _knob(8, low=0, high=64)
    """Images shown in report.html."""
    cuda_graphs: bool = True
    """On one GPU, record each phase's step once and replay it, so that launching kernels never limits it. Off where
    the precision is fp16."""
    compile: bool = False
    """Let torch.compile fuse the network's kernels; takes a minute or more at the start of each phase."""
    feature_cache: bool = False
    """Run the frozen blocks once for each image, view and scale, keep their tokens on disk, and train from there.
    Needs `model.freeze_blocks`, and `augment.whole_images`, as random crops cannot be kept."""
    feature_cache_gib: float = _knob(20.0, low=0.0, high=1e6)
    """Most that the feature cache may take on disk, GiB."""
    tensorboard: bool = True
    """Also write TensorBoard events when the tensorboard package is installed."""


@dataclass(frozen=True)
class Config:
    """The whole configuration: one frozen dataclass per section."""

    preset: str = "paper"
    """Named starting values: paper (VOC, reference behavior), paper_coco, rrm (the baseline of Table 5), or demo
    (generated data, from scratch)."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pseudo: PseudoConfig = field(default_factory=PseudoConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {},
    "paper_coco": {
        "pseudo": {"iterations": 15},
        "schedule": {
            "max_steps": 80_000,
            "cls_steps": 5_000,
            "refined_steps": 15_000,
            "affinity_target": "segmentation",
        },
    },
    # Zhang et al. 2020 on the same parts: the CRF decides which pixels of the CAM are reliable, no affinity is learned.
    "rrm": {
        "pseudo": {"refinement": "crf", "propagation": "none", "softmax_scores": False},
        "loss": {"affinity_weight": 0.0},
    },
    "demo": {
        "data": {"workers": 0},
        "augment": {"crop_size": 96, "scale_min": 0.75, "scale_max": 1.25},
        "model": {
            "backbone": "mit_tiny",
            "weights": "",
            "drop_path": 0.0,
            "pooling": "topk",
            "pooling_percent": 10.0,
            "decoder_width": 64,
            "decoder_dropout": 0.0,
            "attention_scaling": True,
        },
        # Crops have 6 x 6 tokens and are refined at 48 x 48 pixels: walk and neighbors must stay near. On so few
        # tokens an epsilon in the degree lets the neighbors of an isolated token decide for it.
        "pseudo": {
            "background_low": 0.45,
            "affinity_radius": 1,
            "walk_epsilon": 0.0,
            "dilations": [1, 2, 4, 8],
        },
        "loss": {"segmentation_weight": 0.5, "energy_weight": 0.0},
        "schedule": {
            "max_steps": 1300,
            "batch_size": 16,
            "cls_steps": 300,
            "refined_steps": 1150,
            "learning_rate": 2e-3,
            "head_lr_factor": 1.0,
            "warmup_steps": 50,
            "freeze_norms": False,
        },
        "train": {"eval_steps": 0, "save_steps": 450},
    },
}
"""Values that a preset changes, by section. `paper` is the defaults themselves."""


def load_config(
    path: str | Path | None = None, overrides: Mapping[str, Any] | None = None, *, preset: str | None = None
) -> Config:
    """Build the configuration: preset, then TOML file, then overrides.

    Args:
        path: TOML file with `preset` and one table per section, or None.
        overrides: Dotted keys, such as `{"schedule.max_steps": 100}`; string values are parsed as the field's type.
        preset: Name that wins over the file's `preset`.

    Returns:
        The checked configuration.

    Raises:
        AfaError: The file is missing or not TOML; a key is unknown; a value has the wrong type or is out of range.
    """
    tree: dict[str, Any] = {}
    origin = "configuration"
    if path is not None:
        origin = str(path)
        try:
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise AfaError(f"{path}: no such configuration file; pass --config FILE.toml") from None
        except (OSError, UnicodeDecodeError) as error:
            raise AfaError(f"{path}: cannot be read as a configuration file ({error})") from None
        except tomllib.TOMLDecodeError as error:
            raise AfaError(f"{path}: not valid TOML: {error}") from None
    name = preset if preset is not None else tree.pop("preset", "paper")
    tree.pop("preset", None)
    if not isinstance(name, str) or name not in PRESETS:
        raise AfaError(f"{origin}: preset is {name!r}; use one of {', '.join(PRESETS)}")
    merged: dict[str, dict[str, Any]] = {section: dict(values) for section, values in PRESETS[name].items()}
    sections = _sections()
    for section, values in tree.items():
        if section not in sections:
            raise AfaError(f"{origin}: unknown section [{section}]; {_allowed(section, sections)}")
        if not isinstance(values, dict):
            raise AfaError(f"{origin}: {section} is {values!r}; write a table [{section}] with keys")
        merged.setdefault(section, {}).update(values)
    for key, value in (overrides or {}).items():
        section, _, name_in_section = key.partition(".")
        if section not in sections or not name_in_section:
            allowed = [f"{s}.{f.name}" for s, cls in sections.items() for f in dataclasses.fields(cls)]
            raise AfaError(f"unknown key {key}; {_allowed(key, allowed)}")
        merged.setdefault(section, {})[name_in_section] = value
    built = {
        section: _build_section(cls, merged.get(section, {}), section=section, origin=origin)
        for section, cls in sections.items()
    }
    config = Config(preset=name, **built)
    check_config(config)
    return config


def config_from_dict(tree: Mapping[str, Any], *, origin: str) -> Config:
    """Rebuild a configuration from what `config_to_dict` gave.

    Args:
        tree: Nested dictionary.
        origin: File it came from, for messages.

    Raises:
        AfaError: As `load_config`.
    """
    sections = _sections()
    unknown = set(tree) - set(sections) - {"preset"}
    if unknown:
        raise AfaError(f"{origin}: unknown section {min(unknown)!r}; {_allowed(min(unknown), sections)}")
    built = {
        section: _build_section(cls, tree.get(section, {}), section=section, origin=origin)
        for section, cls in sections.items()
    }
    config = Config(preset=str(tree.get("preset", "paper")), **built)
    check_config(config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionary of plain values (tuples become lists), ready for JSON."""
    result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return result


def config_to_toml(config: Config) -> str:
    """The resolved configuration as TOML that `load_config` reads back to an equal one."""
    lines = [f"preset = {_toml_value(config.preset)}"]
    for section, values in config_to_dict(config).items():
        if section == "preset":
            continue
        lines += ["", f"[{section}]"]
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def check_config(config: Config) -> None:
    """Check what single ranges cannot: relations between keys.

    Raises:
        AfaError: Two keys contradict each other; the message names both.
    """
    schedule, pseudo, augment = config.schedule, config.pseudo, config.augment
    if pseudo.background_low > pseudo.background_high:
        raise AfaError(
            f"pseudo.background_low is {pseudo.background_low}, above pseudo.background_high "
            f"({pseudo.background_high}); the low score must not exceed the high one"
        )
    if augment.scale_min > augment.scale_max:
        raise AfaError(
            f"augment.scale_min is {augment.scale_min}, above augment.scale_max ({augment.scale_max}); swap them"
        )
    if config.model.backbone.startswith("mit_") and augment.crop_size % 32:
        raise AfaError(f"augment.crop_size is {augment.crop_size}; use a multiple of 32")
    if schedule.refined_steps < schedule.cls_steps:
        raise AfaError(
            f"schedule.refined_steps is {schedule.refined_steps}, before schedule.cls_steps "
            f"({schedule.cls_steps}); phases must follow each other"
        )
    if pseudo.crf and pseudo.label_rule == "threshold":
        raise AfaError(
            "pseudo.crf is true and pseudo.label_rule is 'threshold', which has no probabilities; use two_pass"
        )
    lists = {
        "pseudo.scales": pseudo.scales,
        "pseudo.dilations": pseudo.dilations,
        "evaluation.scales": config.evaluation.scales,
    }
    for key, values in lists.items():
        if not values:
            raise AfaError(f"{key} is empty; give at least one value")
    if pseudo.reuse_training_pass and 1.0 not in pseudo.scales:
        raise AfaError(
            f"pseudo.reuse_training_pass is true, yet pseudo.scales {pseudo.scales} has no 1.0 to reuse; add it"
        )
    if config.train.supervision == "masks" and config.train.feature_cache:
        raise AfaError(
            "train.feature_cache is true, and train.supervision is masks, which it does not know; switch it off"
        )
    if pseudo.refinement == "crf" and pseudo.label_rule == "threshold":
        raise AfaError(
            "pseudo.refinement is crf, which refines class scores beside a background, and pseudo.label_rule is "
            "threshold, which has no background; use two_pass"
        )
    if config.train.feature_cache and not config.model.freeze_blocks:
        raise AfaError(
            "train.feature_cache is true, but model.freeze_blocks is 0: nothing stays the same that could be kept; "
            "freeze the first blocks, or set it to false"
        )
    if config.train.feature_cache and not augment.whole_images:
        raise AfaError(
            "train.feature_cache is true, but augment.whole_images is false: random crops cannot be kept; set both "
            "to true, or neither"
        )
    unknown = [name for name in config.data.class_subset if config.data.classes and name not in config.data.classes]
    if unknown:
        raise AfaError(f"data.class_subset names {unknown[0]!r}, which is not in data.classes")


def field_docs() -> dict[str, tuple[str, Any]]:
    """Dotted key -> (type as text, default), in declaration order, for help texts."""
    return {
        f"{section}.{f.name}": (str(f.type), f.default)
        for section, cls in _sections().items()
        for f in dataclasses.fields(cls)
    }


def _sections() -> dict[str, type[Any]]:
    hints = typing.get_type_hints(Config)
    return {name: cls for name, cls in hints.items() if isinstance(cls, type) and dataclasses.is_dataclass(cls)}


def _allowed(key: str, allowed: Sequence[str] | Mapping[str, Any]) -> str:
    """'did you mean' when one name is close, then the allowed ones."""
    names = list(allowed)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}allowed: {', '.join(names)}"


def _build_section(cls: type[Any], values: Mapping[str, Any], *, section: str, origin: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    built: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise AfaError(f"{origin}: unknown key {section}.{key}; {_allowed(key, fields)}")
        built[key] = _convert(value, hints[key], key=f"{section}.{key}")
        _check_range(built[key], fields[key].metadata, key=f"{section}.{key}")
    return cls(**built)


def _convert(value: Any, kind: Any, *, key: str) -> Any:
    """Turn a TOML or flag value into the field's type, or raise an error that names the key."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise AfaError(f"{key} is {value!r}; use one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        args = typing.get_args(kind)
        if isinstance(value, str):
            text = value.strip()
            value = [part.strip() for part in text.strip("[]").split(",")] if text.strip("[]") else []
            value = [part.strip("'\"") for part in value]
        if not isinstance(value, (list, tuple)):
            raise AfaError(f"{key} is {value!r}; give a list, such as 1,2,3")
        if len(args) == 2 and args[1] is not Ellipsis and len(value) != len(args):
            raise AfaError(f"{key} has {len(value)} values; give {len(args)}")
        return tuple(_convert(item, args[0], key=key) for item in value)
    assert not isinstance(kind, types.UnionType), kind
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, bool):
            return value
        raise AfaError(f"{key} is {value!r}; use true or false")
    if kind is int:
        if isinstance(value, str):
            try:
                return int(value.replace("_", ""))
            except ValueError:
                raise AfaError(f"{key} is {value!r}; give a whole number") from None
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise AfaError(f"{key} is {value!r}; give a whole number")
    if kind is float:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            try:
                number = float(value)
            except ValueError:
                raise AfaError(f"{key} is {value!r}; give a number") from None
            if math.isfinite(number):
                return number
        raise AfaError(f"{key} is {value!r}; give a finite number")
    assert kind is str, kind
    if not isinstance(value, str):
        raise AfaError(f"{key} is {value!r}; give a text")
    return value


def _check_range(value: Any, metadata: Mapping[str, Any], *, key: str) -> None:
    low, high = metadata.get("low"), metadata.get("high")
    for item in value if isinstance(value, tuple) else (value,):
        if (low is not None and item < low) or (high is not None and item > high):
            span = f"{low} to {high}" if high is not None else f"{low} or more"
            raise AfaError(f"{key} is {item}; use {span}")


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    # JSON's strings, numbers and booleans are TOML's, but for the escaped slash that json never writes.
    return json.dumps(value)
