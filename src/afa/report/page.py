"""The page that shows a run: report.html, beside report.json with its figures.

The page of an unfinished run says what is missing and which command would add it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from PIL import Image

from afa.data.palette import voc_palette
from afa.errors import AfaError
from afa.report.charts import Series, bar_chart, line_chart
from afa.report.collect import LABEL_KINDS, collect_report
from afa.report.confusion import confusion_view, explorer_link, with_links
from afa.report.pictures import PICTURES, THRESHOLD_PICTURES
from afa.report.render import data_uri, render_page
from afa.runs.run import Run
from afa.types import IGNORE_INDEX

_KIND_NAMES: Final = {"seg": "segmentation", "propagated": "propagated CAM", "cam": "CAM"}
_COLUMNS: Final = (*PICTURES, *THRESHOLD_PICTURES)
_LEGEND_LIMIT: Final = 30
"""With more classes than this, the legend has only those that the examples are tagged with."""

_REFRESH: Final = 30
"""Seconds after which a browser looks for a newer page of a running training."""


def write_report(run: Path, *, running: bool = False) -> Path:
    """Write RUN/report.json and RUN/report.html, each in one piece, of a run finished or not; returns the page.

    While its training goes on (`running`), the page says so, and looks for a newer one now and then.

    Raises:
        AfaError: `run` is no run folder, or one of its files is broken.
    """
    report = collect_report(run, running=running)
    folder = Run(run)
    scores = {each["image"]: each for each in with_links(folder.scores("seg").get("images", ()))}
    folders = ("examples", "worst", "best", "uncertain", "thresholds")
    galleries = {name: read_examples(getattr(folder, name)) for name in folders}
    for example in (each for gallery in galleries.values() for each in gallery):
        example["score"] = scores.get(example["name"])
    values = collect_page(report, folder.metrics(), galleries["examples"])
    values |= {"worth": folder.worth(), "galleries": galleries, "columns_of": picture_columns}
    values |= {"written": datetime.now().astimezone().replace(microsecond=0), "refresh": _REFRESH}
    folder.write_report(report, render_page("report", **values))
    return folder.page


def read_examples(folder: Path) -> list[dict[str, Any]]:
    """Load the pictures that `write_examples` left in a folder, for embedding.

    Returns:
        `name`, `tags`, `pictures` (picture name -> data URI), `score` (None) of each example; empty without an index.

    Raises:
        AfaError: The index or a picture is broken.
    """
    index = folder / "index.json"
    if not index.is_file():
        return []
    examples = []
    try:
        for entry in json.loads(index.read_text(encoding="utf-8")):
            files = {key: index.parent / entry["folder"] / f"{key}.png" for key in _COLUMNS}
            pictures = {key: data_uri(Image.open(path)) for key, path in files.items() if path.is_file()}
            examples.append({key: entry[key] for key in ("name", "tags")} | {"pictures": pictures, "score": None})
    except (ValueError, KeyError, TypeError, OSError):
        raise AfaError(f"{index}: it or a picture beside it is broken; delete {index.parent}") from None
    return examples


def collect_page(
    report: dict[str, Any], metrics: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Gather what the template shows.

    Args:
        report: What `collect_report` gives.
        metrics: What `Run.metrics` gives.
        examples: What `read_examples` gives.

    Returns:
        `report` and `examples`; `columns`: names of the pictures that an example has; `colors`: (class, RGB) of the
        legend; `charts` of the training, None without a step; `scores`: those by class; `environment`: what is known
        of it, by name; `parameters`, `data`: texts, or None; `gain`: of the segmentation over the CAM, points;
        `confusion`: as of `confusion_view`; `ranked`: `worst` and `best` images, as of `with_links`; `explorer`: where
        the explorer shows an image.
    """
    classes, count = report["classes"], report["num_parameters"]
    parameters = None if count is None else f"{count / 1e6:.1f} M parameters"
    environment = {key: report[key] for key in ("device", "processes", "precision")}
    environment |= {"parameters": parameters, "torch": report["torch"], "Python": report["python"]}
    environment |= {key: report[key] for key in ("afa", "commit")}
    return {
        "report": report,
        "examples": examples,
        "columns": picture_columns(examples),
        "colors": class_colors(classes, examples),
        "charts": _training_charts(report["config"]["schedule"], metrics),
        "scores": _class_scores(report),
        "environment": {key: value for key, value in environment.items() if value is not None},
        "parameters": parameters,
        "data": Path(report["config"]["data"]["root"]).name,
        "gain": _difference(report["miou"], report["cam_miou"]),
        "confusion": confusion_view(classes, report["confusion"]),
        "ranked": {side: with_links(report[side]) for side in ("worst", "best")},
        "explorer": explorer_link("NAME"),
    }


def picture_columns(examples: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the pictures that an example has, in the order of the method."""
    return [key for key in _COLUMNS if any(key in example["pictures"] for example in examples)]


def class_colors(classes: Sequence[str], examples: Sequence[dict[str, Any]]) -> list[tuple[str, tuple[int, int, int]]]:
    """The legend: name and color of the classes, of many only those that the examples are tagged with."""
    tagged, palette = {tag for example in examples for tag in example["tags"]}, voc_palette().tolist()
    return [
        (name, tuple(palette[value % IGNORE_INDEX]))
        for value, name in enumerate(classes, start=1)
        if len(classes) <= _LEGEND_LIMIT or name in tagged
    ]


def _training_charts(schedule: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Wide charts and small ones; None where no step is logged."""
    train = [line for line in metrics if line["kind"] == "train"]
    if not train:
        return None

    def logged(name: str, color: str, key: str) -> Series:
        return Series(name, color, [(p["step"], p[key]) for p in train if isinstance(p.get(key), int | float)])

    def scored(kind: str) -> Series:
        lines = [line for line in metrics if line["kind"] == "eval" and line.get("labels") == kind]
        return Series(_KIND_NAMES[kind], kind, [(p["step"], p["miou"]) for p in lines if p.get("miou") is not None])

    boundaries = [(schedule["cls_steps"], "initial labels"), (schedule["refined_steps"], "refined labels")]
    boundaries = boundaries[schedule["cls_steps"] == schedule["refined_steps"] :]
    losses = [
        logged("classification", "cls", "cls_loss"),
        logged("segmentation", "seg", "seg_loss"),
        logged("affinity", "propagated", "aff_loss"),
    ]
    wide = [line_chart(losses, title="Losses", boundaries=boundaries)]
    evaluations = [scored(kind) for kind in LABEL_KINDS]
    if max(len(series.points) for series in evaluations) > 1:
        wide.append(line_chart(evaluations, title="mIoU in percent", boundaries=boundaries, smooth=False))
    singles = [
        ("Total loss", logged("total", "ink", "loss")),
        *((f"{each.name.capitalize()} loss", each) for each in (*losses, logged("regularization", "ink", "reg_loss"))),
        ("Learning rate of the encoder", logged("learning rate", "ink", "learning_rate")),
        ("Images per second", logged("images per second", "ink", "images_per_second")),
    ]
    unnamed = [(step, "") for step, _ in boundaries]
    panels = [
        line_chart([series], title=title, boundaries=unnamed, smooth=series.name != "learning rate")
        for title, series in singles
    ]
    return {"wide": [chart for chart in wide if chart], "panels": [chart for chart in panels if chart]}


def _class_scores(report: dict[str, Any]) -> dict[str, Any]:
    """The names of labels that are `missing`; `rows` of scores and gain by class, the mean last; and their `chart`."""
    present = [kind for kind in LABEL_KINDS if report["per_class"][kind]]
    missing = {kind: name for kind, name in _KIND_NAMES.items() if kind not in present}
    tables = [report["per_class"][kind] for kind in present]
    rows = [(name, [table.get(name) for table in tables]) for name in ("background", *report["classes"])]
    rows = [(name, figures) for name, figures in rows if any(value is not None for value in figures)]
    ranked = sorted(rows, key=lambda row: -(row[1][0] or 0.0))
    series = [(_KIND_NAMES[kind], kind) for kind in present]
    means = [report["miou" if kind == "seg" else f"{kind}_miou"] for kind in present]
    return {
        "missing": missing,
        "rows": [
            {"name": name, "figures": figures, "gain": None if missing else _difference(figures[0], figures[-1])}
            for name, figures in [*rows, ("mean", means)]
        ],
        "chart": bar_chart(ranked, title="IoU in percent", series=series),
    }


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
