"""What is done with datasets and models: training, evaluation, loading a checkpoint as a ready model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.detector import Detector, Prediction, load_model

__all__ = ["Detector", "Prediction", "load_model"]


def __getattr__(name: str) -> Any:
    # On first use: `python -m engine.demo` imports this package before it can handle Ctrl-C, and torch takes seconds.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from engine import detector

    return getattr(detector, name)
