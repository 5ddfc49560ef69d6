"""The confusion between classes and the scores of single images, as the page of a run shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from afa.report.charts import HeatCell, heat_matrix

EXPLORER_PORT: Final = 7860
"""Where `afa explore` serves if the port is free and it is not told otherwise; links of a page lead there."""

_MATRIX_CLASSES: Final = 50
"""Of more classes, the matrix has those that are confused most."""

_TEXTS: Final = 25
"""In a matrix of more classes, the colors alone must do."""

_WORST_PAIRS: Final = 12


def explorer_link(image: str) -> str:
    """Address of an image's view, where `afa explore` runs on this machine.

    >>> explorer_link("a b")
    'http://127.0.0.1:7860/?image=a+b'
    """
    return f"http://127.0.0.1:{EXPLORER_PORT}/?{urlencode({'image': image})}"


def confusion_view(classes: Sequence[str], pixels: Sequence[Sequence[int]] | None) -> dict[str, Any] | None:
    """Lay out a confusion matrix, each row as shares of its class.

    Args:
        classes: The C class names.
        pixels: (K, K) pixels, rows the ground truth, background first; None where nothing was scored.

    Returns:
        `rows`: as of `heat_matrix`, classes of the ground truth or of a prediction, of too many those that are confused
        most; `hidden`: how many are left out; `pairs`: the largest confusions, `truth`, `prediction`, `share` of the
        class's pixels and `part` of all wrong pixels, percent. None without a matrix of these classes or a pixel.
    """
    names, matrix = ("background", *classes), np.array(pixels or [[0]], dtype=np.float64)
    if matrix.shape != (len(names), len(names)) or not matrix.any():
        return None
    wrong = matrix - np.diag(matrix.diagonal())
    shares = 100 * matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    met = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    most = np.argsort(-(wrong.sum(0) + wrong.sum(1))[met], kind="stable")[:_MATRIX_CLASSES]
    shown = np.sort(met[most])
    worst = np.argsort(-np.where(wrong > 0, shares, 0.0), axis=None, kind="stable")[:_WORST_PAIRS]
    pairs = [(t, p) for t, p in (divmod(int(place), len(names)) for place in worst) if wrong[t, p]]
    return {
        "rows": _matrix([names[i] for i in shown], shares[np.ix_(shown, shown)], with_text=len(shown) <= _TEXTS),
        "hidden": len(met) - len(shown),
        "pairs": [
            {
                "truth": names[t],
                "prediction": names[p],
                "share": float(shares[t, p]),
                "part": float(100 * wrong[t, p] / wrong.sum()),
            }
            for t, p in pairs
        ],
    }


def _matrix(names: Sequence[str], shares: NDArray[np.float64], *, with_text: bool) -> list[dict[str, Any]]:
    def cell(truth: int, prediction: int) -> HeatCell:
        share = float(shares[truth, prediction])
        if share < 0.05:
            return HeatCell("", 0.0, "", own=truth == prediction)
        words = f"{share:.1f} % of the pixels of {names[truth]}\n" + (
            "are right" if truth == prediction else f"are taken for {names[prediction]}"
        )
        # The root makes the few percent visible that matter.
        heat = 0.7 * (share / 100 if truth == prediction else math.sqrt(share / 100))
        return HeatCell(f"{share:.0f}" if with_text and share >= 0.5 else "", heat, words, own=truth == prediction)

    places = range(len(names))
    return heat_matrix(names, [[cell(t, p) for p in places] for t in places])


def with_links(images: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores of images, each with its `link` to the explorer."""
    return [each | {"link": explorer_link(each["image"])} for each in images]
