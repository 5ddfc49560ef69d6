"""The confusion matrix as a page shows it."""

import numpy as np
import pytest

from afa.report.confusion import confusion_view


def test_rows_are_shares_of_their_class_and_confusions_are_ranked() -> None:
    view = confusion_view(["cat", "dog"], [[80, 15, 5], [10, 30, 0], [0, 0, 0]])
    assert view is not None
    assert [[cell.text for cell in row["cells"]] for row in view["rows"]] == [
        ["80", "15", "5"], ["25", "75", ""], ["", "", ""]
    ]  # fmt: skip
    assert [(each["truth"], each["prediction"]) for each in view["pairs"]] == [
        ("cat", "background"), ("background", "cat"), ("background", "dog")
    ]  # fmt: skip
    assert (view["pairs"][0]["share"], view["pairs"][0]["part"]) == (25.0, pytest.approx(100 / 3))
    assert view["rows"][1]["cells"][0].words == "25.0 % of the pixels of cat\nare taken for background"


def test_of_many_classes_those_that_are_confused_are_shown() -> None:
    pixels = np.eye(121, dtype=int) * 100
    pixels[7, 90] = pixels[90, 7] = 40
    view = confusion_view([str(i) for i in range(1, 121)], pixels.tolist())
    assert view is not None
    names = [row["name"] for row in view["rows"]]
    assert {"7", "90"} <= set(names)
    assert len(names) + view["hidden"] == 121
    assert not any(cell.text for row in view["rows"] for cell in row["cells"])
    assert len(view["pairs"]) == 2


@pytest.mark.parametrize("pixels", [None, [], [[0, 0], [0, 0]], [[5]], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
def test_nothing_scored_and_other_classes_show_no_matrix(pixels: list[list[int]] | None) -> None:
    assert confusion_view(["cat"], pixels) is None
