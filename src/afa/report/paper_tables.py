"""The paper's tables as data: what it reports for the rows that a run here can be put beside.

Holds figures only; which run belongs to which row is up to its `train.label`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
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
    train: float | None
    val: float | None
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
        """The row of a name, in which case, spaces and pluses do not matter; None if there is none."""
        return next((row for row in self.rows if _key(row.name) == _key(name)), None)


PAPER_TABLES: Final[tuple[PaperTable, ...]] = (
    PaperTable(
        1,
        "pooling of the classifier, CAM",
        "cam",
        (
            PaperRow("gap", 30.7, 31.1),
            PaperRow("top 50 %", 34.5, 34.8),
            PaperRow("top 25 %", 39.6, 39.7),
            PaperRow("top 10 %", 43.5, 43.6),
            PaperRow("gmp", 48.2, 48.3),
        ),
    ),
    PaperTable(
        2,
        "parts of the method, segmentation",
        "seg",
        (
            PaperRow("baseline", None, 46.7),
            PaperRow("PAR", None, 56.2),
            PaperRow("PAR AFA", None, 62.6),
            PaperRow("PAR AFA reg", None, 63.8),
            PaperRow("PAR AFA reg CRF", None, 66.0, protocol="multiscale+crf", run_of="PAR AFA reg"),
        ),
    ),
    PaperTable(
        3,
        "propagation, pseudo labels",
        "propagated",
        (
            PaperRow("w/o AFA", 54.4, 54.2),
            PaperRow("w/o propagation", 66.3, 64.4),
            PaperRow("prop. with MHSA", 58.3, 55.9),
            PaperRow("AFA", 68.7, 66.5),
        ),
    ),
    PaperTable(
        4,
        "refinement of the CAM",
        "cam",
        (
            PaperRow("CAM", 48.2, None),
            PaperRow("PAMR", 51.4, None, refinement="pamr", run_of="CAM"),
            PaperRow("PAR color only", 51.7, None, refinement="par_color", run_of="CAM"),
            PaperRow("PAR", 52.9, None, refinement="par", run_of="CAM"),
        ),
    ),
    PaperTable(
        5,
        "other methods with MiT-B1, segmentation",
        "seg",
        (
            PaperRow("full supervision", None, 78.7, protocol=""),
            PaperRow("RRM", None, 63.5, protocol=""),
            PaperRow("AFA", None, 66.0, protocol="multiscale+crf"),
        ),
    ),
    PaperTable(6, "COCO, segmentation", "seg", (PaperRow("AFA CRF", None, 38.9, protocol="multiscale+crf"),)),
)
"""Figures in percent mIoU. Source: Ru et al., CVPR 2022, Tables 1 to 6, on PASCAL VOC 2012 but for Table 6."""


def find_table(label: str) -> tuple[PaperTable, str] | None:
    """The table and the row's name in a label such as `table3: AFA`.

    Args:
        label: `train.label` of a run.

    Returns:
        None where the label names no table of the paper. The name need not be that of a row: a variant of one's own may
        stand in a table.

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
