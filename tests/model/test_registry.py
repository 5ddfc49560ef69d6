"""The registry names what it builds; the page shows the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from afa.errors import AfaError
from afa.model.registry import BACKBONES, build_backbone, table


def test_every_name_builds_the_architecture_that_it_says() -> None:
    for name, spec in BACKBONES.items():
        with torch.device("meta"):
            backbone = build_backbone(name)
        assert backbone.channels[-1] == (spec.size.channels[-1] if spec.kind == "mit" else spec.size.width)
        assert (
            bool(spec.weights) == bool(spec.license) == (not name.endswith(("_mini", "mit_tiny", "v2_tiny", "y_reg")))
        )


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("dinov2_smal_reg", "did you mean dinov2_small_reg or dinov2_small or dinov2_base_reg?"),
        ("vit-small", "did you mean vit_small or deit_small or dinov3_small?"),
        ("mit_b9", "did you mean mit_b5 or mit_b4 or mit_b3?"),
        ("xyz", f"use one of {', '.join(BACKBONES)}"),
    ],
)
def test_unknown_name(name: str, suggestion: str) -> None:
    with pytest.raises(AfaError) as caught:
        build_backbone(name)
    more = " python -m afa.model.registry lists all" if suggestion.endswith("?") else ""
    assert str(caught.value) == f"model.backbone is {name!r}; {suggestion}{more}"


def test_mit_has_its_four_levels() -> None:
    with pytest.raises(AfaError, match=r"^model\.feature_levels is 2, .*4 stages"):
        build_backbone("mit_tiny", feature_levels=2)


def test_the_page_shows_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "backbones.md"
    assert table() in page.read_text(encoding="utf-8"), "run `python -m afa.model.registry` and paste what it prints"
