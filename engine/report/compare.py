"""`compare_feedback_loops.py`: evaluate the loops of a feedback run and the models they are compared with."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config.evaluation import ComparisonArguments
from engine.data.task import TaskData, load_task, mask_notes
from engine.detector.detector import UNADAPTED, Detector
from engine.detector.loading import build_detector, checkpoint_config, load_clip_for, unadapted_detector
from engine.evaluation.evaluate import evaluate
from engine.evaluation.inference import read_runs, zero_shot_notes
from engine.evaluation.references import ReferenceChoice, add_dataset_references
from engine.evaluation.results import Evaluation
from engine.report.commands import command_line
from engine.report.comparison import Comparison, Row, forward_notes, unfair_notes, write_comparison
from engine.report.page import example_rows, write_report
from engine.runtime.device import check_compiler
from engine.runtime.distributed import join_launch, main_process_first
from engine.runtime.run_folder import REPORT_FILE, STATE_FILE, arguments_in, find_loops, loop_file
from engine.training.state import read_state
from engine.training.verdicts import validated_loop
from model.blocks import BlockRunner
from model.checkpoint import read_checkpoint
from model.clip import FrozenCLIP
from model.config import SIDES
from model.scoring import DET_SCORES
from utils.errors import UserError
from utils.files import check_folder
from utils.logging import set_up_logging
from utils.processes import is_main_process

logger = logging.getLogger(__name__)

# Arguments that do not change the results.
NOT_IN_COMMAND = ("device", "batch_size", "num_workers", "compile")


@dataclass(frozen=True)
class Setup:
    """The arguments, data and device that all rows are evaluated with."""

    arguments: ComparisonArguments
    data: TaskData
    device: str


def compare_feedback_loops(arguments: ComparisonArguments) -> int:
    """Evaluate every loop of a run and what it is compared with on the same images; write `comparison.*` files.

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
    unadapted = [Row(UNADAPTED)] if arguments.unadapted else []
    runs = read_runs(arguments.base_path, arguments.cross_path)
    others = [Row(name, checkpoint=checkpoint) for name, checkpoint in runs.items()]
    rows = [*unadapted, *others, *(read_loop(number, file) for number, file in files.items())]
    trained: dict[str, Any] = next((row.config["arguments"] for row in reversed(rows) if row.config), {})
    with main_process_first():
        data = load_task(arguments.dataset, *arguments.image_choices(), run=trained)
    setup = Setup(arguments, data, device)
    clip = load_shared_clip(rows, arguments)
    evaluations: dict[str, Evaluation] = {}
    notes: list[str] = []
    if clip is None:
        logger.warning("No checkpoint can be read, so there is nothing to evaluate")
        rows = [row for row in rows if row.problem]
    else:
        rows, evaluations = evaluate_rows(rows, clip, setup)
        notes = [*unfair_notes(rows), *forward_notes(rows, clip)]
    if is_main_process():
        configs = {row.name: row.config for row in rows}
        notes = [*zero_shot_notes(configs, data), *mask_notes(data), *missing_notes(save_path, rows), *notes]
        choices = (arguments.det_score or DET_SCORES[0], ReferenceChoice.of(arguments))
        selected = selected_loop(save_path)
        comparison = Comparison(data.located.spec.name, rows, evaluations, notes, *choices, selected)
        # The log starts here, so that an interrupted comparison leaves no files.
        set_up_logging(folder / "comparison.log")
        write_comparison(comparison, save_path, folder)
        if arguments.report:
            report(comparison, clip, setup, folder / comparison.file(REPORT_FILE))
    return int(any(row.problem for row in rows))


def report(comparison: Comparison, clip: FrozenCLIP | None, setup: Setup, path: Path) -> None:
    """Write `report.html`, with example heatmaps if any row can be read."""
    rows = example_rows(comparison)
    models = build_detectors(rows, clip, setup)[0] if clip is not None and rows else {}
    arguments = setup.arguments
    command = command_line("compare_feedback_loops.py", arguments.changed(exclude=NOT_IN_COMMAND))
    write_report(comparison, models, setup.data, arguments.save_path, path, command)


def read_loop(number: int, file: Path) -> Row:
    """A loop's row; if its file cannot be read, or is no loop's, the row says why."""
    name = f"Loop {number}"
    try:
        checkpoint = replace(read_checkpoint(file), optimizers={})
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


def load_shared_clip(rows: Sequence[Row], arguments: ComparisonArguments) -> FrozenCLIP | None:
    """The CLIP of the first loop, on which all rows are evaluated; None if no checkpoint can be read.

    Raises `UserError` if that checkpoint was trained on other weights.
    """
    checkpoints = [(row, row.checkpoint) for row in rows if row.checkpoint]
    if not checkpoints:
        return None
    # A file without config does not name its CLIP, so that of the others is assumed.
    _, first = min(checkpoints, key=lambda pair: (pair[0].config is None, pair[0].loop is None))
    clip = load_clip_for(first, arguments.clip_weights, **arguments.overrides())
    checkpoint_config(first, clip)
    return clip


def evaluate_rows(rows: Sequence[Row], clip: FrozenCLIP, setup: Setup) -> tuple[list[Row], dict[str, Evaluation]]:
    """Evaluate all rows on one CLIP, reading the images once; returns the rows and the metrics by name.

    Loops that turn out not to fit the CLIP are returned with a problem. Raises `UserError` for such a base or
    cross-attention checkpoint.
    """
    arguments = setup.arguments
    clip.run = BlockRunner(compiled=(arguments.batch_size,) if arguments.compile else ())
    detectors, problems = build_detectors([row for row in rows if not row.problem], clip, setup)
    rows = [replace(row, checkpoint=None, problem=problems[row.name]) if row.name in problems else row for row in rows]
    if not detectors:
        return rows, {}
    sizes = (arguments.batch_size, arguments.num_workers)
    return rows, evaluate(detectors, setup.data, setup.device, *sizes, arguments.precision)


def build_detectors(rows: Sequence[Row], clip: FrozenCLIP, setup: Setup) -> tuple[dict[str, Detector], dict[str, str]]:
    """Models with their references, and the problems of loops that do not fit the CLIP; both by the row's name."""
    detectors: dict[str, Detector] = {}
    problems: dict[str, str] = {}
    for row in rows:
        if row.checkpoint is None:
            detectors[row.name] = unadapted_detector(clip, setup.arguments.det_score).to(setup.device)
            continue
        try:
            detectors[row.name] = build_detector(row.checkpoint, clip, **setup.arguments.overrides()).to(setup.device)
        except UserError as error:
            if row.loop is None:
                raise
            problems[row.name] = str(error)
    add_dataset_references(list(detectors.values()), setup.data, ReferenceChoice.of(setup.arguments))
    return detectors, problems


def selected_loop(save_path: Path) -> int | None:
    """The loop that a run's held-out training images selected; None for a run without `--val_fraction`."""
    state = save_path / STATE_FILE
    if not arguments_in(save_path).get("val_fraction") or not state.is_file():
        return None
    return validated_loop(read_state(state)["loops"])


def missing_notes(save_path: Path, rows: Sequence[Row]) -> list[str]:
    """Notes on loops that cannot be read and on loops without a file."""
    notes = [f"{row.name} is unreadable: {row.problem}" for row in rows if row.problem]
    loops = {row.loop: row.config for row in rows if row.loop is not None}
    # A resumed run may plan more loops than its first checkpoints say.
    arguments = [*(config["arguments"] for config in loops.values() if config), arguments_in(save_path)]
    planned = max((item.get("num_feedback_loops", 0) for item in arguments), default=0)
    missing = [number for number in range(1, max(*loops, planned) + 1) if number not in loops]
    if missing:
        plan = f" (the run planned {planned} loops)" if planned else ""
        files = ", ".join(map(loop_file, missing))
        notes.append(f"Missing in {save_path}: {files}{plan}; the others are compared")
    return notes
