"""afa: image-level tags in, segmentation masks out.

`import afa` is light: PyTorch and transformers are imported when something that needs them is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afa.api import check_data, evaluate, masks, predict, pseudo_labels, train
    from afa.config import Config, load_config
    from afa.errors import AfaError
    from afa.inference.prediction import Prediction, show
    from afa.inference.predictor import Predictor
    from afa.model.network import Network

__version__ = "0.1.0"

__all__ = [
    "AfaError",
    "Config",
    "Network",
    "Prediction",
    "Predictor",
    "__version__",
    "check_data",
    "evaluate",
    "load_config",
    "masks",
    "predict",
    "pseudo_labels",
    "show",
    "train",
]

_HOMES = {
    "AfaError": "afa.errors",
    "Config": "afa.config",
    "Network": "afa.model.network",
    "Prediction": "afa.inference.prediction",
    "Predictor": "afa.inference.predictor",
    "check_data": "afa.api",
    "evaluate": "afa.api",
    "load_config": "afa.config",
    "masks": "afa.api",
    "predict": "afa.api",
    "pseudo_labels": "afa.api",
    "show": "afa.inference.prediction",
    "train": "afa.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'afa' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
