"""What `inference.py` does with a dataset: evaluate checkpoints on it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dataset.options import HALF
from engine.config.evaluation import ALL, NO_CHECKPOINT
from engine.data.run_location import load_task_of_run
from engine.data.task import TaskData, load_two_folders, mask_notes
from engine.detector.detector import Detector, build_detector, load_clip_for, unadapted_detector
from engine.detector.hub import RESULTS, folder_of, local_path
from engine.detector.references import ReferenceChoice, said_of_references
from engine.evaluation.evaluate import (
    Evaluation,
    det_score_suffix,
    evaluate,
    evaluation_table,
    said_of_det_score,
    summary_table,
    write_csv,
)
from engine.evaluation.image_heatmaps import draw_overlays
from engine.evaluation.references import remember_for_dataset
from engine.runtime.device import check_compiler
from engine.runtime.distributed import join_launch, main_first
from engine.runtime.run_folder import find_checkpoints
from model.blocks import BlockRunner
from model.checkpoint import Checkpoint, read_checkpoint
from model.clip_loading import load_clip
from utils.errors import UserError
from utils.files import check_folder
from utils.logging import set_up_logging
from utils.paths import safe_name
from utils.processes import is_main_process

logger = logging.getLogger(__name__)


class TwoFolders(NamedTuple):
    """Images of one class that are normal, others that are anomalous, and how they are scored."""

    normal: Path
    anomalous: Path
    class_name: str
    domain: str


def load_detectors(checkpoint: str, clip_weights: str | None, device: str, **overrides: Any) -> list[Detector]:
    """The models that `--checkpoint` means, on one CLIP: unadapted CLIP, a file, or a folder's epochs in order."""
    if checkpoint == NO_CHECKPOINT:
        clip = load_clip(
            overrides.get("model_name") or "ViT-L-14-336",
            clip_weights,
            overrides.get("img_size"),
            overrides.get("activation"),
        )
        return [unadapted_detector(clip, overrides.get("det_score")).to(device)]
    files = [read_checkpoint(file) for file in find_checkpoints(local_path(checkpoint))]
    clip = load_clip_for(files[0], clip_weights, **overrides)
    return [build_detector(file, clip, **overrides).to(device) for file in files]


def output_folder(checkpoint: str, output_dir: Path | None) -> Path:
    """Where results go: as asked, else beside the checkpoint, else `results` (unadapted CLIP, models on the hub)."""
    return (folder_of(checkpoint) or Path()) / RESULTS if output_dir is None else output_dir


def training_dataset(models: Sequence[Detector | Checkpoint]) -> str:
    """The dataset that the first of these was trained on; `UserError` where it does not say."""
    config = models[0].config
    if config is None:
        raise UserError("--dataset is needed: nothing says what this model was trained on")
    return config["arguments"]["dataset"]


def zero_shot_notes(configs: Mapping[str, Mapping[str, Any] | None], data: TaskData) -> list[str]:
    """A note that names the models which are tested on the dataset that they were trained on, if there are any.

    configs: the `config` of each model's checkpoint by its name; None for unadapted CLIP and where a file has none.
    """
    dataset = data.located.spec.name
    seen = [
        name
        for name, config in configs.items()
        if config and (config["metadata_digest"] == data.digest or config["dataset"] == dataset)
    ]
    if not seen:
        return []
    were = "was" if len(seen) == 1 else "were"
    return [
        f"NOT ZERO-SHOT: {', '.join(seen)} {were} trained on {dataset} and tested on it: "
        "these figures say nothing about unseen data"
    ]


def evaluate_checkpoints(
    checkpoint: str,
    dataset: str | None,
    *,
    data_root: Path | None = None,
    metadata: Path | None = None,
    class_names: str | Path | None = None,
    mask_threshold: str | float = HALF,
    skip_bad_images: bool = False,
    output_dir: Path | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    cache_images: float = 0.0,
    device: str = "auto",
    precision: str = "auto",
    tf32: str = "on",
    compile: bool = False,
    clip_weights: str | None = None,
    visualize: int | str | None = None,
    two_folders: TwoFolders | None = None,
    references: ReferenceChoice | None = None,
    **overrides: Any,
) -> list[Evaluation]:
    """Evaluate what `--checkpoint` means on a dataset: tables to the log, rows to `evaluation_DATASET.csv`.

    With another det score than the published one, files have it in their names.
    visualize: also draw this many images of each class, or `ALL`, as the last of the models sees them. two_folders: in
    place of a dataset. references: normal images of each class to compare with, which files then have in their names.
    Raises `UserError` for files, datasets and devices that are not there or do not fit.
    """
    set_up_logging()
    device = join_launch(device, precision, tf32)
    folder = output_folder(checkpoint, output_dir)
    check_folder(folder, "--output_dir")
    if compile:
        check_compiler(device)
    detectors = load_detectors(checkpoint, clip_weights, device, **overrides)
    detectors[0].clip.run = BlockRunner(compiled=(batch_size,) if compile else ())
    run = detectors[0].arguments
    with main_first():
        if two_folders is not None:
            data = load_two_folders(*two_folders, skip_bad_images)
        else:
            asked = dataset or training_dataset(detectors)
            data = load_task_of_run(run, asked, data_root, metadata, class_names, skip_bad_images, mask_threshold)
            data = replace(data, cache_gib=cache_images)
    for note in [*zero_shot_notes({d.name: d.config for d in detectors}, data), *mask_notes(data)]:
        logger.warning("%s", note)
    said = said_of_det_score(detectors[0].det_score) + said_of_references(references)
    kind = det_score_suffix(detectors[0].det_score)
    if references is not None:
        remember_for_dataset(detectors, data, references)
        kind += references.suffix
    models = {detector.name: detector for detector in detectors}
    evaluations = list(evaluate(models, data, device, batch_size, num_workers, precision).values())
    if not is_main_process():
        return evaluations
    for evaluation in evaluations:
        logger.info(
            "\n%s on %s, in percent%s\n\n%s\n", evaluation.model, evaluation.dataset, said, evaluation_table(evaluation)
        )
    if len(evaluations) > 1:
        logger.info("Averages%s\n\n%s\n", said, summary_table(evaluations))
    # Not before: an evaluation that is stopped leaves nothing.
    set_up_logging(folder / "inference.log")
    name = "unadapted_" if checkpoint == NO_CHECKPOINT else ""
    tested = safe_name(data.located.spec.name) + kind
    path = folder / f"{name}evaluation_{tested}.csv"
    write_csv(evaluations, path)
    logger.info("Written to %s", path)
    if visualize is not None:
        drawn, last = folder / f"{name}pictures_{tested}", detectors[-1]
        figures = draw_overlays(last, data, None if visualize == ALL else int(visualize), drawn)
        logger.info("%d images as %s sees them, in %s", len(figures), last.name, drawn)
    return evaluations
