"""Training, evaluation and prediction; `from engine import load_model` loads a checkpoint that is ready to predict."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.detector.detector import Detector
    from engine.detector.loading import load_model
    from engine.detector.prediction import Prediction

__all__ = ["Detector", "Prediction", "load_model"]

_MODULES = {"Detector": "detector", "Prediction": "prediction", "load_model": "loading"}


def __getattr__(name: str) -> Any:
    # Imported on first use, because torch takes seconds and scripts must handle Ctrl-C first.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"engine.detector.{_MODULES[name]}"), name)
