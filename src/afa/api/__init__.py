"""The commands as functions: train, demo, masks, evaluate, predict, pseudo labels, check, export, report, explorer.

`afa.train` is `afa.api.train`. Only this room composes others: a room below it does one thing.

The command line calls these and prints what they return, so that nothing is done there that Python cannot do.
"""

from afa.api.data import check_data, check_voc
from afa.api.runs import compare, evaluate, explore, export, report
from afa.api.settings import run_config
from afa.api.training import SCORED_LABELS, run_demo, train, train_and_report, training_config
from afa.api.writing import masks, predict, pseudo_labels

__all__ = [
    "SCORED_LABELS",
    "check_data",
    "check_voc",
    "compare",
    "evaluate",
    "explore",
    "export",
    "masks",
    "predict",
    "pseudo_labels",
    "report",
    "run_config",
    "run_demo",
    "train",
    "train_and_report",
    "training_config",
]
