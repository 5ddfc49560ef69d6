"""The check as a page: one HTML file without scripts or anything to load."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from PIL import Image

from afa.check.text import cost_facts, duration, gibibytes, image_facts
from afa.data.images import read_image
from afa.errors import AfaError
from afa.report.charts import bar_chart, nice_ticks
from afa.report.style import STYLE
from afa.training.checkpoint import write_atomically

_STYLE: Final = """
.problems li { padding: 7px 12px; border-left: 4px solid var(--muted); background: var(--page); }
.problems li { margin-bottom: 6px; border-radius: 4px; overflow-wrap: anywhere; }
.problems .is-error { border-color: var(--down); }
.problems .is-warning { border-color: var(--propagated); }
.problems b { margin-right: 8px; }
.together th, .together td { text-align: center; border: 1px solid var(--rule); padding: 3px 6px; }
.together thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: 6px 2px; }
.together { width: auto; }
.copies { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 10px; }
.copies { margin: 8px 0 16px; font-size: 12.5px; overflow-wrap: anywhere; }
.copies img { display: block; max-width: 100%; height: 130px; object-fit: contain; border-radius: 4px; }
h3 { margin: 14px 0 4px; }
"""
_SHOWN_MESSAGES: Final = 200
_SHOWN_GROUPS: Final = 6
_SHOWN_COPIES: Final = 4
_MATRIX_CLASSES: Final = 40
_PICTURE_SIZE: Final = 260  # pixels


def write_check(report: dict[str, Any], out: Path) -> Path:
    """Write OUT/check.json and OUT/check.html, each in one piece.

    Args:
        report: What `check_data` gives.
        out: Folder; made if absent.

    Returns:
        Path of the page.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "check.json", json.dumps(report, indent=2) + "\n")
    write_atomically(out / "check.html", render_page(report, read_pictures(report)))
    return out / "check.html"


def read_pictures(report: dict[str, Any]) -> dict[str, str]:
    """Read the copies that the page shows.

    Args:
        report: What `check_data` gives.

    Returns:
        Image as the report names it -> data URI of a small JPEG.
    """
    pictures = {}
    for group in _shown_groups(report):
        for entry in group:
            try:
                picture = Image.fromarray(read_image(Path(report["root"], entry["image"])))
            except AfaError:  # it is gone meanwhile
                continue
            picture.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
            buffer = io.BytesIO()
            picture.save(buffer, format="JPEG", quality=85)
            pictures[entry["image"]] = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return pictures


def render_page(report: dict[str, Any], pictures: Mapping[str, str]) -> str:
    """Lay out the page.

    Args:
        report: What `check_data` gives.
        pictures: What `read_pictures` gives.

    Returns:
        A whole HTML document.
    """
    name = Path(report["root"]).resolve().name
    facts = (image_facts(report["images"]) if report["images"] is not None else {}) | cost_facts(report)
    sections = (
        _header(report, name),
        _tiles(report),
        _section("Problems", _problems(report)),
        _section("Classes", _classes(report)),
        _section("Classes in the same image", _together(report)),
        _section("Images and cost of training", _table(facts)),
        _section("Copies", _copies(report, pictures)),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(name)} · afa data check</title>\n<style>{STYLE}{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n<footer>Made by afa check. The figures are also in check.json.</footer>\n</body>\n</html>\n"
    )


def _header(report: dict[str, Any], name: str) -> str:
    errors, warnings = report["errors"], report["warnings"]
    kind, words = ("open", _count(errors, "error")) if errors else ("done", "no error found")
    if warnings:
        words += f", {_count(warnings, 'warning')}"
    return (
        f"<header><p class='kind'>afa data check</p><h1>{escape(name)} <span class='badge {kind}'>{words}</span></h1>"
        f"<p class='facts'>{escape(report['layout'] or 'The data set could not be opened.')}</p></header>"
    )


def _tiles(report: dict[str, Any]) -> str:
    training, tags = report["training"], report["tags_per_image"]
    time, memory, pace = "–", "–", "not measured"
    if training is not None:
        time, pace = duration(training["seconds"]), f"about, on {training['device']}"
        memory = gibibytes(training["memory"]) if training["memory"] else "–"
    tiles = [
        ("Training images", f"{report['num_train']:,}", f"{report['num_untagged']:,} without tags left out"),
        ("Validation images", f"{report['num_validation']:,}", "with masks" if report["scored"] else "without masks"),
        ("Classes", f"{len(report['classes'])}", f"{tags['mean']:.3g} to an image on average" if tags else ""),
        ("Training would take", time, pace),
        ("Memory of training", memory, "about" if memory != "–" else "not measured"),
    ]
    cells = (
        f'<div class="tile"><dt>{name}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="note">{escape(note)}</dd></div>'
        for name, value, note in tiles
    )
    return f'<dl class="tiles" style="grid-template-columns:repeat(auto-fit,minmax(170px,1fr))">{"".join(cells)}</dl>'


def _problems(report: dict[str, Any]) -> str:
    if not report["problems"]:
        return "<p>None found.</p>"
    items = (
        f'<li class="is-{problem["severity"]}"><b>{problem["severity"]}</b>{escape(problem["message"])}</li>'
        for problem in report["problems"][:_SHOWN_MESSAGES]
    )
    left = len(report["problems"]) - _SHOWN_MESSAGES
    more = f'<p class="note">and {left:,} more in check.json</p>' if left > 0 else ""
    return f'<ul class="problems">{"".join(items)}</ul>{more}'


def _classes(report: dict[str, Any]) -> str:
    classes = report["classes"]
    if not report["num_train"]:
        return ""
    ranked = sorted(classes, key=lambda entry: -entry["train"])
    return bar_chart(
        [(entry["name"], [entry["train"], entry["validation"]]) for entry in ranked],
        title="Images by class",
        series=[("to train on", "seg"), ("for validation", "cam")],
        high=nice_ticks(0.0, max(max(entry["train"], entry["validation"]) for entry in classes), count=4)[-1],
    )


def _together(report: dict[str, Any]) -> str:
    names = [escape(entry["name"]) for entry in report["classes"]]
    counts = report["together"]
    if not report["num_train"] or not 1 < len(names) <= _MATRIX_CLASSES:
        return ""
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j, other in enumerate(names):
            count, share = counts[i][j], counts[i][j] / max(1, counts[i][i])
            text = f"{count:,} of {counts[i][i]:,} training images of {name} have {other}"
            shade = f"background:rgba(37,99,235,{0.65 * share:.2f})" if i != j else ""
            cells.append(f'<td style="{shade}" title="{text}">{count if count else ""}</td>')
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    note = "<p class='note'>Training images with both classes; the darker, the larger the share of the row's class.</p>"
    return (
        f'<div class="scroll"><table class="together"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _copies(report: dict[str, Any], pictures: Mapping[str, str]) -> str:
    parts = []
    for group in _shown_groups(report):
        figures = []
        for entry in group:
            uri = pictures.get(entry["image"])
            picture = f'<img src="{uri}" alt="">' if uri else '<span class="hole">gone</span>'
            words = f"{entry['image']} · {entry['side']} · {', '.join(entry['tags']) or 'no tags'}"
            figures.append(f"<figure>{picture}<figcaption>{escape(words)}</figcaption></figure>")
        parts.append(f'<div class="copies">{"".join(figures)}</div>')
    return "".join(parts)


def _shown_groups(report: dict[str, Any]) -> list[list[dict[str, Any]]]:
    if report["images"] is None:
        return []
    groups: Sequence[list[dict[str, Any]]] = (
        *report["images"]["identical"][:_SHOWN_GROUPS],
        *report["images"]["similar"][:_SHOWN_GROUPS],
    )
    return [group[:_SHOWN_COPIES] for group in groups]


def _table(facts: Mapping[str, str]) -> str:
    rows = (f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in facts.items())
    return f'<table class="plain"><tbody>{"".join(rows)}</tbody></table>' if facts else ""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
