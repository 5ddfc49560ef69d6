"""Runs side by side, beside the paper's figures: as text, as a page with charts, and as JSON.

Runs that differ by their seed alone are one row, with mean and spread. What each run scored is read from its folder.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any, Final, NamedTuple

from afa.errors import AfaError
from afa.report.charts import bar_chart
from afa.report.collect import collect_report
from afa.report.paper_tables import PaperRow, PaperTable, find_table
from afa.report.render import fixed, render_page
from afa.runs.files import write_whole
from afa.runs.run import Run

_LABELS: Final = ("seg", "cam", "propagated", "initial", "refined")
_COLORS: Final = ("seg", "propagated", "cam")
"""Labels with a color of their own on the page."""

_TITLE: Final = "mIoU in percent"
_PROTOCOLS: Final = ("multiscale+crf", "multiscale", "single+crf", "single")
_SAME_RUN: Final = {"train": ("seed", "label", "device"), "data": ("workers", "cache_gib")}
"""Keys in which runs of one row may differ."""
_ENCODERS: Final = ("backbone", "second_backbone")


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

    @property
    def place(self) -> tuple[object, ...]:
        """Key that sorts columns."""
        order = _LABELS.index(self.labels)
        return order, self.split != "val", not self.is_plain, self.refinement, self.protocol

    @property
    def is_plain(self) -> bool:
        """Whether it is at a single scale, without a CRF."""
        return self.protocol in ("", "single")

    def __str__(self) -> str:
        """Head of the column."""
        protocol = "" if self.is_plain else self.protocol
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
        backbone: Name of the encoder, or of both.
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
    """Read runs, finished or not, evaluated or not, and put those together that differ by their seed alone.

    The groups come in the order of their first runs.

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
        label = report["config"]["train"]["label"]
        key = json.dumps([report["classes"], label, _without_seed(report["config"])], sort_keys=True)
        members.setdefault(key, []).append((report, dict(_read_scores(run, report["config"]))))
    return [_group(each) for each in members.values()]


def table_rows(groups: Sequence[RunGroup], table: PaperTable) -> list[TableRow]:
    """The lines of a table: the paper's rows in its order, as far as runs name them, then variants."""
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
    """Compare the order of the lines with the order in the paper, pair by pair.

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


def collect_tables(groups: Sequence[RunGroup]) -> list[dict[str, Any]]:
    """What text and page show: each of the paper's tables that a run names, and one table of all other runs.

    Returns:
        `title`, `head`, `rows` of texts, `notes`, and `chart` as `bar_chart` gives it, of each table.
    """
    named = sorted({g.table.number: g.table for g in groups if g.table}.values(), key=lambda table: table.number)
    rest = [group for group in groups if group.table is None]
    tables = [_paper_table(table, groups) for table in named] + ([_other_runs(rest)] if rest else [])
    several = any(len(group.runs) > 1 for group in groups)
    note = f"mIoU in percent{'; ± standard deviation over seeds' if several else ''}; – not evaluated"
    return [table | {"notes": [note, *table["notes"]]} for table in tables]


def render_text(groups: Sequence[RunGroup]) -> str:
    """Tables for a terminal: one for each of the paper's that a run names, and one of all other runs."""
    blocks = []
    for table in collect_tables(groups):
        cells = [table["head"], *table["rows"]]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
        blocks.append("\n".join([table["title"], *(line.rstrip() for line in lines), *table["notes"]]))
    return "\n\n".join(blocks) + "\n"


def to_json(groups: Sequence[RunGroup]) -> list[dict[str, Any]]:
    """What compare.json holds: an object a group."""
    result = []
    for group in groups:
        row = group.table.row(group.name) if group.table else None
        scores = ((column, score._replace(mean=round(score.mean, 3))) for column, score in group.scores.items())
        entry = {field.name: getattr(group, field.name) for field in fields(group) if field.name != "scores"}
        entry |= {"table": group.table.number if group.table else None, "runs": list(group.runs)}
        entry["paper"] = {"train": row.train, "val": row.val} if row else None
        entry["figures"] = [column._asdict() | score._asdict() for column, score in scores]
        result.append(entry)
    return result


def write_comparison(groups: Sequence[RunGroup], out: Path) -> Path:
    """Write OUT/compare.html, with charts, and OUT/compare.json, each in one piece; returns the page.

    Raises:
        AfaError: The folder cannot be written.
    """
    write_whole(out / "compare.json", json.dumps(to_json(groups), indent=2) + "\n")
    write_whole(out / "compare.html", render_page("compare", tables=collect_tables(groups)))
    return out / "compare.html"


def _group(members: Sequence[tuple[dict[str, Any], dict[Column, float]]]) -> RunGroup:
    reports = [report for report, _ in members]
    first = reports[0]
    columns = sorted({column for _, scores in members for column in scores}, key=lambda column: column.place)
    scores = {}
    for column in columns:
        values = [found[column] for _, found in members if column in found]
        spread = statistics.stdev(values) if len(values) > 1 else None
        scores[column] = Score(statistics.fmean(values), spread, len(values))
    label = first["config"]["train"]["label"]
    named = find_table(label)
    name = named[1] if named else label or first["run"]
    if first["config"]["train"]["supervision"] == "masks" and (named is None or named[1] != "full supervision"):
        name += " (trained on masks)"
    steps = [report["steps"] for report in reports if report["steps"] is not None]
    counts = [report["num_images"] for report in reports if report["num_images"]]
    return RunGroup(
        name=name,
        table=named[0] if named else None,
        runs=tuple(report["run"] for report in reports),
        scores=scores,
        backbone=" + ".join(filter(None, (first["config"]["model"].get(key) for key in _ENCODERS))),
        steps=max(steps) if steps else None,
        complete=all(report["complete"] for report in reports),
        num_images=max(counts) if counts else None,
        machine=", ".join(sorted({str(report["device"] or "unknown") for report in reports})),
    )


def _without_seed(config: dict[str, Any]) -> dict[str, Any]:
    return {
        section: {key: value for key, value in values.items() if key not in _SAME_RUN.get(section, ())}
        for section, values in config.items()
        if isinstance(values, dict)
    }


def _read_scores(run: Path, config: dict[str, Any]) -> Iterator[tuple[Column, float]]:
    """Every evaluation in RUN/evaluation, whatever its file is called."""
    for path, figures in Run(run).all_scores():
        try:
            labels, miou = figures["labels"], figures["miou"]
        except KeyError:
            raise AfaError(f"{path}: not what afa evaluate --json writes; write it again or delete it") from None
        if labels in _LABELS and miou is not None:
            split = "train" if "train" in Path(figures.get("list", config["data"]["val_list"])).stem else "val"
            protocol = figures.get("protocol", "single") if labels == "seg" else ""
            yield Column(labels, figures.get("refinement", ""), protocol, split), float(miou)


def _figure(group: RunGroup, table: PaperTable, row: PaperRow, split: str) -> Score | None:
    """The figure here that a row of the paper speaks of."""
    protocols = ("",) if table.labels != "seg" else (row.protocol,) if row.protocol else _PROTOCOLS
    columns = (Column(table.labels, row.refinement, protocol, split) for protocol in protocols)
    return next((group.scores[column] for column in columns if column in group.scores), None)


def _paper_table(table: PaperTable, groups: Sequence[RunGroup]) -> dict[str, Any]:
    """One of the paper's tables with the runs that name it; its chart has bars here and in the paper."""
    lines = table_rows(groups, table)
    splits = [split for split in ("val", "train") if any(split in {**r.here, **r.paper} for r in lines)]
    columns = _columns([line.group for line in lines])
    rows, bars = [], []
    for line in lines:
        figures = [(str(line.here.get(split, "–")), fixed(line.paper.get(split))) for split in splits]
        rows.append([line.name, *(text for pair in figures for text in pair), *_cells(line.group, columns)])
        split = "val" if "val" in line.here or "train" not in line.here else "train"
        here = line.here.get(split)
        bars.append((line.name, [here.mean if here else None, line.paper.get(split)]))
    count, broken = broken_orders(lines)
    return {
        "title": f"Table {table.number}: {table.title}",
        "head": ["", *(f"{where} {split}" for split in splits for where in ("here", "paper")), *_heads(columns)],
        "rows": rows,
        "notes": [f"order as in the paper: {count - len(broken)} of {count} pairs", *broken] if count else [],
        "chart": bar_chart(bars, title=_TITLE, series=[("here", "seg"), ("paper", "propagated")]),
    }


def _other_runs(groups: Sequence[RunGroup]) -> dict[str, Any]:
    """The runs that name no table; their chart has a bar a kind of label."""
    columns = _columns(groups)
    shown = [c for c in columns if c.labels in _COLORS and not c.refinement and c.split == "val" and c.is_plain]
    bars = [(group.name, [group.scores[c].mean if c in group.scores else None for c in shown]) for group in groups]
    return {
        "title": "Runs",
        "head": ["", *_heads(columns)],
        "rows": [[group.name, *_cells(group, columns)] for group in groups],
        "notes": [],
        "chart": bar_chart(bars, title=_TITLE, series=[(str(c), c.labels) for c in shown]),
    }


def _columns(groups: Sequence[RunGroup]) -> list[Column]:
    return sorted({column for group in groups for column in group.scores}, key=lambda column: column.place)


def _heads(columns: Sequence[Column]) -> list[str]:
    return [*map(str, columns), "images", "backbone", "steps", "runs", "machine"]


def _cells(group: RunGroup, columns: Sequence[Column]) -> list[str]:
    steps = fixed(group.steps, "{:,}")
    return [
        *(str(group.scores.get(column, "–")) for column in columns),
        fixed(group.num_images, "{}"),
        group.backbone,
        steps if group.complete else f"{steps}, unfinished",
        str(len(group.runs)),
        group.machine,
    ]
