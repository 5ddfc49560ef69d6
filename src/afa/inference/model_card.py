"""Writes the model card of a trained network: what it was trained on, what it scored, which license binds it.

Every figure is read from the run; what the run does not tell is left out or said to be unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from afa.config import SUPERVISION_NAMES, Config, ModelConfig, Supervision
from afa.errors import AfaError
from afa.model.registry import BACKBONES
from afa.runs.build import find_weights

_KINDS: Final = {
    "seg": "segmentation",
    "propagated": "propagated CAM, given the images' true tags",
    "cam": "CAM, given the images' true tags",
}
_SCORE_KEYS: Final = ("miou", "per_class", "protocol", "num_images")
_TRAINING_KEYS: Final = ("steps", "seconds_train", "device", "precision", "num_parameters", "afa", "torch")

_SUPERVISION: Final = {
    "tags": "**Weak supervision**: it was trained with image-level tags. No pixel mask was read in training; where "
    "there are masks, they only scored the result. Expect rougher outlines than full supervision gives, and "
    "classes that always appear together mixed up.",
    "masks": f"**{SUPERVISION_NAMES['masks'].capitalize()}**: unlike other models of afa, this one was trained on "
    "pixel masks, for comparison.",
}


@dataclass(frozen=True)
class WeightsLicense:
    """License of the weights that a training started from.

    Attributes:
        metadata: Lines of the card's front matter.
        text: The same for people, one paragraph.
    """

    metadata: dict[str, str] = field(default_factory=dict)
    text: str = ""


def is_hub_id(text: str) -> bool:
    """Whether a text can be a model's name on the Hugging Face hub, OWNER/NAME."""
    name = r"[A-Za-z0-9][\w.-]*"
    return re.fullmatch(f"{name}/{name}", text) is not None and not text.endswith((".pth", ".pt"))


def read_figures(run: Path) -> dict[str, Any]:
    """Gather what a run folder tells of its training and scores.

    Args:
        run: Run folder.

    Returns:
        Values that JSON can hold: `evaluation`, label kind -> miou, per_class, protocol and num_images, from
        evaluation/*.json or else report.json; `training`, from environment.json; `unfinished`, the name of the
        checkpoint that the weights are of, for a run without final ones.

    Raises:
        AfaError: One of the files is not a JSON object.
    """
    report = _read_object(run / "report.json")
    evaluation: dict[str, Any] = {}
    for kind in _KINDS:
        scores = _read_object(run / "evaluation" / f"{kind}.json")
        if not scores and kind == "seg" and report.get("miou") is not None:
            scores = report | {"per_class": (report.get("per_class") or {}).get("seg")}
        if scores.get("miou") is not None:
            evaluation[kind] = {key: scores.get(key) for key in _SCORE_KEYS}
    environment = _read_object(run / "environment.json")
    figures: dict[str, Any] = {
        "evaluation": evaluation,
        "training": {key: environment[key] for key in _TRAINING_KEYS if environment.get(key) is not None},
    }
    if not (run / "model.safetensors").is_file():
        figures["unfinished"] = find_weights(run).parent.name
    return figures


def weights_license(model: ModelConfig) -> WeightsLicense:
    """Say under which license the encoder's initial weights are published.

    Args:
        model: Settings; `weights` and `backbone` are looked at.
    """
    weights = model.weights
    if not weights:
        return WeightsLicense(
            text="Training started from random weights, so no license of earlier weights applies. "
            "Whoever publishes this model states its license here."
        )
    known = next((spec for spec in BACKBONES.values() if spec.weights == weights), None)
    if known is None and re.fullmatch(r"(.*[/\\])?mit_b[0-5]\.pth", weights):
        known = BACKBONES[Path(weights).stem]
    base = {"base_model": weights} if is_hub_id(weights) else {}
    if known is None:
        return WeightsLicense(
            base | {"license": "unknown"},
            f"The encoder started from `{weights}`, whose license afa does not know: look it up where the weights "
            "came from, and state it here before this model is passed on.",
        )
    text = f"The encoder started from `{weights}`, published under this license: {known.license}."
    if known.license in ("Apache-2.0", "MIT"):
        return WeightsLicense(base | {"license": known.license.lower()}, f"{text} It applies to what derives from it.")
    name = re.sub(r"[^a-z0-9]+", "-", known.license.lower()).strip("-")
    link = f"https://huggingface.co/{known.weights}"
    return WeightsLicense(
        base | {"license": "other", "license_name": name, "license_link": link},
        f"{text} **Research and evaluation only**; this model may be bound by it: {link}",
    )


def model_card(config: Config, classes: Sequence[str], figures: Mapping[str, Any], *, title: str) -> str:
    """Write a model card in Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        config: Configuration of the run, without private paths.
        classes: C names.
        figures: As `read_figures` gives them; may be empty.
        title: Name of the model.

    Returns:
        Contents of README.md.
    """
    license_ = weights_license(config.model)
    sections = [
        _front_matter(license_.metadata, config.train.supervision),
        f"# {_inline(title)}",
        "A semantic segmentation network made with afa, which trains transformers to segment images from nothing but "
        "the tags of their training images ([Ru et al., CVPR 2022](https://arxiv.org/abs/2203.02664)).",
        _SUPERVISION[config.train.supervision],
        "## Use",
        "```python\nfrom afa import Predictor\n\n"
        'predictor = Predictor.from_pretrained("FOLDER_OR_HUB_ID")\n'
        'prediction = predictor("photo.jpg")\n'
        "label, scores = prediction.label, prediction.scores  # (H, W) uint8 classes, (K, H, W) float32\n```",
        f"## Classes\n\n0 background, then {len(classes)}: "
        + ", ".join(f"{index} {_inline(name)}" for index, name in enumerate(classes, start=1))
        + ".",
        _training(config, figures),
        _scores(figures.get("evaluation") or {}),
        f"## License\n\n{license_.text} The training images have licenses of their own. afa itself is under "
        "Apache-2.0.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(license_metadata: Mapping[str, str], supervision: Supervision) -> str:
    lines = ["---", "library_name: afa", "pipeline_tag: image-segmentation"]
    # JSON's texts are YAML's.
    lines += [f"{key}: {json.dumps(value)}" for key, value in license_metadata.items()]
    tags = ["afa", "semantic-segmentation", "image-segmentation"]
    tags += ["weakly-supervised"] if supervision == "tags" else []
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _training(config: Config, figures: Mapping[str, Any]) -> str:
    training = figures.get("training") or {}
    start = f"`{config.model.weights}`" if config.model.weights else "random weights"
    rows = {
        "data": f"folder `{_inline(config.data.root)}`, list `{_inline(config.data.train_list)}`"
        if config.data.root
        else "",
        "encoder": f"`{config.model.backbone}`, started from {start}",
        "parameters": f"{training['num_parameters']:,}" if "num_parameters" in training else "",
        "schedule": f"{config.schedule.max_steps:,} steps of {config.schedule.batch_size} crops of "
        f"{config.augment.crop_size} pixels, preset `{config.preset}`, seed {config.train.seed}",
        "weights of": f"{figures['unfinished']}: **training was not finished**" if "unfinished" in figures else "",
        "training time": f"{training['seconds_train']:,.0f} s" if "seconds_train" in training else "",
        "machine": ", ".join(str(training[name]) for name in ("device", "precision") if name in training),
        "software": ", ".join(f"{name} {training[name]}" for name in ("afa", "torch") if name in training),
    }
    table = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *table, "", "All settings are in config.json."])


def _scores(evaluation: Mapping[str, Any]) -> str:
    if not evaluation:
        return "## Scores\n\nThe run was not scored: there are no figures."
    lines = ["## Scores", "", "mIoU in percent on the run's validation images.", ""]
    lines += ["| what | mIoU | protocol | images |", "|---|---|---|---|"]
    for kind, text in _KINDS.items():
        if kind in evaluation:
            scores = evaluation[kind]
            lines.append(
                f"| {text} | {scores['miou']:.2f} | {scores['protocol'] or '-'} | {scores['num_images'] or '-'} |"
            )
    per_class = (evaluation.get("seg") or {}).get("per_class")
    if per_class:
        lines += ["", "| class | IoU of the segmentation |", "|---|---|"]
        lines += [
            f"| {_cell(_inline(name))} | {'-' if iou is None else f'{iou:.2f}'} |" for name, iou in per_class.items()
        ]
    return "\n".join(lines)


def _inline(text: str) -> str:
    """A name as text of one line that starts no markup of its own."""
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", " ".join(text.split()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise AfaError(f"{path}: not valid JSON ({error}); write it again or delete it") from None
    if not isinstance(value, dict):
        raise AfaError(f"{path}: holds {type(value).__name__}, not a JSON object; write it again or delete it")
    return value
