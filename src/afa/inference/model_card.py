"""The model card of a trained network: what it was trained on, what it scored, which license binds it.

Every figure is read from the run; what the run does not contain is left out or called unknown. The words are in
model_card.md.j2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from huggingface_hub import ModelCard, ModelCardData

from afa.config import SUPERVISION_NAMES, Config, ModelConfig
from afa.model.registry import BACKBONES
from afa.runs.run import Run

_KINDS: Final = {
    "seg": "segmentation",
    "propagated": "propagated CAM, given the images' true tags",
    "cam": "CAM, given the images' true tags",
}
_SCORE_KEYS: Final = ("miou", "per_class", "protocol", "num_images")
_TRAINING_KEYS: Final = ("steps", "seconds_train", "device", "precision", "num_parameters", "afa", "torch")


def is_hub_id(text: str) -> bool:
    """Whether a text can be a model's name on the Hugging Face hub, OWNER/NAME."""
    name = r"[A-Za-z0-9][\w.-]*"
    return re.fullmatch(f"{name}/{name}", text) is not None and not text.endswith((".pth", ".pt"))


def read_figures(folder: Path) -> dict[str, Any]:
    """Gather what a run folder tells of its training and scores.

    Returns:
        Values that JSON can hold: `evaluation`, label kind -> miou, per_class, protocol and num_images, from
        evaluation/*.json or else report.json; `training`, from environment.json; `unfinished`, the name of the
        checkpoint that the weights are of, for a run without final ones.

    Raises:
        AfaError: One of the files is not a JSON object.
    """
    run = Run(folder)
    report, environment = run.report(), run.environment()
    evaluation: dict[str, Any] = {}
    for kind in _KINDS:
        scores = run.scores(kind)
        if not scores and kind == "seg" and report.get("miou") is not None:
            scores = report | {"per_class": (report.get("per_class") or {}).get("seg")}
        if scores.get("miou") is not None:
            evaluation[kind] = {key: scores.get(key) for key in _SCORE_KEYS}
    training = {key: environment[key] for key in _TRAINING_KEYS if environment.get(key) is not None}
    unfinished = {} if run.is_complete else {"unfinished": run.newest_weights().parent.name}
    return {"evaluation": evaluation, "training": training, **unfinished}


def model_card(config: Config, classes: Sequence[str], figures: Mapping[str, Any], *, title: str) -> str:
    """Write a model card in Markdown, with the front matter that the Hugging Face hub reads.

    `config` has no private paths; `figures` are those of `read_figures`, and may be empty.
    """
    tags = ["afa", "semantic-segmentation", "image-segmentation"]
    tags += ["weakly-supervised"] if config.train.supervision == "tags" else []
    (known, metadata), second = _weights_license(config.model.weights), second_weights(config.model)
    second_license, more = _weights_license(second)
    both = _of_both(metadata, more) if second else metadata
    data = ModelCardData(library_name="afa", pipeline_tag="image-segmentation", tags=tags, **both)
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.md.j2")),
        title=title,
        config=config,
        supervision=SUPERVISION_NAMES[config.train.supervision].capitalize(),
        classes=classes,
        training=_training(config, figures),
        evaluation=figures.get("evaluation") or {},
        kinds=_KINDS,
        weights_license=known,
        terms=metadata,
        second=second,
        second_license=second_license,
        inline=_inline,
        cell=lambda text: text.replace("|", "\\|"),
    )
    return str(card).strip() + "\n"


def second_weights(model: ModelConfig) -> str:
    """Where the weights of the second encoder come from; empty without one, or for random weights."""
    spec = BACKBONES.get(model.second_backbone)
    return model.second_weights or (spec.weights if spec else "")


def _of_both(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Metadata of two encoders in one network: the license of both, or that there are several."""
    bases = [part["base_model"] for part in (one, two) if "base_model" in part]
    names = {part["license"] for part in (one, two) if "license" in part}
    if len(names) == 1:
        return one | two | {"base_model": bases}
    several = {"license": "other", "license_name": "several"}
    return {"base_model": bases} | ({"license": "unknown"} if "unknown" in names else several)


def _weights_license(weights: str) -> tuple[str, dict[str, Any]]:
    """License of an encoder's initial weights: its name, and its identifier in metadata."""
    base: dict[str, Any] = {"base_model": weights} if is_hub_id(weights) else {}
    known = next((spec for spec in BACKBONES.values() if weights and spec.weights == weights), None)
    if known is None and re.fullmatch(r"(.*[/\\])?mit_b[0-5]\.pth", weights):
        known = BACKBONES[Path(weights).stem]
    if known is None:
        return "", base | {"license": "unknown"} if weights else {}
    if known.license in ("Apache-2.0", "MIT"):
        return known.license, base | {"license": known.license.lower()}
    name = re.sub(r"[^a-z0-9]+", "-", known.license.lower()).strip("-")
    link = f"https://huggingface.co/{known.weights}"
    return known.license, base | {"license": "other", "license_name": name, "license_link": link}


def _training(config: Config, figures: Mapping[str, Any]) -> dict[str, str]:
    """Rows of the table of the training; empty ones are left out."""
    training, data, weights = figures.get("training") or {}, config.data, config.model.weights
    second = second_weights(config.model)
    return {
        "data": f"folder `{_inline(data.root)}`, list `{_inline(data.train_list)}`" if data.root else "",
        "encoder": f"`{config.model.backbone}`, started from {f'`{weights}`' if weights else 'random weights'}",
        "second encoder": f"`{config.model.second_backbone}`, frozen, of `{second}`" if second else "",
        "parameters": f"{training['num_parameters']:,}" if "num_parameters" in training else "",
        "schedule": f"{config.schedule.max_steps:,} steps of {config.schedule.batch_size} crops of "
        f"{config.augment.crop_size} pixels, preset `{config.preset}`, seed {config.train.seed}",
        "weights of": f"{figures['unfinished']}: **training was not finished**" if "unfinished" in figures else "",
        "training time": f"{training['seconds_train']:,.0f} s" if "seconds_train" in training else "",
        "machine": ", ".join(str(training[name]) for name in ("device", "precision") if name in training),
        "software": ", ".join(f"{name} {training[name]}" for name in ("afa", "torch") if name in training),
    }


def _inline(text: str) -> str:
    """A name as one line of text without markup."""
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", " ".join(text.split()))
