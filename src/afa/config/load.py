"""A preset, then a TOML file, then flags give one checked `Config`, and back.

Unknown keys, wrong types and values out of range are errors that name the key, the value and what is allowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import re
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from afa.config.schema import Config, ModelConfig
from afa.errors import AfaError, shown

PRESETS = ("paper", "paper_coco", "rrm", "frozen", "demo")
"""Names of starting values, each a file in presets/."""


_LATER: Final[dict[str, Any]] = {
    "model.decoder_init": "uniform",
    "model.norm_eps": 1e-5,
    "pseudo.propagated_scale": "largest",
    "pseudo.par_image": "exact",
    "loss.reduction": "batch",
    "evaluation.multiscale_rule": "direct",
}
"""What runs did whose configuration was stored before these keys were there."""


def load_config(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    stored: bool = False,
) -> Config:
    """Build the configuration: preset, then TOML file, then overrides.

    Args:
        path: TOML file with `preset` and one table per section, or None.
        overrides: Dotted keys, such as `{"schedule.max_steps": 100}`; texts are parsed as the field's type.
        preset: Name that wins over the file's `preset`.
        stored: The file is a run's: what it leaves out is what runs did before there was such a key.

    Raises:
        AfaError: The file is missing or not TOML; a key is unknown; a value has the wrong type or is out of range.
    """
    tree = {} if path is None else _read_toml(Path(path))
    filed_preset = tree.pop("preset", "paper")
    name = filed_preset if preset is None else preset
    if name not in PRESETS:
        blamed = f"{path}: " if preset is None else ""
        raise AfaError(f"{blamed}preset is {shown(name)}; use one of {', '.join(PRESETS)}")
    defaults = _LATER if stored else _flatten(_read_toml(Path(__file__).parent / "presets" / f"{name}.toml"), "")
    filed, given = _flatten(tree, f"{path}: "), overrides or {}
    values = _convert(defaults, "") | _convert(filed, f"{path}: ")
    config = _build(name, values | _convert({key: _parse(value, kinds().get(key)) for key, value in given.items()}, ""))
    for message in _contradictions(config):
        named = set(re.findall(r"[a-z]\w*\.\w+", message))
        raise AfaError(f"{path}: {message}" if named & filed.keys() and not named & given.keys() else message)
    return config


_NETWORK: Final = ("train.device", "train.precision", "train.seed")
# Scales of pseudo labels contradict the feature cache; whoever changes them switches it off.
_LABELS: Final = ("pseudo.", "evaluation.short_side", "evaluation.batch_size", "evaluation.crf_", "train.feature_cache")
_IMAGES: Final = ("data.negatives", "data.white_level", "data.skip_broken", "data.shard_gib", "data.store_retries")
_READ_BY: Final[dict[str, tuple[str, ...]]] = {
    "evaluate --labels seg": ("data.", "evaluation.", *_NETWORK),
    "evaluate --labels": ("data.", *_LABELS, "evaluation.protocol", *_NETWORK),
    "predict": (*_IMAGES, "evaluation.", *_NETWORK),
    "pseudo": ("data.", *_LABELS, "augment.crop_size", *_NETWORK),
    "masks": ("data.", "model.", *_LABELS, "augment.crop_size", *_NETWORK),
}
"""How a command that does not train begins -> how the keys begin that it reads. Other commands read all or none."""
_FOR_BATCHES: Final = ("data.workers", "data.cache_gib", "data.large_gib", "data.feature_dir")


def refuse_unread(command: str, keys: Iterable[str]) -> None:
    """Refuse keys that change nothing in a command.

    Args:
        command: `evaluate --labels KIND`, `predict`, `pseudo` or `masks`.
        keys: Dotted keys that the user gave.

    Raises:
        AfaError: There is such a key, and the command does not read it.

    >>> refuse_unread("predict", ["train.device", "evaluation.scales"])
    """
    read = next(read for name, read in _READ_BY.items() if command.startswith(name))
    for key in keys:
        if key in kinds() and (key in _FOR_BATCHES or not key.startswith(read)):
            words = ", ".join(each if each in kinds() else f"{each}*" for each in read)
            raise AfaError(f"{key} changes nothing in afa {command}; leave it out. What does is among {words}")


def config_from_dict(tree: Mapping[str, Any], *, origin: str) -> Config:
    """Rebuild a configuration from what `config_to_dict` gave.

    Args:
        tree: Nested dictionary; what it leaves out has its default, or what runs did before there was such a key.
        origin: File it came from, for messages.

    Raises:
        AfaError: As `load_config`.
    """
    flat = _flatten({section: values for section, values in tree.items() if section != "preset"}, f"{origin}: ")
    config = _build(str(tree.get("preset", "paper")), _convert(_LATER | flat, f"{origin}: "))
    for message in _contradictions(config):
        raise AfaError(f"{origin}: {message}")
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionary of plain values (tuples become lists), ready for JSON."""
    result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return result


def config_to_keys(config: Config) -> dict[str, Any]:
    """Value of each key, by SECTION.KEY, as of `config_to_dict`."""
    return _flatten({name: part for name, part in config_to_dict(config).items() if name != "preset"}, "")


def config_to_toml(config: Config) -> str:
    """The resolved configuration as TOML that `load_config` reads back to an equal one."""
    # JSON's texts, numbers, booleans and lists are TOML's.
    lines = [f"preset = {json.dumps(config.preset)}"]
    for section, values in config_to_dict(config).items():
        if section != "preset":
            lines += ["", f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _contradictions(config: Config) -> Iterator[str]:
    """What single ranges cannot say: keys that contradict each other, all of them named."""
    schedule, pseudo, augment, train = config.schedule, config.pseudo, config.augment, config.train
    low, high = pseudo.background_low, pseudo.background_high
    if low > high:
        yield (
            f"pseudo.background_low is {low}, above pseudo.background_high ({high}); the low score must not exceed the "
            "high one"
        )
    if augment.scale_min > augment.scale_max:
        yield f"augment.scale_min is {augment.scale_min}, above augment.scale_max ({augment.scale_max}); swap them"
    if config.model.backbone.startswith("mit_") and augment.crop_size % 32:
        yield f"augment.crop_size is {augment.crop_size}; use a multiple of 32"
    if schedule.refined_steps < schedule.cls_steps:
        yield (
            f"schedule.refined_steps is {schedule.refined_steps}, before schedule.cls_steps ({schedule.cls_steps}); "
            "phases must follow each other"
        )
    for key, values in (
        ("pseudo.scales", pseudo.scales),
        ("pseudo.dilations", pseudo.dilations),
        ("evaluation.scales", config.evaluation.scales),
    ):
        if not values:
            yield f"{key} is empty; give at least one value"
    if pseudo.reuse_training_pass and 1.0 not in pseudo.scales:
        yield f"pseudo.reuse_training_pass is true, yet pseudo.scales {pseudo.scales} has no 1.0 to reuse; add it"
    if pseudo.label_rule == "threshold" and pseudo.crf:
        yield "pseudo.crf is true and pseudo.label_rule is 'threshold', which has no probabilities; use two_pass"
    if pseudo.label_rule == "threshold" and pseudo.refinement == "crf":
        yield (
            "pseudo.refinement is crf, which refines class scores beside a background, and pseudo.label_rule is "
            "threshold, which has no background; use two_pass"
        )
    if train.feature_cache:
        if train.supervision == "masks":
            yield "train.feature_cache is true, and train.supervision is masks, which it does not know; switch it off"
        needed = {
            "model.classifier": (config.model.classifier, "text"),
            "augment.whole_images": (augment.whole_images, True),
            "pseudo.scales": (pseudo.scales, (1.0,)),
            "pseudo.mirror": (pseudo.mirror, False),
        }
        for key, (found, wanted) in needed.items():
            if found != wanted:
                yield (
                    f"train.feature_cache is true, but {key} is {found}: what changes with the step cannot be kept; "
                    f"set {key} to {wanted}, or train.feature_cache to false"
                )
    yield from _second_contradictions(config.model)
    for template in config.model.text_templates:
        if template.count("{}") != 1:
            yield f"model.text_templates has {template!r}; write {{}} once, where the word belongs"
    for name in config.data.class_subset:
        if config.data.classes and name not in config.data.class_names:
            yield f"data.class_subset names {name!r}, which is not in data.classes"


def _second_contradictions(model: ModelConfig) -> Iterator[str]:
    """Keys of a second encoder without it, or without what they change."""
    for key, value in (("weights", model.second_weights), ("similarity", model.second_similarity)):
        if value and not model.second_backbone:
            yield (
                f"model.second_{key} is {str(value).lower() if value is True else value}, but model.second_backbone "
                "is empty; name the architecture of the second encoder there"
            )
    if model.second_similarity and model.classifier != "text":
        yield (
            "model.second_similarity is true, but model.classifier is learned, whose class scores walk along nothing; "
            "set model.classifier to text, or model.second_similarity to false"
        )


@functools.cache
def sections() -> dict[str, type[Any]]:
    """The dataclass of each section, by its name."""
    return {name: cls for name, cls in typing.get_type_hints(Config).items() if cls is not str}


@functools.cache
def kinds() -> dict[str, Any]:
    """The type of each key, by SECTION.KEY."""
    return {
        f"{section}.{name}": kind
        for section, cls in sections().items()
        for name, kind in typing.get_type_hints(cls, include_extras=True).items()
    }


def nearest(word: str) -> str:
    """'did you mean' the section or key that is close, as a whole or without its section; else where all are listed.

    >>> nearest("learnin_rte")
    'did you mean schedule.learning_rate?'
    """
    names = {key.partition(".")[2]: key for key in reversed(kinds())} | {section: section for section in sections()}
    bare = word.rpartition(".")[2]
    for cutoff in (0.9, 0.75):
        whole = difflib.get_close_matches(word, kinds(), 1, cutoff)
        for close in whole or [names[name] for name in difflib.get_close_matches(bare, names, 1, cutoff)]:
            return f"did you mean {close}?"
    return "afa keys lists them all"


def allowed_values(kind: Any) -> str:
    """What a key of a type may be, in words.

    >>> allowed_values(Annotated[int, msgspec.Meta(ge=1)])
    'a whole number, 1 or more'
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        many = "a list, such as 1,2,3" if arguments[-1] is Ellipsis else f"{len(arguments)} values with a comma between"
        return f"{many}, each {allowed_values(arguments[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if origin is not Annotated:
        return words[kind]
    meta = kind.__metadata__[0]
    span = f"{meta.ge:,.12g} or more" if meta.le is None else f"{meta.ge:,.12g} to {meta.le:,.12g}"
    return f"{words[arguments[0]]}, {span}"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AfaError(f"{path}: no such configuration file; pass --config FILE.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise AfaError(f"{path}: not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AfaError(f"{path}: cannot be read as a configuration file ({error})") from None


def _flatten(tree: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Tables of sections as values by SECTION.KEY; `origin` starts the messages."""
    for section, values in tree.items():
        if section not in sections():
            raise AfaError(f"{origin}unknown section [{section}]; {nearest(section)}")
        if not isinstance(values, dict):
            raise AfaError(f"{origin}{section} is {shown(values)}; write a table [{section}] with keys")
    return {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}


def _convert(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Values in the types of their keys, or an error that names the key, behind `origin`."""
    converted = {}
    for key, value in values.items():
        if key not in kinds():
            raise AfaError(f"{origin}unknown key {key}; {nearest(key)}")
        try:
            converted[key] = msgspec.convert(value, kinds()[key])
        except msgspec.ValidationError:
            raise AfaError(f"{origin}{key} is {shown(value)}; use {allowed_values(kinds()[key])}") from None
    return converted


def _build(preset: str, values: Mapping[str, Any]) -> Config:
    parts: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for key, value in values.items():
        section, _, name = key.partition(".")
        parts[section][name] = value
    return Config(preset=preset, **{section: sections()[section](**part) for section, part in parts.items()})


def _parse(value: Any, kind: Any) -> Any:
    """What a text stands for in a field of a type; other values, and texts that stand for nothing, as they are."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str):
            value = [part.strip(" '\"") for part in value.strip("[] ").split(",") if part.strip()]
        return [_parse(item, arguments[0]) for item in value] if isinstance(value, list | tuple) else value
    base = arguments[0] if typing.get_origin(kind) is Annotated else kind
    if not isinstance(value, str):
        return value
    if base is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    for number in (int, float) if base in (int, float) else ():
        with contextlib.suppress(ValueError):
            return number(value)
    return value
