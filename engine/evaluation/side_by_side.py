"""What `visualize_comparison.py` does: anomalous images of a class as several models see them, side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.options import CATALOG_NAMES, HALF
from dataset.records import Record
from engine.config.evaluation import ALL
from engine.data.run_location import load_task_of_run
from engine.data.task import TaskData, load_task
from engine.detector.detector import Detector, arguments_of, build_detector, load_clip_for
from engine.evaluation.image_heatmaps import Picture, look, read_picture
from engine.evaluation.inference import training_dataset
from engine.runtime.device import check_device
from engine.runtime.run_folder import find_latest, find_loops
from model.checkpoint import Checkpoint, read_checkpoint
from utils.errors import UserError
from utils.files import check_folder
from utils.heatmaps import comparison_figure, stacked_picture
from utils.logging import progress_bar
from utils.paths import safe_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Which images of a class are shown: by index among its anomalous images, or the worst by score."""

    indices: tuple[int, ...] | None = None
    worst: int | None = None


def visualize_comparison(
    class_name: str,
    choice: Choice,
    dataset: str | None = None,
    *,
    base_path: Path | None = None,
    cross_path: Path | None = None,
    feedback_path: Path | None = None,
    feedback_loop: int | None = None,
    attention: bool = False,
    output_dir: Path | None = None,
    data_root: Path | None = None,
    metadata: Path | None = None,
    class_names: str | Path | None = None,
    mask_threshold: str | float = HALF,
    device: str = "auto",
    clip_weights: str | None = None,
) -> list[Path]:
    """Draw each chosen image: one figure with all models, and one per model, from top to bottom. Returns the figures.

    Raises `UserError` for a class, index, run or loop that is not there, and where no run is given.
    """
    folder = output_dir or Path("results") / "visualize"
    check_folder(folder, "--output_dir")
    device = check_device(device, "fp32")
    checkpoints = find_checkpoints_of(base_path, cross_path, feedback_path, feedback_loop)
    models = list(checkpoints.values())
    data = load_task_of_run(
        arguments_of(models[0]),
        dataset or training_dataset(models),
        data_root,
        metadata,
        class_names,
        mask_threshold=mask_threshold,
    )
    records = anomalous_records(data, class_name)
    indices = check_indices(choice, records, class_name)
    clip = load_clip_for(next(iter(checkpoints.values())), clip_weights)
    models = {name: build_detector(checkpoint, clip).to(device) for name, checkpoint in checkpoints.items()}
    if choice.worst is not None:
        indices = worst_indices(list(models.values())[-1], data, records, choice.worst)
    figures = []
    bar = progress_bar(len(indices), "drawing")
    for index in indices:
        figures.append(draw(models, read_picture(data, records[index]), index, folder, attention))
        logger.info("%s  %s", figures[-1], records[index].image_path)
        bar.update()
    bar.close()
    return figures


def list_images(
    class_name: str,
    dataset: str | None,
    *,
    data_root: Path | None = None,
    metadata: Path | None = None,
    class_names: str | Path | None = None,
) -> list[str]:
    """The class's anomalous images with their index, a line each."""
    if dataset is None:
        raise UserError("--list_images needs --dataset")
    records = anomalous_records(load_task(dataset, data_root, metadata, class_names), class_name)
    return [f"{index:4d}  {record.image_path}" for index, record in enumerate(records)]


def find_checkpoints_of(
    base_path: Path | None, cross_path: Path | None, feedback_path: Path | None, feedback_loop: int | None
) -> dict[str, Checkpoint]:
    """The checkpoints of the runs that are given, by the name of their column."""
    found = {}
    for name, flag, path in (("Base", "--base_path", base_path), ("Cross-attention", "--cross_path", cross_path)):
        if path is not None:
            found[name] = read_checkpoint(find_latest(path, flag))
            if flag == "--cross_path" and not (found[name].config or {}).get("cross_attention"):
                raise UserError(f"--cross_path {path}: holds no cross-attention; give a base as --base_path")
    if feedback_path is not None:
        loops = find_loops(feedback_path)
        loop = max(loops) if feedback_loop is None else feedback_loop
        if loop not in loops:
            raise UserError(f"--feedback_loop {loop}: {feedback_path} has loops {', '.join(map(str, loops))}")
        found[f"Feedback (loop {loop})"] = read_checkpoint(loops[loop])
    if not found:
        raise UserError("give at least one of --base_path, --cross_path and --feedback_path")
    return found


def anomalous_records(data: TaskData, class_name: str) -> list[Record]:
    """The class's anomalous images in the order of the metadata; `UserError` for an unknown class."""
    if class_name not in data.names:
        raise UserError(
            f"--class_name {class_name}: {data.located.spec.name} has no such class, but {', '.join(data.classes)}"
        )
    return [record for record in data.of_class(class_name) if record.label]


def check_indices(choice: Choice, records: Sequence[Record], class_name: str) -> list[int]:
    """The indices that are asked for; all where none are. `UserError` for one that is not there."""
    indices = list(range(len(records))) if choice.indices is None else list(choice.indices)
    for index in indices:
        if not 0 <= index < len(records):
            raise UserError(
                f"--image_idx {index}: {class_name} has {len(records)} anomalous images, counted from 0 "
                "(--list_images shows them)"
            )
    return indices


def worst_indices(detector: Detector, data: TaskData, records: Sequence[Record], count: int) -> list[int]:
    """The anomalous images that a model gives the lowest scores, the lowest first."""
    scores = []
    bar = progress_bar(len(records), "scoring")
    for record in records:
        path = data.located.root / record.image_path
        name, domain = data.names[record.class_name], data.located.spec.domain
        scores.append(detector.predict(path, name, domain, class_names=CATALOG_NAMES).score)
        bar.update()
    bar.close()
    return sorted(range(len(records)), key=scores.__getitem__)[:count]


def draw(models: dict[str, Detector], picture: Picture, index: int, folder: Path, attention: bool) -> Path:
    """Draw one image; returns the figure's path, beside which one per model is written."""
    stem = f"{safe_name(picture.record.class_name)}_{index:03d}"
    heatmaps = [look(detector, picture, name, attention) for name, detector in models.items()]
    for heatmap in heatmaps:
        file = f"{stem}_{heatmap.model.lower().replace(' ', '_').replace('(', '').replace(')', '')}.png"
        stacked_picture(picture.image, picture.mask, heatmap, folder / file)
    path = folder / f"{stem}.png"
    comparison_figure(picture.image, picture.mask, heatmaps, path, f"{picture.title} ({index})")
    return path


def choose(image_idx: Sequence[str | int], worst: int | None) -> Choice:
    """The choice that the arguments make; `UserError` for the word all beside indices."""
    if worst is not None:
        return Choice(None, worst)
    if ALL not in image_idx:
        return Choice(tuple(image_idx))
    if len(image_idx) > 1:
        raise UserError(f"--image_idx {' '.join(map(str, image_idx))}: give indices, or {ALL}")
    return Choice()


def run_visualization(arguments: dict[str, Any]) -> None:
    """What the script does with its arguments."""
    listing = arguments.pop("list_images")
    image_idx, worst = arguments.pop("image_idx"), arguments.pop("worst")
    if listing:
        names = ("class_name", "dataset", "data_root", "metadata", "class_names")
        lines = list_images(**{name: arguments[name] for name in names})
        logger.info("\n".join(lines))
        return
    figures = visualize_comparison(choice=choose(image_idx, worst), **arguments)
    logger.info("%d figures, and one per model beside each", len(figures))
