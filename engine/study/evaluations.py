"""Read what cells wrote: metrics of evaluations, training histories, and facts for the fairness check."""

import logging
import math
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.study.plan import Cell, Plan, training_folder
from utils.arguments import command_options
from utils.errors import UserError
from utils.reading import read_json, read_json_lines, read_table

logger = logging.getLogger(__name__)

# Columns of an evaluation's CSV file; every other column is a metric in percent. The last row is an average.
CLASS, MODEL, AVERAGE = "class", "model", "average"
# Of the rates of errors, lower is better.
CHOICES = ("det_score", "aupro_limit", "map_size")
NO_METRICS = ("model", "dataset", CLASS, "images", "anomalous", *CHOICES, "overkill", "escape")
COUNTS = ("images", "anomalous")
HISTORY, ARGUMENTS = "history.jsonl", "args.json"


@dataclass(frozen=True)
class ClassMetrics:
    """The metrics of a class in percent (NaN if undefined), and its numbers of images and anomalous images."""

    class_name: str
    values: dict[str, float]
    counts: tuple[str, ...]


def read_evaluation(folder: Path) -> list[ClassMetrics]:
    """The metrics in the CSV file of an evaluation; if it contains several models, those of the last one."""
    for file in sorted(folder.glob("*.csv")):
        rows = [row for _, row in read_table(file)]
        if rows and CLASS in rows[0]:
            rows = [row for row in rows if row.get(MODEL) == rows[-1].get(MODEL) and row[CLASS] != AVERAGE]
            return [
                ClassMetrics(
                    row[CLASS],
                    {name: as_number(value) for name, value in row.items() if name not in NO_METRICS},
                    tuple(row.get(name, "") for name in COUNTS),
                )
                for row in rows
            ]
    return []


def as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@dataclass(frozen=True)
class MetricTable:
    """The metrics of an arm in a setting.

    Attributes:
        columns: (training dataset, test dataset, class) of all evaluations in the setting, of any arm.
        values: (seeds, columns, metrics), in percent; NaN if undefined or missing.
    """

    seeds: tuple[int, ...]
    columns: tuple[tuple[str, str, str], ...]
    metrics: tuple[str, ...]
    values: np.ndarray


Evaluations = dict[tuple[str, str, int, int, str], list[ClassMetrics]]


def read_evaluations(plan: Plan) -> Evaluations:
    """The finished evaluations, by setting, arm, seed, index of the pair, and test dataset."""
    cached: dict[Path, list[ClassMetrics]] = {}
    evaluations: Evaluations = {}
    for key, cell in plan.by_key.items():
        for step in cell.steps:
            if not step.test or not step.done:
                continue
            if step.path not in cached:
                cached[step.path] = read_evaluation(step.path)
            if cached[step.path]:
                evaluations[(*key, step.test)] = cached[step.path]
    return evaluations


def metrics_of(plan: Plan, evaluations: Evaluations) -> tuple[str, ...]:
    """The metrics of the study; by default, all of its evaluations."""
    names = (name for classes in evaluations.values() for row in classes for name in row.values)
    return plan.study.metrics or tuple(dict.fromkeys(names))


def arm_table(plan: Plan, evaluations: Evaluations, setting: str, arm: str, metrics: Sequence[str]) -> MetricTable:
    """The metrics of an arm; all arms of a setting have the same columns."""
    study = plan.study
    columns = dict.fromkeys(
        (train_name(plan, number), test, row.class_name)
        for (in_setting, _, _, number, test), classes in evaluations.items()
        if in_setting == setting
        for row in classes
    )
    # In the order of the study file; classes in the order of the evaluation.
    order = [(train_name(plan, number), test) for number, pair in enumerate(study.pairs) for test in pair.test]
    ordered = sorted(columns, key=lambda column: order.index(column[:2]))
    index = {column: number for number, column in enumerate(ordered)}
    values = np.full((len(study.seeds), len(ordered), len(metrics)), np.nan)
    for (in_setting, of_arm, seed, number, test), classes in evaluations.items():
        if (in_setting, of_arm) == (setting, arm):
            for row in classes:
                column = index[train_name(plan, number), test, row.class_name]
                values[study.seeds.index(seed), column] = [row.values.get(name, math.nan) for name in metrics]
    return MetricTable(study.seeds, tuple(ordered), tuple(metrics), values)


def train_name(plan: Plan, number: int) -> str:
    """The training dataset of a pair, with the arguments of the pair if another pair has the same dataset."""
    pair = plan.study.pairs[number]
    same = [other for other in plan.study.pairs if other.train == pair.train]
    return pair.train if len(same) == 1 else f"{pair.train} {' '.join(map(str, pair.arguments.values()))}".strip()


def read_history(cell: Cell) -> list[dict[str, Any]]:
    """The rows of a training's history; empty if there is none."""
    try:
        return [row for _, row in read_json_lines(training_folder(cell.folder) / HISTORY)]
    except UserError:
        return []


def read_arguments(cell: Cell) -> dict[str, Any]:
    """All arguments of a training from its record, defaults and presets included; without it, those of the study."""
    try:
        return {**cell.arguments, **read_json(training_folder(cell.folder) / ARGUMENTS, dict)}
    except UserError:
        return dict(cell.arguments)


def read_facts(cell: Cell) -> dict[str, str]:
    """What must be equal in a fair comparison, of a finished cell; unknown facts are left out.

    The tested checkpoint's own `config` (data, seed) and `steps` (budget) count first; otherwise the histories of its
    trainings are added up.
    """
    tested = [row for step in cell.steps if step.test for row in read_evaluation(step.path)]
    images, anomalous = (sum(int(row.counts[index] or 0) for row in tested) for index in range(2))
    facts = {
        "training data": "not trained",
        "test arguments": " ".join(command_options(cell.arm.test_arguments)) or "none",
        "test images": f"{images} ({anomalous} anomalous)",
    }
    source = cell.source
    if source is None:
        return facts
    checkpoint = _read_checkpoint(training_folder(source.folder) / cell.arm.checkpoint)
    config, arguments = checkpoint.get("config") or {}, read_arguments(source)
    trained = {
        "training data": config.get("dataset", source.pair.train),
        "images of each class": config.get("shot") or config.get("training_mode"),
        "digest of the image list": config.get("metadata_digest"),
        "seed": config.get("seed", arguments.get("seed", source.seed)),
    }
    counted: Counter[str] = Counter()
    for row in (row for link in cell.chain for row in read_history(link)):
        counted[row.get("stage", "all")] += row.get("steps", 0)
    steps = checkpoint.get("steps") or counted
    trained |= {f"optimizer steps, {stage}": count for stage, count in steps.items()}
    return facts | {name: str(value) for name, value in trained.items() if value is not None}


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """The entries of a checkpoint, its tensors left on disk; empty if it cannot be read."""
    # Jobs that only read metrics need not wait for this import.
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        logger.debug("%s: %s", path, error)
        return {}
    return content if isinstance(content, dict) else {}
