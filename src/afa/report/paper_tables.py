"""The paper's tables, of `templates/paper_tables.toml`: what it reports for rows that a run here can be put beside."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Final


@dataclass(frozen=True)
class PaperRow:
    """A row of a table, and which evaluation of a run it speaks of.

    Attributes:
        name: As `train.label` has it.
        train: mIoU on the training images, percent; None where the paper has none.
        val: The same on the validation images.
        refinement: What CAMs went through before they were scored, as `EvaluationResult.refinement` has it.
        protocol: Protocol of the segmentation; empty where the paper does not say.
        run_of: Name of the row whose run this is, evaluated in another way; empty where it takes its own.
    """

    name: str
    train: float | None = None
    val: float | None = None
    refinement: str = ""
    protocol: str = "single"
    run_of: str = ""


@dataclass(frozen=True)
class PaperTable:
    """A table.

    Attributes:
        number: Its number in the paper.
        title: What it compares.
        labels: What is scored, of `afa.evaluation.evaluate.LABELS`.
        rows: In the paper's order.
    """

    number: int
    title: str
    labels: str
    rows: tuple[PaperRow, ...]

    def row(self, name: str) -> PaperRow | None:
        """The row of a name; case, spaces and pluses do not matter. None if there is no such row."""
        return next((row for row in self.rows if _key(row.name) == _key(name)), None)


def find_table(label: str) -> tuple[PaperTable, str] | None:
    """The table and the row's name in a `train.label` such as `table3: AFA`; None where it names no table of the paper.

    The name need not be that of a row: a variant of one's own may stand in a table.

    >>> table, name = find_table("Table 3: afa")
    >>> table.row(name).val
    66.5
    """
    match = re.fullmatch(r"\s*table\s*(\d+)\s*:\s*(.*\S)\s*", label, flags=re.IGNORECASE)
    if match is None:
        return None
    table = next((table for table in PAPER_TABLES if table.number == int(match[1])), None)
    return None if table is None else (table, match[2])


def _key(name: str) -> str:
    return re.sub(r"[\s+]", "", name).casefold()


def _read_tables() -> tuple[PaperTable, ...]:
    text = files("afa.report").joinpath("templates", "paper_tables.toml").read_text(encoding="utf-8")
    return tuple(
        PaperTable(**table | {"rows": tuple(PaperRow(**row) for row in table["rows"])})
        for table in tomllib.loads(text)["table"]
    )


PAPER_TABLES: Final = _read_tables()
"""Figures in percent mIoU, in the paper's order."""
