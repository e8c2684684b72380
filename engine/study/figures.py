"""What cells left behind: figures of their evaluations, losses, and facts by which a comparison is fair or not."""

from __future__ import annotations

import csv
import json
import logging
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.study.plan import Cell, Plan, run_folder

logger = logging.getLogger(__name__)

# Columns of an evaluation's CSV file; every other column is a metric in percent. Its last row is an average.
CLASS, MODEL, AVERAGE = "class", "model", "average"
NO_METRICS = ("model", "dataset", CLASS, "images", "anomalous", "det_score")
COUNTS = ("images", "anomalous")
HISTORY, ARGUMENTS = "history.jsonl", "args.json"


@dataclass(frozen=True)
class ClassFigures:
    """A class's metrics in percent, NaN where undefined; `counts`: how many images, and anomalous ones."""

    class_name: str
    values: dict[str, float]
    counts: tuple[str, ...]


def read_figures(folder: Path) -> list[ClassFigures]:
    """The figures of an evaluation, from the CSV file in its folder; of several models in it, the last one's."""
    for file in sorted(folder.glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as content:
            rows = list(csv.DictReader(content))
        if rows and CLASS in rows[0]:
            rows = [row for row in rows if row.get(MODEL) == rows[-1].get(MODEL) and row[CLASS] != AVERAGE]
            return [
                ClassFigures(
                    row[CLASS],
                    {name: _number(value) for name, value in row.items() if name not in NO_METRICS},
                    tuple(row.get(name, "") for name in COUNTS),
                )
                for row in rows
            ]
    return []


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@dataclass(frozen=True)
class Table:
    """All figures of an arm in a setting: an array by seed, column and metric, NaN where there is none.

    columns: (training dataset, test dataset, class), of the datasets that any arm was tested on so far.
    """

    seeds: tuple[int, ...]
    columns: tuple[tuple[str, str, str], ...]
    metrics: tuple[str, ...]
    values: np.ndarray


Evaluations = dict[tuple[str, str, int, int, str], list[ClassFigures]]


def read_evaluations(plan: Plan) -> Evaluations:
    """The evaluations that are done, by setting, arm, seed, number of the pair, and test dataset."""
    read: dict[Path, list[ClassFigures]] = {}
    found: Evaluations = {}
    for key, cell in plan.by_key.items():
        for step in cell.steps:
            if step.kind != "test" or not step.done:
                continue
            if step.place not in read:
                read[step.place] = read_figures(step.place)
            if read[step.place]:
                found[(*key, step.test)] = read[step.place]
    return found


def metrics_of(plan: Plan, evaluations: Evaluations) -> tuple[str, ...]:
    """The study's metrics, else those of its evaluations."""
    names = (name for figures in evaluations.values() for row in figures for name in row.values)
    return plan.study.metrics or tuple(dict.fromkeys(names))


def arm_table(plan: Plan, evaluations: Evaluations, setting: str, arm: str, metrics: Sequence[str]) -> Table:
    """The figures of an arm; its columns are the same for all arms of the setting."""
    study = plan.study
    columns: dict[tuple[str, str, str], None] = {}
    for (in_setting, _, _, number, test), figures in evaluations.items():
        if in_setting == setting:
            columns |= {(train_name(plan, number), test, row.class_name): None for row in figures}
    # In the order of the study file, classes as the evaluation has them.
    order = [(train_name(plan, number), test) for number, pair in enumerate(study.pairs) for test in pair.test]
    ordered = sorted(columns, key=lambda column: order.index(column[:2]))
    place = {column: index for index, column in enumerate(ordered)}
    values = np.full((len(study.seeds), len(ordered), len(metrics)), np.nan)
    for row, seed in enumerate(study.seeds):
        for number, pair in enumerate(study.pairs):
            for test in pair.test:
                figures = evaluations.get((setting, arm, seed, number, test), [])
                for of_class in figures:
                    column = place[train_name(plan, number), test, of_class.class_name]
                    values[row, column] = [of_class.values.get(name, math.nan) for name in metrics]
    return Table(study.seeds, tuple(ordered), tuple(metrics), values)


def train_name(plan: Plan, number: int) -> str:
    """What a pair trains on, with its own arguments where another one trains on the same."""
    pair = plan.study.pairs[number]
    same = [other for other in plan.study.pairs if other.train == pair.train]
    return pair.train if len(same) == 1 else f"{pair.train} {' '.join(map(str, pair.arguments.values()))}".strip()


def read_history(cell: Cell) -> list[dict[str, Any]]:
    """The rows of a training's history; none where it has none, or none that can be read."""
    try:
        text = (run_folder(cell.folder) / HISTORY).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError):
        return []


def read_arguments(cell: Cell) -> dict[str, Any]:
    """What a training was asked for, defaults and presets included: its own record, else what it was given."""
    try:
        content = (run_folder(cell.folder) / ARGUMENTS).read_text(encoding="utf-8")
        return {**cell.given, **json.loads(content)}
    except (OSError, ValueError):
        return dict(cell.given)


def read_facts(cell: Cell) -> dict[str, str]:
    """What a comparison must be fair in, of the checkpoint that a cell tests; what is not known is left out.

    A checkpoint that says so itself is believed first: its `config` on data and seed, its `steps` on the budget.
    Otherwise the histories of its trainings are added up.
    """
    run = cell.run
    if run is None or not run.trained:
        return {}
    said = _checkpoint(run_folder(run.folder) / cell.arm.checkpoint)
    config, arguments = said.get("config") or {}, read_arguments(run)
    facts = {
        "training data": config.get("dataset", run.pair.train),
        "images of each class": config.get("shot") or config.get("training_mode"),
        "digest of the image list": config.get("metadata_digest"),
        "seed": config.get("seed", arguments.get("seed", run.seed)),
    }
    counted: dict[str, Any] = {}
    for row in (row for link in cell.chain for row in read_history(link)):
        counted[row.get("stage", "all")] = counted.get(row.get("stage", "all"), 0) + row.get("steps", 0)
    steps = said.get("steps") or counted
    facts |= {f"optimizer steps, {stage}": count for stage, count in steps.items()}
    return {name: str(value) for name, value in facts.items() if value is not None}


def _checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's entries, its tensors left on disk; empty where there is none that can be read so."""
    # Jobs read figures too, and would all wait for this import.
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        logger.debug("%s: %s", path, error)
        return {}
    return content if isinstance(content, dict) else {}
