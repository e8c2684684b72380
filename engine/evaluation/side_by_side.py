"""`visualize_comparison.py`: heatmaps of several models for anomalous images of a class, side by side."""

import logging
from collections.abc import Sequence
from pathlib import Path

from dataset.prompts import CATALOG_NAMES
from dataset.records import Record
from engine.config.evaluation import ALL, VisualizationArguments
from engine.data.task import TaskData, load_task
from engine.detector.detector import Detector, arguments_of
from engine.detector.loading import build_detector, load_clip_for
from engine.evaluation.image_heatmaps import DatasetImage, predict_heatmap, read_dataset_image
from engine.evaluation.inference import read_runs, training_dataset
from engine.runtime.device import check_device
from engine.runtime.run_folder import find_loops
from model.checkpoint import Checkpoint, read_checkpoint
from utils.errors import UserError
from utils.files import check_folder
from utils.heatmaps import comparison_figure, stacked_picture
from utils.logging import with_progress
from utils.paths import safe_name

logger = logging.getLogger(__name__)


def visualize_comparison(arguments: VisualizationArguments) -> list[Path]:
    """Draw each chosen image: one figure with all models, and one per model, from top to bottom.

    Args:
        arguments: The arguments of `visualize_comparison.py`; with `list_images` the images are listed, not drawn.

    Returns:
        The figures with all models.

    Raises:
        UserError: For a class, index, run or loop that does not exist, and if no run is given.
    """
    if arguments.list_images:
        logger.info("%s", "\n".join(list_images(arguments)))
        return []
    folder = arguments.output_dir or Path("results") / "visualize"
    check_folder(folder, "--output_dir")
    device = check_device(arguments.device, "fp32")
    checkpoints = find_checkpoints_of(arguments)
    host, *_ = trained = list(checkpoints.values())
    if arguments.attention and not any("cross_attn" in name for one in trained for name in one.components):
        raise UserError("--attention: these models have no cross-attention: leave --attention out")
    dataset = arguments.dataset or training_dataset(trained)
    data = load_task(dataset, *arguments.image_choices(), run=arguments_of(host))
    records = anomalous_records(data, arguments.class_name)
    indices = chosen_indices(arguments, len(records))
    clip = load_clip_for(host, arguments.clip_weights)
    models = {name: build_detector(checkpoint, clip).to(device) for name, checkpoint in checkpoints.items()}
    if arguments.worst is not None:
        indices = worst_indices(list(models.values())[-1], data, records)[: arguments.worst]
    figures = []
    for index in with_progress(indices, "drawing"):
        picture = read_dataset_image(data, records[index])
        figures.append(draw(models, picture, index, folder, arguments.attention))
        logger.info("%s  %s", figures[-1], records[index].image_path)
    logger.info("%d figures, each with one more for every model", len(figures))
    return figures


def list_images(arguments: VisualizationArguments) -> list[str]:
    """One line for each of the class's anomalous images: index and path."""
    assert arguments.dataset is not None  # checked with the arguments
    data = load_task(arguments.dataset, *arguments.image_choices())
    records = anomalous_records(data, arguments.class_name)
    return [f"{index:4d}  {record.image_path}" for index, record in enumerate(records)]


def find_checkpoints_of(arguments: VisualizationArguments) -> dict[str, Checkpoint]:
    """The checkpoints of the given runs, by the title of their column."""
    runs = read_runs(arguments.base_path, arguments.cross_path)
    checkpoints = {name.capitalize(): checkpoint for name, checkpoint in runs.items()}
    if arguments.feedback_path is not None:
        loops = find_loops(arguments.feedback_path)
        loop = max(loops) if arguments.feedback_loop is None else arguments.feedback_loop
        if loop not in loops:
            numbers = ", ".join(map(str, loops))
            raise UserError(f"--feedback_loop {loop}: {arguments.feedback_path} has loops {numbers}")
        checkpoints[f"Feedback (loop {loop})"] = read_checkpoint(loops[loop])
    return checkpoints


def anomalous_records(data: TaskData, class_name: str) -> list[Record]:
    """The class's anomalous images in the order of the metadata; `UserError` for an unknown class."""
    if class_name not in data.names:
        raise UserError(
            f"--class_name {class_name}: {data.located.spec.name} has no such class; it has {', '.join(data.classes)}"
        )
    return [record for record in data.of_class(class_name) if record.label]


def chosen_indices(arguments: VisualizationArguments, count: int) -> list[int]:
    """The indices of `--image_idx`; `UserError` for one that does not exist."""
    if ALL in arguments.image_idx or arguments.worst is not None:
        return list(range(count))
    indices = [int(index) for index in arguments.image_idx]
    for index in indices:
        if not 0 <= index < count:
            raise UserError(
                f"--image_idx {index}: {arguments.class_name} has {count} anomalous images, counted from 0 "
                "(--list_images shows them)"
            )
    return indices


def worst_indices(detector: Detector, data: TaskData, records: Sequence[Record]) -> list[int]:
    """The indices of the records, those with a model's lowest scores first."""
    scores = []
    for record in with_progress(records, "scoring"):
        path = data.located.root / record.image_path
        name, domain = data.names[record.class_name], data.located.spec.domain
        scores.append(detector.predict(path, name, domain, class_names=CATALOG_NAMES).score)
    return sorted(range(len(records)), key=scores.__getitem__)


def draw(models: dict[str, Detector], picture: DatasetImage, index: int, folder: Path, attention: bool) -> Path:
    """Draw a figure of all models, and one for each model; returns the path of the first."""
    stem = f"{safe_name(picture.record.class_name)}_{index:03d}"
    heatmaps = [predict_heatmap(detector, picture, name, attention) for name, detector in models.items()]
    for heatmap in heatmaps:
        file = f"{stem}_{heatmap.model.lower().replace(' ', '_').replace('(', '').replace(')', '')}.png"
        stacked_picture(picture.image, picture.mask, heatmap, folder / file)
    path = folder / f"{stem}.png"
    comparison_figure(picture.image, picture.mask, heatmaps, path, f"{picture.title} ({index})")
    return path
