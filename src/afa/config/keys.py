"""The list of all keys for people: `afa keys`, `afa train --help` and docs/configuration.md, all from the schema."""

from __future__ import annotations

import ast
import itertools
import json
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from afa.config import schema
from afa.config.load import PRESETS, allowed_values, nearest, sections
from afa.errors import AfaError

COMMON: Final = (
    "data.val_list", "data.mask_dir", "data.split_fraction", "augment.crop_size", "augment.short_side",
    "model.backbone", "model.weights", "model.freeze_blocks", "model.attention_scaling", "pseudo.background_low",
    "pseudo.background_high", "pseudo.refinement", "loss.affinity_weight", "schedule.max_steps", "schedule.batch_size",
    "schedule.cls_steps", "schedule.refined_steps", "schedule.learning_rate", "train.eval_steps", "train.save_steps",
)  # fmt: skip
"""The keys that people change most."""

_INTRODUCTION: Final = """# Configuration

Any key is a flag, `--SECTION.KEY VALUE`, and a line in the table `[SECTION]` of a TOML file (`--config FILE`). Flags
win over the file, the file over the preset: {presets}. The defaults below are those of the preset `paper`;
`afa train DIR` alone chooses others by data and device, and prints them. Lists are written `1,0.5,1.5` as flags.

`afa keys [SECTION|WORD]` shows this list in the terminal. This page is made from
[schema.py](../src/afa/config/schema.py): `afa keys --markdown > docs/configuration.md`.
"""


class Key(NamedTuple):
    """A key of the configuration.

    Attributes:
        name: SECTION.KEY.
        allowed: What it may be, in words.
        default: Value of the preset `paper`, as it is written in TOML.
        text: Meaning, unit and source.
    """

    name: str
    allowed: str
    default: str
    text: str


def all_keys() -> list[Key]:
    """Every key, in the order of the schema."""
    texts = _texts()
    return [
        Key(f"{section}.{name}", allowed_values(kind), json.dumps(getattr(cls, name, None)), texts[cls.__name__, name])
        for section, cls in sections().items()
        for name, kind in typing.get_type_hints(cls, include_extras=True).items()
    ]


def find_keys(word: str) -> list[Key]:
    """The keys of a section, or those whose name or text has a word.

    Raises:
        AfaError: There is none.
    """
    keys = all_keys()
    found = [key for key in keys if key.name.split(".")[0] == word]
    found = found or [key for key in keys if word.lower() in f"{key.name} {key.text}".lower()]
    if not found:
        raise AfaError(f"no key has {word!r} in its name or text; {nearest(word)}")
    return found


def keys_text(keys: Sequence[Key]) -> str:
    """The keys for a terminal."""
    lines = []
    for key in keys:
        text = textwrap.fill(key.text, 100, initial_indent="    ", subsequent_indent="    ")
        lines.append(f"--{key.name}  (default {key.default}; {key.allowed})\n{text}\n")
    return "".join(lines)


def common_text() -> str:
    """The keys that people change most, a line each, with the default and the start of their text."""
    keys = {key.name: key for key in all_keys()}
    lines = ["keys that are changed most (all of them: afa keys):"]
    for name in COMMON:
        text = textwrap.shorten(keys[name].text, 72, placeholder=" ...")
        lines.append(f"  {f'--{name} {keys[name].default}':44} {text}")
    return "\n".join(lines)


def keys_markdown() -> str:
    """The page docs/configuration.md."""
    parts = [_INTRODUCTION.format(presets=", ".join(f"`{name}`" for name in PRESETS))]
    section = ""
    for key in all_keys():
        own, _, name = key.name.partition(".")
        if own != section:
            section = own
            about = " ".join((sections()[own].__doc__ or "").split())
            parts.append(f"\n## {own}\n\n{about}\n\n| key | default | allowed | meaning |\n|---|---|---|---|\n")
        cells = [f"`{name}`", f"`{key.default}`", key.allowed, key.text]
        parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(parts)


def _texts() -> dict[tuple[str, str], str]:
    """The text under each field of the schema's dataclasses, which Python itself does not keep."""
    texts: dict[tuple[str, str], str] = {}
    for node in ast.parse(Path(schema.__file__).read_text(encoding="utf-8")).body:
        body: list[Any] = node.body if isinstance(node, ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(node, ast.ClassDef)
                texts[node.name, ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return texts
