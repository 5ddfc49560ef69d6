"""Compare afa with recorded outputs of the published implementation: `python bench/parity.py VECTORS.npz`.

Runs the functions of training and evaluation, or whole steps (`parity_step`), on the inputs of the file, prints error
and tolerance of every recorded output, and exits with status 1 on a miss. Sizes, numbers of classes, radii and scales
are read from the arrays and their keys.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from afa.config import PseudoConfig, ScheduleConfig
from afa.errors import AfaError
from afa.evaluation.confusion import ConfusionMatrix
from afa.kernels.par import refine, refinement_kernel
from afa.losses.affinity import affinity_loss
from afa.losses.segmentation import segmentation_loss
from afa.pseudo.affinity import affinity_label, token_label
from afa.pseudo.cam import fuse_scores
from afa.pseudo.labels import ignore_outside, merge_labels
from afa.pseudo.pipeline import initial_label
from afa.pseudo.refiner import Refiner
from afa.pseudo.scores import present_classes, present_scores, with_background
from afa.pseudo.walk import propagate
from afa.training.schedule import learning_rate
from afa.types import IGNORE_INDEX
from parity_step import WEIGHT, step_checks  # type: ignore[import-not-found]
from vectors import Check, Result, Vectors  # type: ignore[import-not-found]

_CAM_PREFIX = "cam_raw_"


def _refined(vectors: Vectors) -> Tensor:
    image, config = vectors["par_image"], PseudoConfig()
    scores = interpolate(vectors["par_scores"], size=image.shape[2:], mode="bilinear", align_corners=True)
    kernel = refinement_kernel(image, dilations=config.dilations)
    return refine(scores, kernel, dilations=config.dilations, iterations=config.iterations)


def _fused_cam(vectors: Vectors) -> Tensor:
    height, width = vectors["cam_out"].shape[2:]
    return fuse_scores([vectors[key] for key in vectors.keys_like(_CAM_PREFIX, such_as="1.0")], (height, width))


def _cam_label(vectors: Vectors) -> Tensor:
    cam, tags, config = vectors["refine_cam"], vectors["refine_tags"], PseudoConfig()
    low, high = (
        present_scores(with_background(cam, background), tags, softmax=False).argmax(1)
        for background in (config.background_low, config.background_high)
    )
    return ignore_outside(merge_labels(low, high), vectors["refine_box"])


def _initial_label(vectors: Vectors) -> Tensor:
    present = present_classes(vectors["refine_tags"])
    cam = present.foreground.gather(vectors["refine_cam"])
    refiner = Refiner(vectors["refine_image"], PseudoConfig())
    return initial_label(cam, present, refiner, vectors["refine_box"])


def _propagated(vectors: Vectors, background: float) -> Tensor:
    cam, tags, affinity = vectors["walk_cam"], vectors["walk_tags"], vectors["walk_affinity"]
    height, width = cam.shape[2:]
    config = PseudoConfig(affinity_radius=int(vectors["walk_radius"]))
    return propagate(cam, tags, affinity, grid=(height, width), background=background, config=config)


def _refined_in_box(vectors: Vectors) -> Tensor:
    scores = present_scores(vectors["refine2_scores"], vectors["refine_tags"], softmax=False)
    return Refiner(vectors["refine_image"], PseudoConfig()).in_box(scores, vectors["refine_box"])


def _affinity_label(vectors: Vectors) -> Tensor:
    label, tokens = vectors["afflabel_label"], vectors["afflabel_out"].shape[1]
    # The file holds no grid. Of the grids with that many tokens, take the one whose proportions are closest to the
    # label's.
    aspect = label.shape[1] / label.shape[2]
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    grid = min(grids, key=lambda grid: abs(math.log(grid[0] / grid[1] / aspect)))
    return affinity_label(token_label(label, grid), radius=int(vectors["afflabel_radius"]))


def _affinity_loss(vectors: Vectors) -> Tensor:
    return affinity_loss(vectors["affloss_affinity"], vectors["afflabel_out"])


def _segmentation_loss(vectors: Vectors) -> Tensor:
    return segmentation_loss(vectors["segloss_logits"], vectors["segloss_label"])


def _learning_rate(vectors: Vectors) -> Tensor:
    rates = [learning_rate(int(step), ScheduleConfig()) for step in vectors["lr_steps"]]
    return torch.tensor(rates, dtype=torch.float64)


def _miou(vectors: Vectors) -> Tensor:
    label, prediction = vectors["miou_label"], vectors["miou_pred"]
    counted = label != IGNORE_INDEX
    num_classes = 1 + int(torch.maximum(label[counted].max(), prediction[counted].max()))
    confusion = ConfusionMatrix(num_classes)
    confusion.update(label, prediction)
    return torch.tensor(confusion.miou(), dtype=torch.float64)


CHECKS: tuple[Check, ...] = (
    Check("par_out", "refinement, 10 iterations", 1e-5, _refined),
    Check("cam_out", "CAM over scales and flips", 1e-5, _fused_cam),
    Check("cam_label", "label of the CAM, unrefined", 0.0, _cam_label, measure="percent"),
    Check("refine_label", "initial label", 0.1, _initial_label, measure="percent"),
    Check(
        "walk_out_low",
        "random walk, low background",
        1e-5,
        lambda vectors: _propagated(vectors, PseudoConfig().background_low),
    ),
    Check(
        "walk_out_high",
        "random walk, high background",
        1e-5,
        lambda vectors: _propagated(vectors, PseudoConfig().background_high),
    ),
    Check("refine2_out", "refinement inside the valid box", 1e-4, _refined_in_box),
    Check("afflabel_out", "affinity label", 0.0, _affinity_label, measure="percent"),
    Check("affloss_out", "affinity loss", 1e-6, _affinity_loss),
    Check("segloss_out", "segmentation loss", 1e-5, _segmentation_loss),
    Check("lr_out", "learning rate of the encoder", 1e-12, _learning_rate),
    Check("miou_out", "mean intersection over union", 1e-12, _miou),
)
"""Every recorded output, in the order of the method; tolerances of labels are percentages of the elements."""


def compare(vectors: Vectors) -> list[Result]:
    """Run every check that the file has vectors for: those of single functions, or of whole steps.

    Args:
        vectors: Recorded inputs and outputs.

    Returns:
        One result per check.

    Raises:
        AfaError: A key is missing.
    """
    with_steps = any(key.startswith(WEIGHT) for key in vectors.arrays)
    return [check.run(vectors) for check in (step_checks(vectors) if with_steps else CHECKS)]


def format_table(results: Sequence[Result]) -> str:
    """Lay the results out as text, one line per key, under a heading."""
    rows = [("key", "what", "error", "tolerance", "")]
    for result in results:
        numbers = tuple(f"{number:.2g}{result.check.unit}" for number in (result.error, result.check.tolerance))
        rows.append((result.check.key, result.check.what, *numbers, "ok" if result.passed else "MISS"))
    a, b, c, d = (max(len(row[column]) for row in rows) for column in range(4))
    lines = [f"{row[0]:<{a}}  {row[1]:<{b}}  {row[2]:>{c}}  {row[3]:>{d}}  {row[4]}" for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def run(path: Path) -> int:
    """Compare with a file of vectors and print the table.

    Args:
        path: `.npz` file.

    Returns:
        Exit status: 0 where every output is within its tolerance, else 1.

    Raises:
        AfaError: The file cannot be read or lacks a key.
    """
    results = compare(Vectors(path))
    print(format_table(results))
    missed = dict.fromkeys(result.check.key for result in results if not result.passed)
    print(f"missed: {', '.join(missed)}" if missed else f"all {len(results)} outputs agree")
    return 1 if missed else 0


def main(arguments: Sequence[str]) -> int:
    """Command line: the path of one file.

    Returns:
        Exit status: as `run`; 2 after a one-line message if there was nothing to compare.
    """
    if len(arguments) != 1:
        print("usage: python bench/parity.py VECTORS.npz", file=sys.stderr)
        return 2
    try:
        return run(Path(arguments[0]))
    except AfaError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
