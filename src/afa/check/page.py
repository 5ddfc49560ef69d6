"""The check as a page: check.html, beside check.json with its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from PIL import Image

from afa.check.text import describe_figures
from afa.data.images import read_image
from afa.errors import AfaError
from afa.report.charts import HeatCell, bar_chart, heat_matrix
from afa.report.render import data_uri, render_page
from afa.runs.files import write_whole

_SHOWN_MESSAGES: Final = 200
_SHOWN_GROUPS: Final = 6
_SHOWN_COPIES: Final = 4
_MATRIX_CLASSES: Final = 40
_PICTURE_SIZE: Final = 260  # pixels


def write_check(report: dict[str, Any], out: Path) -> Path:
    """Write OUT/check.json, what `check_data` gives, and OUT/check.html, each in one piece; returns the page."""
    write_whole(out / "check.json", json.dumps(report, indent=2) + "\n")
    write_whole(out / "check.html", render_page("check", **collect_page(report)))
    return out / "check.html"


def collect_page(report: dict[str, Any]) -> dict[str, Any]:
    """Gather what the template shows.

    Args:
        report: What `check_data` gives; the copies that are shown are read from its `root`.

    Returns:
        `report`; `name` of the data set; `facts`: figures in words; `problems`: those that are shown; `chart` of the
        classes, None without images; `matrix`: as of `afa.report.charts.heat_matrix`, empty where there are none or too
        many; `copies`: groups of `picture` (data URI; empty if it is gone) and `words`.
    """
    classes = report["classes"] if report["num_train"] else []
    ranked = sorted(classes, key=lambda entry: -entry["train"])
    return {
        "report": report,
        "name": Path(report["root"]).resolve().name,
        "facts": describe_figures(report),
        "problems": report["problems"][:_SHOWN_MESSAGES],
        "chart": bar_chart(
            [(entry["name"], [entry["train"], entry["validation"]]) for entry in ranked],
            title="Images by class",
            series=[("to train on", "seg"), ("for validation", "cam")],
            high=None,
        ),
        "matrix": _matrix([entry["name"] for entry in classes], report["together"]),
        "copies": _copies(report["images"], Path(report["root"])) if report["images"] else [],
    }


def _matrix(names: list[str], counts: list[list[int]]) -> list[dict[str, Any]]:
    """A row a class: the share of its images that have each other class."""
    if not 1 < len(names) <= _MATRIX_CLASSES:
        return []
    rows = []
    for i, name in enumerate(names):
        own = counts[i][i]
        rows.append(
            [
                HeatCell(
                    str(count or ""),
                    0.65 * count / max(1, own) if i != j else 0.0,
                    f"{count:,} of {own:,} training images of {name} have {other}",
                    own=True,
                )
                for j, (other, count) in enumerate(zip(names, counts[i], strict=True))
            ]
        )
    return heat_matrix(names, rows)


def _copies(images: Mapping[str, Any], root: Path) -> list[list[dict[str, str]]]:
    """The groups of copies that are shown."""
    groups = [*images["identical"][:_SHOWN_GROUPS], *images["similar"][:_SHOWN_GROUPS]]

    def shown(entry: Mapping[str, Any]) -> dict[str, str]:
        words = f"{entry['image']} · {entry['side']} · {', '.join(entry['tags']) or 'no tags'}"
        try:
            picture = Image.fromarray(read_image(root / entry["image"]))
        except AfaError:  # it is gone meanwhile
            return {"picture": "", "words": words}
        picture.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
        return {"picture": data_uri(picture), "words": words}

    return [[shown(entry) for entry in group[:_SHOWN_COPIES]] for group in groups]
