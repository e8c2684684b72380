"""What is done with datasets and models: training, evaluation, loading a checkpoint as a ready model."""

from engine.detector import Detector, Prediction, load_model

__all__ = ["Detector", "Prediction", "load_model"]
