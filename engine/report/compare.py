"""What `compare_feedback_loops.py` does: evaluate the loops of a feedback run beside the runs that it should beat."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dataset.options import HALF
from dataset.records import metadata_digest
from engine.config.evaluation import ComparisonArguments
from engine.config.training import MOST_LOOPS
from engine.data.run_location import arguments_in, load_task_of_run
from engine.data.task import TaskData, mask_notes
from engine.detector.detector import UNADAPTED, Detector, build_detector, load_clip_for, unadapted_detector
from engine.detector.references import ReferenceChoice
from engine.evaluation.evaluate import Evaluation, evaluate
from engine.evaluation.inference import zero_shot_notes
from engine.evaluation.references import choose_for_dataset, remember_for_dataset
from engine.report.commands import command_line
from engine.report.comparison import (
    BASE,
    CROSS_ATTENTION,
    Comparison,
    Row,
    setting_notes,
    unfair_notes,
    write_comparison,
)
from engine.report.comparison_cache import read_cache, write_cache
from engine.report.page import shown_rows, write_report
from engine.runtime.device import check_compiler, choose_precision
from engine.runtime.distributed import from_main_process, join_launch, main_process_first
from engine.runtime.run_folder import REPORT_FILE, find_latest, find_loops, loop_file
from model.blocks import BlockRunner
from model.checkpoint import TEXT_FILE, Checkpoint, file_digest, read_checkpoint
from model.clip import FrozenCLIP
from model.config import SIDES
from model.scoring import DET_SCORES
from utils.errors import UserError
from utils.files import check_folder
from utils.logging import set_up_logging
from utils.processes import is_main_process

logger = logging.getLogger(__name__)

CLIP_SETTINGS = ("model_name", "weights_digest", "img_size", "activation")
CACHE_FILE = "comparison_cache.json"
# Arguments that do not change the results.
NOT_IN_COMMAND = ("device", "batch_size", "num_workers", "compile")


@dataclass(frozen=True)
class Setting:
    """What all rows are evaluated with."""

    arguments: ComparisonArguments
    data: TaskData
    device: str
    precision: str

    @property
    def det_score(self) -> str:
        return self.arguments.det_score or DET_SCORES[0]

    @cached_property
    def references(self) -> ReferenceChoice | None:
        return ReferenceChoice.of(self.arguments)


def compare_feedback_loops(arguments: ComparisonArguments) -> int:
    """Evaluate every loop of a run and what it is compared with on the same images; write `comparison.*` files.

    Results that `comparison_cache.json` holds for the same checkpoint, images and references are not computed again.

    Args:
        arguments: The arguments of `compare_feedback_loops.py`.

    Returns:
        The exit status: 1 if a loop's file cannot be read, else 0.

    Raises:
        UserError: For a folder without loops, a base or cross-attention run that cannot be read, and data, weights and
            devices that do not exist or do not fit.
    """
    if arguments.dataset is None:
        raise UserError("--dataset is needed: the dataset to test on, other than the one trained on")
    set_up_logging()
    save_path, folder = arguments.save_path, arguments.output_dir or arguments.save_path
    files = find_loops(save_path)
    check_folder(folder, "--output_dir")
    device = join_launch(arguments.device, arguments.precision, arguments.tf32)
    if arguments.compile:
        check_compiler(device)
    others = read_others(arguments)
    loops = [read_loop(number, file) for number, file in files.items()]
    rows = [*([Row(UNADAPTED)] if arguments.unadapted else []), *others, *loops]
    run = next((row.config["arguments"] for row in reversed(rows) if row.config), {})
    with main_process_first():
        data = load_task_of_run(run, arguments.dataset, *arguments.image_choices())
    setting = Setting(arguments, data, device, choose_precision(device, arguments.precision))
    clip = share_clip(rows, setting)
    if clip is None:
        logger.warning("No loop can be read, and nothing else says on which CLIP to compare: there are no figures")
        rows, evaluations, notes = loops, {}, []
    else:
        rows, evaluations = evaluate_rows(rows, clip, setting, folder / CACHE_FILE)
        notes = [*unfair_notes(rows), *setting_notes(rows, clip.settings)]
    if is_main_process():
        trained = {row.name: row.config for row in rows}
        notes = [*zero_shot_notes(trained, data), *mask_notes(data), *broken_notes(save_path, rows), *notes]
        comparison = Comparison(data.located.spec.name, rows, evaluations, notes, setting.det_score, setting.references)
        # Not before: a comparison that is stopped leaves nothing but what it need not evaluate again.
        set_up_logging(folder / "comparison.log")
        write_comparison(comparison, save_path, folder)
        if arguments.report:
            report(comparison, clip, setting, folder / comparison.file(REPORT_FILE))
    return status_of(rows)


def read_others(arguments: ComparisonArguments) -> list[Row]:
    """The base and cross-attention runs that the loops are compared with."""
    paths = ((BASE, "--base_path", arguments.base_path), (CROSS_ATTENTION, "--cross_path", arguments.cross_path))
    rows = [
        Row(name, checkpoint=read_weights(find_latest(path, flag))) for name, flag, path in paths if path is not None
    ]
    for row in rows:
        if row.name == CROSS_ATTENTION and not (row.config or {}).get("cross_attention"):
            raise UserError(f"--cross_path {row.checkpoint.path}: holds no cross-attention; give a base as --base_path")
    return rows


def report(comparison: Comparison, clip: SharedClip | None, setting: Setting, path: Path) -> None:
    """Write `report.html`, with example heatmaps if any row can be read."""
    models: dict[str, Detector] = {}
    shown = {row.name: row for row in shown_rows(comparison)}
    if clip is not None and shown:
        models, _ = build_detectors(shown, clip.get(), setting)
    arguments = setting.arguments
    command = command_line("compare_feedback_loops.py", arguments.changed(exclude=NOT_IN_COMMAND))
    write_report(comparison, models, setting.data, arguments.save_path, path, command)


def status_of(rows: Sequence[Row]) -> int:
    """The exit status: 1 where a loop's file cannot be read."""
    return int(any(row.problem for row in rows))


def read_loop(number: int, file: Path) -> Row:
    """A loop's row; a file that cannot be read, or that is no loop's, gives one that says why."""
    name = f"Loop {number}"
    try:
        checkpoint = read_weights(file)
        cross = checkpoint.cross_attention()
        branches = [f"{side}_cross_attn" for side in SIDES if cross and side in cross.sides]
        needed = ("text_adapter", "image_adapter", *branches)
        missing = [part for part in needed if part not in checkpoint.components]
        if not (checkpoint.config or {}).get("cross_attention"):
            missing.append("cross_attention in its config")
        if missing:
            raise UserError(f"{file}: not a feedback checkpoint (has no {missing[0]})")
    except UserError as error:
        return Row(name, number, problem=str(error))
    return Row(name, number, checkpoint)


def read_weights(file: Path) -> Checkpoint:
    """A checkpoint without its optimizers, which would fill the memory for nothing."""
    return replace(read_checkpoint(file), optimizers={})


class SharedClip:
    """The one CLIP under all rows: what its host was trained on, or as asked for; loaded when it is first needed.

    settings: model name, weights' digest, image size and activation, which a host with a config tells beforehand.
    """

    def __init__(self, host: Checkpoint, setting: Setting) -> None:
        self.host = host
        self._setting = setting
        self._clip: FrozenCLIP | None = None
        if host.config is None:
            self.settings = {name: getattr(self.get(), name) for name in CLIP_SETTINGS}
        else:
            trained = host.model_config()
            asked = {"img_size": setting.arguments.img_size, "activation": setting.arguments.activation}
            self.settings = {name: asked.get(name) or getattr(trained, name) for name in CLIP_SETTINGS}

    def get(self) -> FrozenCLIP:
        """The CLIP; `UserError` where it cannot be had, or is not the one that the host was trained on."""
        if self._clip is None:
            self._clip = load_clip_for(
                self.host, self._setting.arguments.clip_weights, **self._setting.arguments.overrides()
            )
            if self.host.config is not None:
                advice = "give the file it was trained on with --clip_weights"
                check_weights(self.host, self._clip.weights_digest, "those loaded", advice)
        return self._clip


def share_clip(rows: Sequence[Row], setting: Setting) -> SharedClip | None:
    """The CLIP that all rows are evaluated on, which the first loop decides; None where nothing can be read.

    Raises `UserError` where the rows were trained on different weights.
    """
    readable = [row for row in rows if row.checkpoint]
    if not readable:
        return None
    # A base of a file without config says nothing of its CLIP: it is taken to be the others'.
    host = min(readable, key=lambda row: (row.config is None, row.loop is None)).checkpoint
    clip = SharedClip(host, setting)
    for row in readable:
        if row.config is not None:
            check_weights(row.checkpoint, clip.settings["weights_digest"], str(host.path), "the two do not compare")
    return clip


def check_weights(checkpoint: Checkpoint, digest: str, source: str, advice: str) -> None:
    """`UserError` for a checkpoint that was trained on other CLIP weights than those of `digest`, from `source`."""
    config = checkpoint.model_config()
    if config.weights_digest != digest:
        raise UserError(
            f"{checkpoint.path} was trained on other weights of {config.model_name} ({config.weights_digest}) than "
            f"{source} ({digest}); {advice}"
        )


def evaluate_rows(
    rows: Sequence[Row], clip: SharedClip, setting: Setting, cache_file: Path
) -> tuple[list[Row], dict[str, Evaluation]]:
    """Evaluate rows on one CLIP and one reading of the images, but for what the cache holds.

    Returns the rows, some of which may have turned out to be unreadable, and the metrics of the others by name. Raises
    `UserError` for a base or cross-attention checkpoint that does not fit the CLIP.
    """
    keys = cache_keys(rows, clip.settings, setting)
    # All processes evaluate the same, whatever of it is on their disks.
    cache = from_main_process(lambda: read_cache(cache_file))
    if cached := [name for name, key in keys.items() if key in cache]:
        logger.info("Taken from %s, not evaluated again: %s", cache_file, ", ".join(cached))
    # By key, so that content which two rows share is evaluated once.
    pending = {keys[row.name]: row for row in rows if not row.problem and keys[row.name] not in cache}
    if pending:
        clip.get().run = BlockRunner(compiled=(setting.arguments.batch_size,) if setting.arguments.compile else ())
        detectors, problems = build_detectors(pending, clip.get(), setting)
        rows = [
            replace(row, checkpoint=None, problem=problems[keys[row.name]]) if keys.get(row.name) in problems else row
            for row in rows
        ]
        if detectors:
            arguments = setting.arguments
            found = evaluate(
                detectors, setting.data, setting.device, arguments.batch_size, arguments.num_workers, setting.precision
            )
            cache |= {key: evaluation.classes for key, evaluation in found.items()}
            if is_main_process():
                write_cache(cache_file, cache)
    dataset = setting.data.located.spec.name
    return list(rows), {
        row.name: Evaluation(row.name, dataset, cache[keys[row.name]], setting.det_score)
        for row in rows
        if not row.problem
    }


def build_detectors(
    pending: Mapping[str, Row], clip: FrozenCLIP, setting: Setting
) -> tuple[dict[str, Detector], dict[str, str]]:
    """Models by key, with the references asked for, and by key what is wrong with loops whose weights do not fit."""
    detectors: dict[str, Detector] = {}
    problems: dict[str, str] = {}
    for key, row in pending.items():
        if row.checkpoint is None:
            detectors[key] = unadapted_detector(clip, setting.det_score).to(setting.device)
            continue
        try:
            detectors[key] = build_detector(row.checkpoint, clip, **setting.arguments.overrides()).to(setting.device)
        except UserError as error:
            if row.loop is None:
                raise
            problems[key] = str(error)
    if setting.references is not None:
        remember_for_dataset(list(detectors.values()), setting.data, setting.references)
    return detectors, problems


def cache_keys(rows: Sequence[Row], clip_settings: Mapping[str, Any], setting: Setting) -> dict[str, str]:
    """By a row's name, a digest of all that its figures depend on; a row that cannot be read has none."""
    in_clip_settings = ("img_size", "activation")
    shared = {
        "clip": clip_settings,
        "images": image_digest(setting.data),
        **({} if setting.data.mask_threshold == HALF else {"mask_threshold": setting.data.mask_threshold}),
        "prompt_names": setting.data.names,
        "domain": setting.data.located.spec.domain,
        "precision": setting.precision,
        **({} if torch.device(setting.device).type == "cpu" else {"tf32": setting.arguments.tf32}),
        "overrides": {
            name: value for name, value in setting.arguments.overrides().items() if name not in in_clip_settings
        },
        **reference_key(setting),
    }
    return {row.name: digest_of({**shared, "files": file_digests(row)}) for row in rows if not row.problem}


def reference_key(setting: Setting) -> dict[str, Any]:
    """Which normal images of each class figures depend on, by their content, and how they are compared with."""
    choice = setting.references
    if choice is None:
        return {}
    images = choose_for_dataset(setting.data, choice)
    digests = {name: sorted(map(file_digest, paths)) for name, paths in images.items()}
    return {"references": [digests, choice.weight, choice.features]}


def file_digests(row: Row) -> list[str]:
    """SHA-256 of a row's checkpoint file, and of the text side beside it where it may have been taken from there."""
    if row.checkpoint is None:
        return []
    beside = row.checkpoint.path.with_name(TEXT_FILE)
    files = [row.checkpoint.path, *([beside] if row.config is None and beside.is_file() else [])]
    return [file_digest(file) for file in files]


def image_digest(data: TaskData) -> str:
    """A digest of the images' list, and of what the file system tells of the files: reading them all would take long.

    The list alone says too little: images of other content may have the same names and labels.
    """
    paths = [path for record in data.records for path in (record.image_path, record.mask_path) if path]
    found = []
    for path in paths:
        try:
            status = (data.located.root / path).stat()
        except OSError:  # whoever reads it will say so, with its path
            continue
        found.append([path, status.st_size, status.st_mtime_ns])
    return digest_of([metadata_digest(data.records), found])


def digest_of(value: Any) -> str:
    """SHA-256 of plain data, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()


def broken_notes(save_path: Path, rows: Sequence[Row]) -> list[str]:
    """What is wrong with the run's files: loops that cannot be read, and loops that are not there."""
    notes = [f"{row.name} is unreadable: {row.problem}" for row in rows if row.problem]
    numbers = {row.loop for row in rows if row.loop is not None}
    planned = planned_loops(save_path, rows)
    missing = [number for number in range(1, max(*numbers, planned) + 1) if number not in numbers]
    if missing:
        files = ", ".join(map(loop_file, missing))
        plan = f" (the run planned {planned} loops)" if planned else ""
        notes.append(f"Missing in {save_path}: {files}{plan}; the others are compared")
    return notes


def planned_loops(save_path: Path, rows: Sequence[Row]) -> int:
    """How many loops the run was to have, by its checkpoints and its `args.json`; 0 where nothing tells."""
    arguments = [row.config["arguments"] for row in rows if row.loop is not None and row.config]
    counts = [item.get("num_feedback_loops") for item in (*arguments, arguments_in(save_path))]
    return max((count for count in counts if type(count) is int and count <= MOST_LOOPS), default=0)
