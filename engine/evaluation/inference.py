"""`inference.py` with a dataset: evaluate checkpoints on it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config.evaluation import DEFAULT_CLASS, InferenceArguments
from engine.data.task import TaskData, load_task, load_two_folders, mask_notes
from engine.detector.detector import Detector
from engine.detector.hub import NO_CHECKPOINT, RESULTS, folder_of, local_path
from engine.detector.loading import PUBLISHED_MODEL, build_detector, load_clip_for, unadapted_detector
from engine.evaluation.evaluate import CSV_COLUMNS, Evaluation, csv_rows, evaluate, evaluation_table, summary_table
from engine.evaluation.image_heatmaps import draw_overlays
from engine.evaluation.references import ReferenceChoice, add_dataset_references, scoring_note, scoring_suffix
from engine.runtime.device import check_compiler
from engine.runtime.distributed import join_launch, main_process_first
from engine.runtime.run_folder import find_checkpoints, find_latest
from model.blocks import BlockRunner
from model.checkpoint import Checkpoint, read_checkpoint
from model.clip_loading import load_clip
from utils.errors import UserError
from utils.files import check_folder, write_text
from utils.logging import set_up_logging
from utils.paths import safe_name
from utils.processes import is_main_process
from utils.text import csv_table

logger = logging.getLogger(__name__)

# Names of the models that feedback loops are compared with.
BASE, CROSS_ATTENTION = "base", "cross-attention"


def load_detectors(checkpoint: str, clip_weights: str | None, device: str, **overrides: Any) -> list[Detector]:
    """The models of `--checkpoint` on one CLIP: unadapted CLIP, a file, or a folder's epochs in order."""
    if checkpoint == NO_CHECKPOINT:
        name = overrides.get("model_name") or PUBLISHED_MODEL
        clip = load_clip(name, clip_weights, overrides.get("img_size"), overrides.get("activation"))
        return [unadapted_detector(clip, overrides.get("det_score")).to(device)]
    files = [read_checkpoint(file) for file in find_checkpoints(local_path(checkpoint))]
    clip = load_clip_for(files[0], clip_weights, **overrides)
    return [build_detector(file, clip, **overrides).to(device) for file in files]


def output_folder(checkpoint: str, output_dir: Path | None) -> Path:
    """The folder of results: `--output_dir`, else `results` next to the checkpoint or in the working directory."""
    return (folder_of(checkpoint) or Path()) / RESULTS if output_dir is None else output_dir


def training_dataset(models: Sequence[Detector | Checkpoint]) -> str:
    """The dataset that the first of these was trained on; `UserError` if it is unknown."""
    config = models[0].config
    if config is None:
        raise UserError("--dataset is needed: the checkpoint does not name its training dataset")
    return config["arguments"]["dataset"]


def read_runs(base_path: Path | None, cross_path: Path | None) -> dict[str, Checkpoint]:
    """The latest checkpoints of a base and a cross-attention run, by kind; `UserError` for a base as `--cross_path`."""
    checkpoints = {}
    if base_path is not None:
        checkpoints[BASE] = read_checkpoint(find_latest(base_path, "--base_path"))
    if cross_path is not None:
        checkpoints[CROSS_ATTENTION] = checkpoint = read_checkpoint(find_latest(cross_path, "--cross_path"))
        if not (checkpoint.config or {}).get("cross_attention"):
            raise UserError(f"--cross_path {cross_path}: holds no cross-attention; give a base as --base_path")
    return checkpoints


def zero_shot_notes(configs: Mapping[str, Mapping[str, Any] | None], data: TaskData) -> list[str]:
    """A note that names the models which are tested on their training dataset, if there are any.

    configs: the `config` of each model's checkpoint by the model's name; None for files without one and unadapted CLIP.
    """
    dataset = data.located.spec.name
    seen = [
        name
        for name, config in configs.items()
        if config and (config["metadata_digest"] == data.digest or config["dataset"] == dataset)
    ]
    note = f"NOT ZERO-SHOT: trained on {dataset} and tested on it, so that the results do not apply to unseen data"
    return [f"{note}: {', '.join(seen)}"] if seen else []


def evaluate_checkpoints(arguments: InferenceArguments) -> list[Evaluation]:
    """Evaluate checkpoints on a dataset, or on two folders: tables to the log, rows to `evaluation_DATASET.csv`.

    File names contain the det score if it is not the published one, and the number of normal references.

    Args:
        arguments: The arguments of `inference.py`.

    Returns:
        One evaluation for each checkpoint.

    Raises:
        UserError: For files, datasets and devices that do not exist or do not fit.
    """
    set_up_logging()
    device = join_launch(arguments.device, arguments.precision, arguments.tf32)
    folder = output_folder(arguments.checkpoint, arguments.output_dir)
    check_folder(folder, "--output_dir")
    if arguments.compile:
        check_compiler(device)
    detectors = load_detectors(arguments.checkpoint, arguments.clip_weights, device, **arguments.overrides())
    detectors[0].clip.run = BlockRunner(compiled=(arguments.batch_size,) if arguments.compile else ())
    with main_process_first():
        data = load_images(arguments, detectors)
    for note in [*zero_shot_notes({d.name: d.config for d in detectors}, data), *mask_notes(data)]:
        logger.warning("%s", note)
    add_dataset_references(detectors, data, ReferenceChoice.of(arguments))
    models, sizes = {detector.name: detector for detector in detectors}, (arguments.batch_size, arguments.num_workers)
    evaluations = list(evaluate(models, data, device, *sizes, arguments.precision).values())
    if is_main_process():
        write_results(arguments, detectors[-1], data, evaluations, folder)
    return evaluations


def load_images(arguments: InferenceArguments, detectors: Sequence[Detector]) -> TaskData:
    """The images to test on: two folders, the dataset of the arguments, or the dataset that was trained on."""
    if arguments.normal is not None and arguments.anomalous is not None:
        class_name = DEFAULT_CLASS if arguments.class_name is None else arguments.class_name
        folders = (arguments.normal, arguments.anomalous)
        return load_two_folders(*folders, class_name, arguments.domain, arguments.skip_bad_images)
    dataset = arguments.dataset or training_dataset(detectors)
    return load_task(dataset, *arguments.image_choices(), run=detectors[0].arguments)


def write_results(
    arguments: InferenceArguments, detector: Detector, data: TaskData, evaluations: Sequence[Evaluation], folder: Path
) -> None:
    """Log the tables, write the CSV file, and draw the images of `--visualize` with the last model."""
    references = ReferenceChoice.of(arguments)
    note = scoring_note(detector.det_score, references)
    for evaluation in evaluations:
        logger.info(
            "\n%s on %s, in percent%s\n\n%s\n", evaluation.model, evaluation.dataset, note, evaluation_table(evaluation)
        )
    if len(evaluations) > 1:
        logger.info("Averages%s\n\n%s\n", note, summary_table(evaluations))
    # The log starts here, so that an interrupted evaluation leaves no files.
    set_up_logging(folder / "inference.log")
    name = "unadapted_" if arguments.checkpoint == NO_CHECKPOINT else ""
    kind = scoring_suffix(detector.det_score, references)
    tested = safe_name(data.located.spec.name) + kind
    path = folder / f"{name}evaluation_{tested}.csv"
    rows = [row for evaluation in evaluations for row in csv_rows(evaluation)]
    write_text(path, csv_table([CSV_COLUMNS, *rows]))
    logger.info("Written to %s", path)
    if arguments.visualize is not None:
        drawn = folder / f"{name}pictures_{tested}"
        count = draw_overlays(detector, data, arguments.visualize, drawn)
        logger.info("%d heatmaps of %s in %s", count, detector.name, drawn)
