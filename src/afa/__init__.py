"""afa: image-level tags in, segmentation masks out.

`import afa` is light: PyTorch and transformers are imported when something that needs them is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afa.config import Config, load_config
    from afa.errors import AfaError
    from afa.inference.predictor import Prediction, Predictor

__version__ = "0.1.0"

__all__ = ["AfaError", "Config", "Prediction", "Predictor", "__version__", "load_config"]

_HOMES = {
    "AfaError": "afa.errors",
    "Config": "afa.config",
    "Prediction": "afa.inference.predictor",
    "Predictor": "afa.inference.predictor",
    "load_config": "afa.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'afa' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
