"""`inference.py` with a dataset: evaluate checkpoints on it."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataset.catalog import expand_groups
from dataset.locate import MissingDatasetError
from engine.config.evaluation import DEFAULT_CLASS, InferenceArguments
from engine.data.task import TaskData, load_task, load_two_folders, mask_notes
from engine.detector.detector import Detector
from engine.detector.hub import NO_CHECKPOINT, RESULTS, folder_of, local_path
from engine.detector.loading import PUBLISHED_MODEL, build_detector, load_clip_for, unadapted_detector
from engine.evaluation.evaluate import evaluate
from engine.evaluation.image_heatmaps import draw_overlays
from engine.evaluation.maps import write_scores
from engine.evaluation.references import ReferenceChoice, add_dataset_references, scoring_note, scoring_suffix
from engine.evaluation.results import (
    AVERAGE,
    UNDEFINED,
    Evaluation,
    evaluation_csv,
    evaluation_table,
    file_suffix,
    summary_table,
)
from engine.runtime.device import check_compiler
from engine.runtime.distributed import join_launch, main_process_first
from engine.runtime.run_folder import find_checkpoints, find_latest
from model.blocks import BlockRunner
from model.checkpoint import Checkpoint, read_checkpoint
from model.clip_loading import load_clip
from utils.errors import UserError
from utils.files import check_folder, write_json_lines, write_text
from utils.logging import set_up_logging
from utils.paths import safe_name
from utils.processes import is_main_process

logger = logging.getLogger(__name__)

# Names of the models that feedback loops are compared with.
BASE, CROSS_ATTENTION = "base", "cross-attention"
# Columns of `evaluation_csv` that are text, even if it looks like a number.
TEXT_COLUMNS = ("model", "dataset", "class", "det_score")


def load_detectors(checkpoint: str, clip_weights: str | None, device: str, **overrides: Any) -> list[Detector]:
    """The models of `--checkpoint` on one CLIP: unadapted CLIP, a file, or a folder's epochs in order."""
    if checkpoint == NO_CHECKPOINT:
        name = overrides.get("model_name") or PUBLISHED_MODEL
        clip = load_clip(name, clip_weights, overrides.get("img_size"), overrides.get("activation"))
        return [unadapted_detector(clip, overrides.get("det_score"), overrides.get("tiles")).to(device)]
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
    """Evaluate checkpoints on datasets, or on two folders: tables to the log, rows to `evaluation_DATASET.csv`.

    File names contain the det score if it is not the published one, and the number of normal references. Several
    datasets also get a table and `summary_DATASETS.csv` with a row for each and their average.

    Args:
        arguments: The arguments of `inference.py`.

    Returns:
        One evaluation for each dataset and checkpoint.

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
    for detector in detectors:
        detector.find_calibration(arguments.checkpoint, arguments.calibration)
    several = arguments.tests_several()
    with main_process_first():
        tasks = load_several(arguments, detectors) if several else [load_images(arguments, detectors)]
    evaluations: list[Evaluation] = []
    for data in tasks:
        try:
            add_dataset_references(detectors, data, ReferenceChoice.of(arguments))
        except UserError as error:
            if data is tasks[-1] and not evaluations:
                raise
            logger.warning("%s is skipped: %s", data.located.spec.name, error)
        else:
            evaluations += _evaluate_task(arguments, detectors, data, device, folder)
        for detector in detectors:
            detector.references.clear()  # they take memory, and other datasets have their own
    if is_main_process() and several:
        write_summary(arguments, detectors[-1], evaluations, folder)
    return evaluations


def _evaluate_task(
    arguments: InferenceArguments, detectors: Sequence[Detector], data: TaskData, device: str, folder: Path
) -> list[Evaluation]:
    """Evaluate checkpoints on one dataset, and write the results."""
    for note in [*zero_shot_notes({d.name: d.config for d in detectors}, data), *mask_notes(data)]:
        logger.warning("%s", note)
    models = {detector.name: detector for detector in detectors}
    machine = (device, arguments.batch_size, arguments.num_workers, arguments.precision)
    maps = _results_file(arguments, detectors[-1], folder, f"maps_{safe_name(data.located.spec.name)}")
    evaluations = list(evaluate(models, data, *machine, arguments, maps if arguments.save_maps else None).values())
    if is_main_process():
        write_results(arguments, detectors[-1], data, evaluations, folder)
    return evaluations


def load_several(arguments: InferenceArguments, detectors: Sequence[Detector]) -> list[TaskData]:
    """The datasets of `--dataset` that can be read; warnings list the others.

    Groups do not contain the training datasets, which would not be zero-shot. Raises `UserError` if none can be read.
    """
    trained = {detector.config["dataset"] for detector in detectors if detector.config}
    tasks: list[TaskData] = []
    skipped: dict[str, UserError] = {}
    for name in expand_groups(arguments.dataset or (), without=trained):
        try:
            tasks.append(load_task(name, *arguments.image_choices(), run=detectors[0].arguments))
        except UserError as error:
            skipped[name] = error
    missing = [name for name, error in skipped.items() if isinstance(error, MissingDatasetError)]
    if missing:
        logger.warning("%d datasets are not under the data root and are skipped: %s", len(missing), ", ".join(missing))
    for name in skipped.keys() - missing:
        logger.warning("%s is skipped: %s", name, skipped[name])
    if not tasks:
        raise next(iter(skipped.values()), UserError("--dataset: nothing but training datasets; name them one by one"))
    names = [safe_name(data.located.spec.name) for data in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"--dataset: two datasets have the same name ({', '.join(names)}), so test one of them alone")
    return tasks


def load_images(arguments: InferenceArguments, detectors: Sequence[Detector]) -> TaskData:
    """The images to test on: two folders, the dataset of the arguments, or the dataset that was trained on."""
    if arguments.normal is not None and arguments.anomalous is not None:
        class_name = DEFAULT_CLASS if arguments.class_name is None else arguments.class_name
        folders = (arguments.normal, arguments.anomalous)
        return load_two_folders(*folders, class_name, arguments.domain, arguments.skip_bad_images)
    (dataset,) = arguments.dataset or [training_dataset(detectors)]
    return load_task(dataset, *arguments.image_choices(), run=detectors[0].arguments)


def write_results(
    arguments: InferenceArguments, detector: Detector, data: TaskData, evaluations: Sequence[Evaluation], folder: Path
) -> None:
    """Log the tables, write the CSV file, and draw the images of `--visualize` with the last model."""
    references = ReferenceChoice.of(arguments)
    note = scoring_note(detector.det_score, references, detector.tiles) + arguments.note
    for evaluation in evaluations:
        logger.info(
            "\n%s on %s, in percent%s\n\n%s\n", evaluation.model, evaluation.dataset, note, evaluation_table(evaluation)
        )
    if len(evaluations) > 1:
        logger.info("Averages%s\n\n%s\n", note, summary_table(evaluations))
    # The log starts here, so that an interrupted evaluation leaves no files.
    set_up_logging(folder / "inference.log")
    name = safe_name(data.located.spec.name)
    path = _results_file(arguments, detector, folder, f"evaluation_{name}", ".csv")
    _write_csv(evaluation_csv(evaluations), path, arguments.json)
    if arguments.save_maps:
        maps = _results_file(arguments, detector, folder, f"maps_{name}")
        write_scores([image for result in evaluations[-1].classes for image in result.scores], maps)
        logger.info("Maps and scores of %s in %s", detector.name, maps)
    if arguments.visualize is not None:
        drawn = _results_file(arguments, detector, folder, f"pictures_{name}")
        count = draw_overlays(detector, data, arguments.visualize, drawn)
        logger.info("%d heatmaps of %s in %s", count, detector.name, drawn)


def _write_csv(table: str, path: Path, json_lines: bool) -> None:
    """Write a table, also as JSON lines if `json_lines`: numbers are numbers there, and undefined values null."""
    write_text(path, table)
    if json_lines:
        rows = [
            {name: _json_value(name, cell) for name, cell in row.items()} for row in csv.DictReader(table.splitlines())
        ]
        write_json_lines(path.with_suffix(".jsonl"), rows)
    logger.info("Written to %s", path)


def _json_value(name: str, cell: str) -> object:
    if name in TEXT_COLUMNS:
        return cell
    try:
        return None if cell in ("", UNDEFINED) else json.loads(cell)
    except ValueError:
        return cell


def _results_file(
    arguments: InferenceArguments, detector: Detector, folder: Path, name: str, extension: str = ""
) -> Path:
    """The path of a result, whose name contains how images were scored."""
    kind = scoring_suffix(detector, ReferenceChoice.of(arguments)) + file_suffix(arguments.note)
    return folder / f"{'unadapted_' * (arguments.checkpoint == NO_CHECKPOINT)}{name}{kind}{extension}"


def write_summary(
    arguments: InferenceArguments, detector: Detector, evaluations: Sequence[Evaluation], folder: Path
) -> None:
    """Log a table for each model and write a CSV file, with a row for each dataset and the average over datasets."""
    summaries = []
    for model in dict.fromkeys(evaluation.model for evaluation in evaluations):
        of_model = [evaluation for evaluation in evaluations if evaluation.model == model]
        totals = [replace(evaluation.total, class_name=evaluation.dataset) for evaluation in of_model]
        summary = Evaluation(model, AVERAGE, totals, of_model[0].det_score, arguments)
        note = scoring_note(summary.det_score, ReferenceChoice.of(arguments), detector.tiles) + arguments.note
        table = evaluation_table(summary, "dataset", "datasets")
        logger.info("\n%s on %d datasets, in percent%s\n\n%s\n", model, len(totals), note, table)
        summaries += [*of_model, summary]
    words = "_".join(Path(word).name for word in arguments.dataset or ())
    path = _results_file(arguments, detector, folder, f"summary_{safe_name(words)}", ".csv")
    _write_csv(evaluation_csv(summaries, averages_only=True), path, arguments.json)
