"""The functions of the evaluation scripts, called with keyword arguments, on the CPU and without worker processes."""

from pathlib import Path
from typing import Any

from engine.config.evaluation import ComparisonArguments, InferenceArguments, VisualizationArguments
from engine.evaluation import calibrate, inference, own_images, side_by_side
from engine.evaluation.calibrate import Entry
from engine.evaluation.gallery import Finding
from engine.evaluation.results import Evaluation
from engine.report import compare


def evaluate_checkpoints(checkpoint: object, dataset: object = None, **values: Any) -> list[Evaluation]:
    return inference.evaluate_checkpoints(
        _inference(checkpoint, dataset=(str(dataset),) if dataset else None, **values)
    )


def score_images(
    checkpoint: object, image: Path | list[Path], class_name: str | None = None, **values: Any
) -> list[Finding]:
    images = tuple(image) if isinstance(image, list) else (image,)
    return own_images.score_images(_inference(checkpoint, image=images, class_name=class_name, **values))


def calibrate_images(checkpoint: object, folder: Path, class_name: str | None = None, **values: Any) -> list[Entry]:
    return calibrate.calibrate_images(_inference(checkpoint, calibrate=folder, class_name=class_name, **values))


def compare_feedback_loops(save_path: Path, dataset: object, **values: Any) -> int:
    values = {"save_path": save_path, "dataset": dataset and str(dataset), **_values(values)}
    return compare.compare_feedback_loops(ComparisonArguments(**values))


def visualize_comparison(
    class_name: str, image_idx: tuple[int | str, ...], dataset: object, **values: Any
) -> list[Path]:
    values = {"class_name": class_name, "image_idx": image_idx, "dataset": dataset and str(dataset), **values}
    arguments = VisualizationArguments(device="cpu", **values)
    arguments.check()
    return side_by_side.visualize_comparison(arguments)


def _inference(checkpoint: object, **values: Any) -> InferenceArguments:
    return InferenceArguments(checkpoint=str(checkpoint), **_values(values))


def _values(values: dict[str, Any]) -> dict[str, Any]:
    return {"device": "cpu", "num_workers": 0, **values}
