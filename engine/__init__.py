"""What is done with datasets and models: training, evaluation, loading a checkpoint as a ready model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.detector.detector import Detector, Prediction, load_model

__all__ = ["Detector", "Prediction", "load_model"]


def __getattr__(name: str) -> Any:
    # Imported on first use, because torch takes seconds and scripts must handle Ctrl-C first.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from engine.detector import detector

    return getattr(detector, name)
