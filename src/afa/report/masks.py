"""The page of `afa masks`: examples, coverage, and the images to look at first."""

from __future__ import annotations

from pathlib import Path

from afa.config import Config
from afa.data.dataset import TaggedImages
from afa.inference.masks import MasksSummary
from afa.model.network import AfaNetwork
from afa.report.page import class_colors, picture_columns, read_examples
from afa.report.pictures import write_examples
from afa.report.render import render_page
from afa.runs.files import write_whole
from afa.runs.run import Run


def write_masks_page(
    network: AfaNetwork, images: TaggedImages, out: Path, summary: MasksSummary, *, config: Config, count: int
) -> Path:
    """Write OUT/examples, of `count` images, and OUT/masks.html; returns the page.

    The network, in eval mode, and the settings are those that made the masks that `summary` speaks of.
    """
    doubtful = [images.names.index(name) for name in list(summary.nothing)[: count // 2]]
    write_examples(network, images, out, config=config, count=count, trained=False, first=doubtful)
    examples = read_examples(Run(out).examples)
    page = out / "masks.html"
    values = {
        "name": out.resolve().name,
        "summary": summary,
        "config": config,
        "classes": images.classes,
        "examples": examples,
        "columns": picture_columns(examples),
        "colors": class_colors(images.classes, examples),
    }
    write_whole(page, render_page("masks", **values), durable=True)
    return page
