"""Study files: arms, seeds, pairs of datasets, and comparisons. Nothing here depends on a particular script."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin

from dataset.catalog import expand_groups
from utils.errors import UserError
from utils.reading import read_toml
from utils.schema import check_fields, type_hints

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A training dataset with its test datasets (in files also groups); `arguments` are added to its trainings."""

    train: str
    test: tuple[str, ...]
    arguments: Arguments = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """The arm that another arm starts from, and the arguments that name files in its run folder."""

    arm: str
    arguments: Arguments = field(default_factory=dict)


@dataclass(frozen=True)
class Rescored:
    """A CSV file of `engine.evaluation.rescore`; train: the training dataset, empty without training."""

    file: str
    train: str = ""


@dataclass(frozen=True)
class Arm:
    """One way to train or to test.

    Attributes:
        script: The training script; empty for an arm that is only tested.
        arguments: Added to the arguments of all trainings.
        start: The arm whose run this arm starts from.
        checkpoint: The file of the run to test. Without `script` and `start`, the test script's `--checkpoint`.
        test_arguments: Added to the arguments of all tests.
        launch: Arguments between Python and the script, such as those of `accelerate launch`.
        gpus: GPUs of one training.
        compare: Whether the arm gets a verdict; otherwise its metrics are only listed.
        note: Shown in the report.
    """

    script: str = ""
    arguments: Arguments = field(default_factory=dict)
    start: Start | None = None
    checkpoint: str = ""
    test_arguments: Arguments = field(default_factory=dict)
    launch: tuple[str, ...] = ()
    gpus: int = 1
    compare: bool = True
    note: str = ""


@dataclass(frozen=True)
class Study:
    """The content of a study file (docs/studies.md).

    Attributes:
        compare_with: The arm that all others are compared with.
        also_compare_with: More such arms, each with a report of its own.
        settings: Additional arguments of all arms, by name; the study is repeated in each setting.
        metrics: Metrics to report; default: all columns of the evaluations.
        verdict_metrics: Metrics of the verdict; default: the first one.
        margin: Largest difference that does not matter, in percentage points.
        literature: CSV file of published results for the same pairs.
        rescored: Results of other methods' maps on the test datasets.
        needs: What the study needs besides its datasets; `--dry_run` prints it.
    """

    name: str
    seeds: tuple[int, ...]
    pairs: tuple[Pair, ...]
    compare_with: str
    arms: dict[str, Arm]
    test_script: str
    title: str = ""
    also_compare_with: tuple[str, ...] = ()
    arguments: Arguments = field(default_factory=dict)
    test_arguments: Arguments = field(default_factory=dict)
    settings: dict[str, Arguments] = field(default_factory=lambda: {"": {}})
    metrics: tuple[str, ...] = ()
    verdict_metrics: tuple[str, ...] = ()
    margin: float = 0.5
    literature: str = ""
    rescored: tuple[Rescored, ...] = ()
    needs: str = ""


def read_study(path: Path, seeds: tuple[int, ...] | None = None) -> Study:
    """Read and check a study file.

    Args:
        path: The TOML file.
        seeds: Replace the seeds of the file.

    Raises:
        UserError: The file cannot be read, or its content is invalid.
    """
    content = read_toml(path)
    if set(content) != {"study", "arms"} or not isinstance(content["study"], Mapping):
        raise UserError(f"{path}: needs tables [study] and [arms.NAME], has {', '.join(content) or 'none'}")
    table = {**content["study"], "arms": content["arms"]}
    check_fields(table, Study, path)
    study: Study = _build(Study, table)
    pairs = [replace(pair, test=tuple(expand_groups(pair.test, without=[pair.train]))) for pair in study.pairs]
    study = replace(study, seeds=seeds or study.seeds, pairs=tuple(pairs))
    _check(study, path)
    return study


def _build(hint: Any, value: Any) -> Any:
    """Convert a checked TOML value to the dataclasses and tuples of its annotation."""
    origin, parts = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        hints = type_hints(hint)
        return hint(**{name: _build(hints[name], item) for name, item in value.items()})
    if origin is dict:
        return {name: _build(parts[1], item) for name, item in value.items()}
    if origin is tuple:
        return tuple(_build(parts[0], item) for item in value)
    # An optional value.
    return _build(parts[0], value) if parts else value


def _check(study: Study, path: Path) -> None:
    def refuse(problem: str) -> None:
        raise UserError(f"{path}: {problem}")

    if not re.fullmatch(r"\w[\w.-]*", study.name):
        refuse(f"name = {study.name!r} names a folder: use letters, digits, _ . - only")
    for key in ("seeds", "pairs", "arms", "settings"):
        if not getattr(study, key):
            refuse(f"{key} is empty")
    if len(set(study.seeds)) < len(study.seeds):
        refuse("seeds (or --seeds) contains a seed twice")
    trainings = [(pair.train, tuple(sorted(map(str, pair.arguments.items())))) for pair in study.pairs]
    if len(set(trainings)) < len(trainings):
        refuse("two pairs have the same training; list all test datasets in one of them")
    for name in (study.compare_with, *study.also_compare_with):
        if name not in study.arms:
            refuse(f"the arm to compare with, {name!r}, is not among the arms ({', '.join(study.arms)})")
    if unknown := set(study.verdict_metrics) - set(study.metrics or study.verdict_metrics):
        refuse(f"verdict_metrics not among metrics: {', '.join(sorted(unknown))}")
    for name, arm in study.arms.items():
        if arm.gpus < 1:
            refuse(f"arms.{name}: gpus = {arm.gpus}, must be at least 1")
        if not arm.checkpoint:
            refuse(f"arms.{name}: checkpoint is missing (the file to test, or none for an unadapted model)")
        chain = [name]
        while arm.start is not None:
            if arm.start.arm not in study.arms:
                refuse(f"arms.{chain[-1]}: starts from {arm.start.arm!r}, which is not an arm")
            if arm.start.arm in chain:
                refuse(f"arms.{name}: starts from itself ({' from '.join([*chain, arm.start.arm])})")
            chain.append(arm.start.arm)
            arm = study.arms[arm.start.arm]
            if not arm.script:
                refuse(f"arms.{chain[-2]}: starts from {chain[-1]!r}, which trains nothing")
