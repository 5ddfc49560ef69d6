"""The page that shows a run: report.html, one file without scripts or anything to load, beside report.json.

Lays out what afa.report.collect and metrics.jsonl tell and what afa.report.examples drew. A run that is
unfinished gives a page that says what is missing and which command would add it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from afa.data.palette import voc_palette
from afa.report.charts import Series, bar_chart, line_chart
from afa.report.collect import LABEL_KINDS, collect_report, label_values, read_metrics
from afa.report.style import STYLE
from afa.training.checkpoint import write_atomically
from afa.types import IGNORE_INDEX

_COLUMNS = {
    "image": "Image",
    "cam": "CAM",
    "propagated": "Propagated CAM",
    "pseudo": "Pseudo label",
    "prediction": "Prediction",
    "truth": "Ground truth",
}
_KIND_NAMES = {"seg": "segmentation", "propagated": "propagated CAM", "cam": "CAM"}
_LEGEND_LIMIT = 30
"""With more classes than this, the legend has only those that the examples are tagged with."""


def write_report(run: Path) -> Path:
    """Write RUN/report.json and RUN/report.html, each in one piece.

    Args:
        run: Run folder, finished or not.

    Returns:
        Path of the page.

    Raises:
        AfaError: `run` is no run folder, or one of its files is broken.
    """
    report = collect_report(run)
    page = render_page(report, read_metrics(run), read_examples(run))
    write_atomically(run / "report.json", json.dumps(report, indent=2) + "\n")
    write_atomically(run / "report.html", page)
    return run / "report.html"


def read_examples(run: Path) -> list[dict[str, Any]]:
    """Load the pictures of RUN/examples for embedding.

    Args:
        run: Run folder.

    Returns:
        `name`, `tags` and `pictures` (picture name -> data URI) of each example; empty without an index.
    """
    folder = run / "examples"
    if not (folder / "index.json").is_file():
        return []
    examples = []
    for entry in json.loads((folder / "index.json").read_text(encoding="utf-8")):
        files = {key: folder / entry["folder"] / f"{key}.png" for key in _COLUMNS}
        pictures = {key: _data_uri(path) for key, path in files.items() if path.is_file()}
        examples.append({"name": entry["name"], "tags": entry["tags"], "pictures": pictures})
    return examples


def render_page(report: dict[str, Any], metrics: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> str:
    """Lay out the page.

    Args:
        report: What `collect_report` gives.
        metrics: What `read_metrics` gives.
        examples: What `read_examples` gives.

    Returns:
        A whole HTML document.
    """
    title = f"{report['run']} · afa run report"
    sections = (
        _header(report),
        _tiles(report),
        _section("Examples", _examples(report, examples)),
        _section("Training", _training(report, metrics)),
        _section("Intersection over union by class", _classes(report)),
        _section("Configuration and environment", _details(report)),
    )
    commit = report["report_commit"]
    made = f"Made by afa{f' at commit {commit[:12]}' if commit else ''}. The figures are also in report.json."
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + f"\n</main>\n<footer>{escape(made)}</footer>\n</body>\n</html>\n"
    )


def _header(report: dict[str, Any]) -> str:
    config, steps, max_steps = report["config"], report["steps"], report["config"]["schedule"]["max_steps"]
    if report["complete"]:
        badge = f'<span class="badge done">finished, {steps or max_steps:,} steps</span>'
    else:
        badge = f'<span class="badge open">unfinished, step {steps or 0:,} of {max_steps:,}</span>'
    facts = [
        f"{config['model']['backbone']}, {_parameters(report['num_parameters'])}"
        if report["num_parameters"]
        else config["model"]["backbone"],
        f"preset {config['preset']}",
        report["supervision"],
        f"{len(report['classes'])} classes" if report["classes"] else "",
        Path(config["data"]["root"]).name,
    ]
    return (
        f"<header><p class='kind'>afa run report</p><h1>{escape(report['run'])} {badge}</h1>"
        f"<p class='facts'>{escape(' · '.join(fact for fact in facts if fact))}</p>"
        f"<p>{_method(config)}</p></header>"
    )


def _method(config: dict[str, Any]) -> str:
    if config["train"]["supervision"] == "masks":
        return (
            "<b>Full supervision, for comparison:</b> the segmentation learned from the true masks of the training "
            "images. CAM and propagated CAM are shown as always, but nothing learned from them."
        )
    walk = {
        "affinity": ", propagated by an affinity learned from attention,",
        "attention": ", propagated by the attention,",
        "none": "",
    }[config["pseudo"]["propagation"]]
    return (
        f"Segmentation learned from image tags alone: class activation maps (CAM){walk} become pseudo labels; these "
        "train the segmentation."
    )


def _tiles(report: dict[str, Any]) -> str:
    miou, cam, propagated = report["miou"], report["cam_miou"], report["propagated_miou"]
    scale = (report["protocol"] or "").replace("single", "single scale").replace("multiscale", "multi-scale")
    protocol = f"{scale}, {report['num_images']:,} images" if report["num_images"] else ""
    device = report["device"]
    tiles: list[tuple[str, str | None, str, str, str]] = [
        ("Segmentation mIoU", _format(miou, "{:.1f}"), "%", protocol or "not evaluated yet", "lead"),
        ("CAM mIoU", _format(cam, "{:.1f}"), "%", "where the method starts", ""),
        ("Propagated CAM mIoU", _format(propagated, "{:.1f}"), "%", "after the random walk", ""),
        ("Gain over CAM", _format(_difference(miou, cam), "{:+.1f}"), "points", "segmentation − CAM", ""),
        ("Tag F1", _format(report["tag_f1"], "{:.1f}"), "%", "of the classifier", ""),
        ("Training time", *_duration(report["seconds_train"]), _steps(report["steps"]), ""),
        (
            "Throughput",
            _format(report["images_per_second"], "{:.3g}"),
            "images/s",
            "mean of the training",
            "",
        ),
        (
            "Device",
            device and device.removeprefix("NVIDIA "),
            "",
            f"torch {report['torch']}" if device else "",
            "text",
        ),
    ]
    cells = []
    for name, value, unit, note, kind in tiles:
        shown = f"{escape(value)} <small>{unit}</small>" if value is not None else '<span class="none">–</span>'
        cells.append(
            f'<div class="tile {kind}"><dt>{name}</dt><dd class="value">{shown}</dd>'
            f'<dd class="note">{escape(note)}</dd></div>'
        )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _examples(report: dict[str, Any], examples: Sequence[dict[str, Any]]) -> str:
    if not examples:
        return _missing(
            "No examples were drawn.",
            "They are drawn at the end of the training, unless train.example_images is 0.",
        )
    columns = [key for key in _COLUMNS if any(key in example["pictures"] for example in examples)]
    head = "".join(f"<span>{_COLUMNS[key]}</span>" for key in columns)
    rows = []
    for example in examples:
        name, tags = escape(example["name"]), "".join(f"<li>{escape(tag)}</li>" for tag in example["tags"])
        cells = []
        for key in columns:
            uri = example["pictures"].get(key)
            alt = escape(f"{_COLUMNS[key]} of {example['name']}")
            picture = f'<img src="{uri}" alt="{alt}" loading="lazy">' if uri else '<span class="hole">none</span>'
            cells.append(f"<figure>{picture}<figcaption>{_COLUMNS[key]}</figcaption></figure>")
        rows.append(
            f'<div class="example"><h3>{name}<ul class="tags" aria-label="tags">{tags}</ul></h3>'
            f'<div class="pictures">{"".join(cells)}</div></div>'
        )
    note = (
        "<p class='note'>CAM, propagated CAM and pseudo label are told the image's tags, listed beside its "
        "name; the prediction sees the image alone. Heat maps are stretched to each image's own range; bright is "
        "strong. Hatched pixels are ignored: the pseudo label, or the annotator, left them open.</p>"
    )
    return (
        f'<div class="examples" style="--columns:{len(columns)}">'
        f'<div class="pictures head" aria-hidden="true">{head}</div>{"".join(rows)}</div>'
        f"{_legend(report['classes'], examples)}{note}"
    )


def _legend(classes: Sequence[str], examples: Sequence[dict[str, Any]]) -> str:
    tagged = {tag for example in examples for tag in example["tags"]}
    palette = voc_palette()
    items = []
    for value, name in enumerate(classes, start=1):
        if len(classes) <= _LEGEND_LIMIT or name in tagged:
            red, green, blue = palette[value % IGNORE_INDEX]
            items.append(f'<li><i style="background:rgb({red},{green},{blue})"></i>{escape(name)}</li>')
    return f'<ul class="legend classes">{"".join(items)}<li><i class="hatched"></i>ignored</li></ul>'


def _training(report: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> str:
    train = [line for line in metrics if line["kind"] == "train"]
    if not train:
        return _missing("No training step is logged yet.", "metrics.jsonl is absent or empty.")

    def points(key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in train if isinstance(line.get(key), (int, float))]

    schedule = report["config"]["schedule"]
    boundaries = [(schedule["cls_steps"], "initial labels"), (schedule["refined_steps"], "refined labels")]
    boundaries = boundaries[schedule["cls_steps"] == schedule["refined_steps"] :]
    losses = [
        Series("classification", "cls", points("cls_loss")),
        Series("segmentation", "seg", points("seg_loss")),
        Series("affinity", "propagated", points("aff_loss")),
    ]
    energy = Series("regularization", "ink", points("reg_loss"))
    wide = line_chart(losses, title="Losses", boundaries=boundaries)
    evaluations = [Series(_KIND_NAMES[kind], kind, _scores_by_step(metrics, kind)) for kind in LABEL_KINDS]
    if max(len(series.points) for series in evaluations) > 1:
        wide += line_chart(evaluations, title="mIoU in percent", boundaries=boundaries, smooth=False)
    singles = [
        ("Total loss", Series("total", "ink", points("loss"))),
        *((f"{series.name.capitalize()} loss", series) for series in (*losses, energy) if series.points),
        ("Learning rate of the encoder", Series("learning rate", "ink", points("learning_rate"))),
        ("Images per second", Series("images per second", "ink", points("images_per_second"))),
    ]
    unnamed = [(step, "") for step, _ in boundaries]
    small = "".join(
        line_chart([series], title=title, boundaries=unnamed, smooth=series.name != "learning rate")
        for title, series in singles
    )
    note = (
        "<p class='note'>Dashed lines: from there on the segmentation learns from initial, then from refined "
        "pseudo labels. Bold curves are moving averages of the faint ones; the total is the weighted sum.</p>"
    )
    return f'<div class="wide">{wide}</div><div class="panels">{small}</div>{note}'


def _scores_by_step(metrics: Sequence[dict[str, Any]], kind: str) -> list[tuple[float, float]]:
    lines = [line for line in metrics if line["kind"] == "eval" and line.get("labels") == kind]
    return [(line["step"], line["miou"]) for line in lines if line.get("miou") is not None]


def _classes(report: dict[str, Any]) -> str:
    missing = [kind for kind in LABEL_KINDS if not report["per_class"][kind]]
    note = ""
    if missing:
        run = report["run"]
        commands = [
            f"afa evaluate {run} --data DIR --labels {kind} --json {run}/evaluation/{kind}.json" for kind in missing
        ]
        note = _missing(
            f"Not evaluated: {', '.join(_KIND_NAMES[kind] for kind in missing)}.",
            "These commands add it to this page:",
            commands=[*commands, f"afa report {run}"],
        )
    rows = label_values(report["per_class"], report["classes"])
    if not rows:
        return note
    present = [i for i, kind in enumerate(LABEL_KINDS) if kind not in missing]
    means = [report["miou"], report["propagated_miou"], report["cam_miou"]]
    series = [(_KIND_NAMES[LABEL_KINDS[i]], LABEL_KINDS[i]) for i in present]
    ranked = sorted(rows, key=lambda row: -(row[1][present[0]] or 0.0))
    bars = bar_chart(
        [(name, [values[i] for i in present]) for name, values in ranked], title="IoU in percent", series=series
    )
    head = "".join(f'<th scope="col">{name}</th>' for name, _ in series)
    head += '<th scope="col">gain over CAM</th>' if not missing else ""
    body = []
    for name, values in [*rows, ("mean", means)]:
        cells = "".join(f"<td>{_format(values[i], '{:.1f}') or '–'}</td>" for i in present)
        if not missing:
            change = _difference(values[0], values[2])
            sign = "" if change is None else "up" if change >= 0 else "down"
            cells += f'<td class="{sign}">{_format(change, "{:+.1f}") or "–"}</td>'
        body.append(f'<tr{" class=mean" if name == "mean" else ""}><th scope="row">{escape(name)}</th>{cells}</tr>')
    table = (
        f'<div class="scroll"><table><thead><tr><th scope="col">class</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
    return f'{note}<div class="pair">{bars}{table}</div>'


def _details(report: dict[str, Any]) -> str:
    environment = {
        "device": report["device"],
        "processes": report["processes"],
        "precision": report["precision"],
        "parameters": _parameters(report["num_parameters"]),
        "torch": report["torch"],
        "Python": report["python"],
        "afa": report["afa"],
        "commit": report["commit"],
    }
    known = {key: str(value) for key, value in environment.items() if value is not None}
    table = _properties(known) if known else _missing("The run has no environment.json.", "Training writes it.")
    groups = "".join(
        f"<div><h3>[{escape(section)}]</h3>"
        f"{_properties({key: json.dumps(value) for key, value in values.items()}, code=True)}</div>"
        for section, values in report["config"].items()
        if isinstance(values, dict)
    )
    return (
        f"{table}<details><summary>Resolved configuration, preset {escape(report['config']['preset'])}"
        f"</summary>"
        f'<div class="config">{groups}</div></details>'
    )


def _properties(values: dict[str, str], *, code: bool = False) -> str:
    open_tag, close_tag = ("<code>", "</code>") if code else ("", "")
    rows = (
        f'<tr><th scope="row">{escape(key)}</th><td>{open_tag}{escape(value)}{close_tag}</td></tr>'
        for key, value in values.items()
    )
    return f'<table class="plain"><tbody>{"".join(rows)}</tbody></table>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _missing(what: str, remedy: str, *, commands: Sequence[str] = ()) -> str:
    lines = "".join(f"<br><code>{escape(command)}</code>" for command in commands)
    return f'<p class="missing"><b>{escape(what)}</b> {escape(remedy)}{lines}</p>'


def _format(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _duration(seconds: float | None) -> tuple[str | None, str]:
    """Value and unit of a tile: 42 s, 5:07 min, 9:14 h."""
    if seconds is None:
        return None, ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}", "s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}", "min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d}", "h"


def _steps(steps: int | None) -> str:
    return "" if steps is None else f"{steps:,} steps"


def _parameters(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:.1f} M parameters"


def _data_uri(path: Path) -> str:
    """The picture as JPEG: a sixth of its PNG, and the page holds dozens."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, format="JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
