"""Runs side by side, beside the paper's figures: as text, as a page with charts, and as JSON.

Runs that differ by their seed alone are one row, with mean and spread. What each run scored is read from its folder.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any, Final, NamedTuple

from afa.errors import AfaError
from afa.report.charts import bar_chart
from afa.report.collect import collect_report
from afa.report.paper_tables import PaperRow, PaperTable, find_table
from afa.report.style import STYLE
from afa.training.checkpoint import write_atomically

_LABELS: Final = ("seg", "cam", "propagated", "initial", "refined")
_PROTOCOLS: Final = ("multiscale+crf", "multiscale", "single+crf", "single")
_SAME_RUN: Final = {"train": ("seed", "label", "device"), "data": ("root", "workers", "cache_gib")}
"""Keys in which runs of one row may differ."""


class Column(NamedTuple):
    """What a figure is of.

    Attributes:
        labels: What was scored.
        refinement: What pseudo labels went through before.
        protocol: Of the segmentation; empty for pseudo labels.
        split: `train` or `val`: the images.
    """

    labels: str
    refinement: str
    protocol: str
    split: str

    def __str__(self) -> str:
        """Head of the column."""
        protocol = "" if self.protocol in ("", "single") else self.protocol
        words = [self.labels, self.refinement.replace("+", ", "), protocol, "train" if self.split == "train" else ""]
        return " ".join(word for word in words if word)


class Score(NamedTuple):
    """Figures of the runs of a row.

    Attributes:
        mean: Percent.
        spread: Standard deviation over the runs, points; None for a single run.
        num_runs: How many runs have the figure.
    """

    mean: float
    spread: float | None
    num_runs: int

    def __str__(self) -> str:
        """Text of a cell."""
        return f"{self.mean:.1f}" if self.spread is None else f"{self.mean:.1f} ± {self.spread:.1f}"


@dataclass(frozen=True)
class RunGroup:
    """Runs of the same configuration but for the seed.

    Attributes:
        name: Row of the paper's table, or `train.label`, or the folder's name.
        table: Table that the label names.
        runs: Folder names.
        scores: Figures by column.
        backbone: Name of the encoder.
        steps: Training steps, of the longest run.
        complete: Whether all runs have their final weights.
        num_images: Images of the segmentation's evaluation, else of another one.
        machine: Devices they ran on.
    """

    name: str
    table: PaperTable | None
    runs: tuple[str, ...]
    scores: dict[Column, Score]
    backbone: str
    steps: int | None
    complete: bool
    num_images: int | None
    machine: str


class TableRow(NamedTuple):
    """A line of a table: a group, and the evaluation that the paper's row speaks of.

    Attributes:
        name: Of the line.
        group: Runs.
        here: Figure by split, as far as it was evaluated.
        paper: The paper's figure by split.
    """

    name: str
    group: RunGroup
    here: dict[str, Score]
    paper: dict[str, float]


def compare_runs(runs: Sequence[Path]) -> list[RunGroup]:
    """Read runs and put those together that differ by their seed alone.

    Args:
        runs: Run folders, finished or not, evaluated or not.

    Returns:
        Groups in the order of their first runs.

    Raises:
        AfaError: A folder is no run, is given twice, or one of its files is broken.
    """
    members: dict[str, list[tuple[dict[str, Any], dict[Column, float]]]] = {}
    seen: set[Path] = set()
    for run in runs:
        if run.resolve() in seen:
            raise AfaError(f"{run}: given twice; name each run once")
        seen.add(run.resolve())
        report = collect_report(run)
        key = json.dumps([report["classes"], _label(report), _without_seed(report["config"])], sort_keys=True)
        members.setdefault(key, []).append((report, dict(_read_scores(run, report["config"]))))
    return [_group(each) for each in members.values()]


def table_rows(groups: Sequence[RunGroup], table: PaperTable) -> list[TableRow]:
    """The lines of a table: the paper's rows in its order, as far as runs name them, then variants.

    Args:
        groups: What `compare_runs` gives.
        table: One of the paper's.
    """
    lines: list[tuple[int, TableRow]] = []
    for group in (group for group in groups if group.table is table):
        own = table.row(group.name) or PaperRow(group.name, None, None, protocol="")
        for row in (own, *(row for row in table.rows if row.run_of == own.name)):
            here = {split: score for split in ("val", "train") if (score := _figure(group, table, row, split))}
            if row is own or here:
                figures = (("val", row.val), ("train", row.train))
                paper = {split: value for split, value in figures if value is not None}
                order = table.rows.index(row) if row in table.rows else len(table.rows)
                lines.append((order, TableRow(row.name, group, here, paper)))
    return [line for _, line in sorted(lines, key=lambda entry: entry[0])]


def broken_orders(lines: Sequence[TableRow]) -> tuple[int, list[str]]:
    """Compare the order of the lines here with that in the paper, pair by pair.

    Args:
        lines: What `table_rows` gives.

    Returns:
        How many pairs can be compared, and a text for each whose order is another here.
    """
    count, broken = 0, []
    for one, other in combinations(lines, 2):
        splits = [s for s in ("val", "train") if all(s in each.here and s in each.paper for each in (one, other))]
        for split in splits[:1]:
            worse, better = (one, other) if one.paper[split] < other.paper[split] else (other, one)
            count += 1
            if worse.here[split].mean >= better.here[split].mean:
                broken.append(
                    f"{worse.name} ({worse.here[split]}) is not below {better.name} ({better.here[split]}); "
                    f"paper: {worse.paper[split]:.1f}, {better.paper[split]:.1f}"
                )
    return count, broken


def render_text(groups: Sequence[RunGroup]) -> str:
    """Tables for a terminal: one for each of the paper's that a run names, and one of all other runs.

    Args:
        groups: What `compare_runs` gives.
    """
    blocks = []
    for title, head, rows, notes in _tables(groups):
        cells = [head, *rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
        blocks.append("\n".join([title, *(line.rstrip() for line in lines), *notes]))
    return "\n\n".join(blocks) + "\n"


def to_json(groups: Sequence[RunGroup]) -> list[dict[str, Any]]:
    """What compare.json holds: an object a group.

    Args:
        groups: What `compare_runs` gives.
    """
    result = []
    for group in groups:
        row = group.table.row(group.name) if group.table else None
        figures = [
            {**column._asdict(), "mean": round(score.mean, 3), "spread": score.spread, "num_runs": score.num_runs}
            for column, score in group.scores.items()
        ]
        result.append(
            {
                "name": group.name,
                "table": group.table.number if group.table else None,
                "paper": {"train": row.train, "val": row.val} if row else None,
                "runs": list(group.runs),
                "figures": figures,
                "backbone": group.backbone,
                "steps": group.steps,
                "complete": group.complete,
                "num_images": group.num_images,
                "machine": group.machine,
            }
        )
    return result


def write_comparison(groups: Sequence[RunGroup], out: Path) -> Path:
    """Write OUT/compare.html, with charts, and OUT/compare.json, each in one piece.

    Args:
        groups: What `compare_runs` gives.
        out: Made if missing.

    Returns:
        Path of the page.

    Raises:
        AfaError: The folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "compare.json", json.dumps(to_json(groups), indent=2) + "\n")
        write_atomically(out / "compare.html", _page(groups))
    except OSError as error:
        raise AfaError(f"{out}: cannot be written ({error.strerror or error}); choose another folder") from None
    return out / "compare.html"


def _group(members: Sequence[tuple[dict[str, Any], dict[Column, float]]]) -> RunGroup:
    reports = [report for report, _ in members]
    first = reports[0]
    columns = sorted({column for _, scores in members for column in scores}, key=_order)
    scores = {}
    for column in columns:
        values = [found[column] for _, found in members if column in found]
        spread = statistics.stdev(values) if len(values) > 1 else None
        scores[column] = Score(statistics.fmean(values), spread, len(values))
    label = _label(first)
    named = find_table(label)
    name = named[1] if named else label or first["run"]
    if first["config"]["train"].get("supervision") == "masks" and (named is None or named[1] != "full supervision"):
        name += " (trained on masks)"
    steps = [report["steps"] for report in reports if report["steps"] is not None]
    counts = [report["num_images"] for report in reports if report["num_images"]]
    return RunGroup(
        name=name,
        table=named[0] if named else None,
        runs=tuple(report["run"] for report in reports),
        scores=scores,
        backbone=first["config"]["model"]["backbone"],
        steps=max(steps) if steps else None,
        complete=all(report["complete"] for report in reports),
        num_images=max(counts) if counts else None,
        machine=", ".join(sorted({str(report["device"] or "unknown") for report in reports})),
    )


def _label(report: dict[str, Any]) -> str:
    return str(report["config"]["train"].get("label", ""))


def _without_seed(config: dict[str, Any]) -> dict[str, Any]:
    return {
        section: {key: value for key, value in values.items() if key not in _SAME_RUN.get(section, ())}
        for section, values in config.items()
        if isinstance(values, dict)
    }


def _read_scores(run: Path, config: dict[str, Any]) -> Iterator[tuple[Column, float]]:
    """Every evaluation in RUN/evaluation, whatever its file is called."""
    for path in sorted((run / "evaluation").glob("*.json")):
        try:
            figures = json.loads(path.read_text(encoding="utf-8"))
            labels, miou = figures["labels"], figures["miou"]
        except (ValueError, KeyError, TypeError):
            raise AfaError(f"{path}: not what afa evaluate --json writes; write it again or delete it") from None
        if labels in _LABELS and miou is not None:
            split = "train" if "train" in Path(figures.get("list", config["data"]["val_list"])).stem else "val"
            protocol = figures.get("protocol", "single") if labels == "seg" else ""
            yield Column(labels, figures.get("refinement", ""), protocol, split), float(miou)


def _order(column: Column) -> tuple[object, ...]:
    single = column.protocol in ("", "single")
    return _LABELS.index(column.labels), column.split != "val", not single, column.refinement, column.protocol


def _figure(group: RunGroup, table: PaperTable, row: PaperRow, split: str) -> Score | None:
    """The figure here that a row of the paper speaks of."""
    protocols = ("",) if table.labels != "seg" else (row.protocol,) if row.protocol else _PROTOCOLS
    columns = (Column(table.labels, row.refinement, protocol, split) for protocol in protocols)
    return next((group.scores[column] for column in columns if column in group.scores), None)


def _tables(groups: Sequence[RunGroup]) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """Title, heads, rows of cells and notes of each table."""
    several = any(len(group.runs) > 1 for group in groups)
    note = [f"mIoU in percent{'; ± standard deviation over seeds' if several else ''}; – not evaluated"]
    for table in sorted({g.table.number: g.table for g in groups if g.table}.values(), key=lambda each: each.number):
        lines = table_rows(groups, table)
        splits = [split for split in ("val", "train") if any(split in {**r.here, **r.paper} for r in lines)]
        others = _columns([line.group for line in lines])
        head = ["", *(f"{where} {split}" for split in splits for where in ("here", "paper"))]
        rows = []
        for line in lines:
            cells = [line.name]
            for split in splits:
                paper = line.paper.get(split)
                cells += [str(line.here.get(split, "–")), "–" if paper is None else f"{paper:.1f}"]
            rows.append(cells + _cells(line.group, others))
        count, broken = broken_orders(lines)
        order = [f"order as in the paper: {count - len(broken)} of {count} pairs", *broken] if count else []
        title = f"Table {table.number}: {table.title}"
        yield title, head + _heads(others), rows, note + order
    rest = [group for group in groups if group.table is None]
    if rest:
        columns = _columns(rest)
        yield "Runs", ["", *_heads(columns)], [[group.name, *_cells(group, columns)] for group in rest], note


def _columns(groups: Sequence[RunGroup]) -> list[Column]:
    return sorted({column for group in groups for column in group.scores}, key=_order)


def _heads(columns: Sequence[Column]) -> list[str]:
    return [*map(str, columns), "images", "backbone", "steps", "runs", "machine"]


def _cells(group: RunGroup, columns: Sequence[Column]) -> list[str]:
    steps = "–" if group.steps is None else f"{group.steps:,}"
    return [
        *(str(group.scores.get(column, "–")) for column in columns),
        "–" if group.num_images is None else str(group.num_images),
        group.backbone,
        steps if group.complete else f"{steps}, unfinished",
        str(len(group.runs)),
        group.machine,
    ]


def _page(groups: Sequence[RunGroup]) -> str:
    sections = []
    for title, head, rows, notes in _tables(groups):
        cells = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
            for row in rows
        )
        heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
        table = (
            f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>'
            f"<p class='note'>{'<br>'.join(map(escape, notes))}</p>"
        )
        sections.append(f"<section><h2>{escape(title)}</h2>{table}{_chart(title, groups)}</section>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>afa comparison</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        "<header><p class='kind'>afa comparison</p><h1>Runs side by side</h1><p>Figures of these runs beside those of "
        "the paper, which were measured on PASCAL VOC 2012 with MiT-B1.</p></header>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _chart(title: str, groups: Sequence[RunGroup]) -> str:
    """Bars of a table: here and in the paper, or for other runs each kind of label."""
    table = next((g.table for g in groups if g.table and title == f"Table {g.table.number}: {g.table.title}"), None)
    if table is not None:
        bars = []
        for line in table_rows(groups, table):
            split = "val" if "val" in line.here or "train" not in line.here else "train"
            here = line.here.get(split)
            bars.append((line.name, [here.mean if here else None, line.paper.get(split)]))
        return bar_chart(bars, title="mIoU in percent", series=[("here", "seg"), ("paper", "propagated")])
    colors = {"seg": "seg", "propagated": "propagated", "cam": "cam"}
    rest = [group for group in groups if group.table is None]
    plain = [c for c in _columns(rest) if c.labels in colors and not c.refinement and c.protocol in ("", "single")]
    columns = [column for column in plain if column.split == "val"]
    bars = [
        (group.name, [score.mean if (score := group.scores.get(column)) else None for column in columns])
        for group in rest
    ]
    return bar_chart(bars, title="mIoU in percent", series=[(str(c), colors[c.labels]) for c in columns])
