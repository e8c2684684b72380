"""The cells of a study: training and tests of each arm, seed and training dataset, with folders and commands."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.study.study import Arguments, Arm, Pair, Study
from utils.arguments import command_options
from utils.reading import read_json

# The repository: working directory of all processes.
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Step:
    """One process: a training, or the test on one dataset.

    Attributes:
        path: The marker `path.done` and the log `path.log` are next to it; a test writes its results into it.
        command: The arguments after `python`.
        test: The test dataset; empty for a training.
    """

    path: Path
    command: tuple[str, ...]
    test: str = ""

    @property
    def marker(self) -> Path:
        return self.path.with_name(f"{self.path.name}.done")

    @property
    def log(self) -> Path:
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def typed(self) -> str:
        """The command as typed in a shell."""
        return shlex.join(["python", *self.command])

    @property
    def done(self) -> bool:
        return self.marker.is_file()

    @property
    def seconds(self) -> float:
        """Duration of a finished step."""
        return read_json(self.marker)["seconds"]


@dataclass(frozen=True)
class Cell:
    """One arm, seed and training dataset in one setting, with its training (if any) and its tests.

    Attributes:
        seed: None if nothing is trained.
        start: The cell of the arm it starts from.
        arguments: The arguments of the training, without those that the runner adds.
    """

    arm_name: str
    arm: Arm
    setting: str
    seed: int | None
    pair: Pair
    start: Cell | None
    arguments: Arguments
    folder: Path
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        trained = [f"on {self.pair.train}", f"seed {self.seed}"] if self.seed is not None else []
        return ", ".join(filter(None, [self.arm_name, self.setting, *trained]))

    @property
    def training(self) -> Step | None:
        return next((step for step in self.steps if not step.test), None)

    @property
    def trained(self) -> bool:
        """Whether other cells can start from this one."""
        return self.training is None or self.training.done

    @property
    def done(self) -> bool:
        return all(step.done for step in self.steps)

    @property
    def source(self) -> Cell | None:
        """The cell whose training produced the tested checkpoint; None for an untrained model."""
        return self if self.training else self.start

    @property
    def checkpoint(self) -> str:
        """The `--checkpoint` of its tests."""
        if self.source is None:
            return self.arm.checkpoint
        return path_from_root(training_folder(self.source.folder) / self.arm.checkpoint)

    @property
    def chain(self) -> list[Cell]:
        """The cells whose trainings produced its weights, in their order."""
        source = self.source
        return [] if source is None else [*(source.start.chain if source.start else []), source]


@dataclass(frozen=True)
class Plan:
    """All cells of a study by setting, arm, seed and index of the pair; a cell comes after the one it starts from."""

    study: Study
    folder: Path
    by_key: Mapping[tuple[str, str, int, int], Cell]

    @cached_property
    def cells(self) -> list[Cell]:
        """The distinct cells: one that does not depend on the seed, such as an untrained arm, has many keys."""
        merged: dict[Path, Cell] = {}
        for cell in self.by_key.values():
            if cell.folder in merged:
                known = merged[cell.folder]
                steps = {step.path: step for step in (*known.steps, *cell.steps)}
                cell = replace(known, steps=tuple(steps.values()))
            merged[cell.folder] = cell
        return list(merged.values())


def make_plan(study: Study, folder: Path) -> Plan:
    """Plan a study in `folder`, seed by seed, so that an interrupted study has complete seeds."""
    cells: dict[tuple[str, str, int, int], Cell] = {}

    def add(setting: str, name: str, seed: int, number: int) -> Cell:
        key = (setting, name, seed, number)
        if key not in cells:
            start = study.arms[name].start
            start_cell = add(setting, start.arm, seed, number) if start else None
            cells[key] = _make_cell(study, folder / "cells", setting, name, seed, study.pairs[number], start_cell)
        return cells[key]

    for seed in study.seeds:
        for setting in study.settings:
            for number in range(len(study.pairs)):
                for name in study.arms:
                    add(setting, name, seed, number)
    return Plan(study, folder, cells)


def _make_cell(study: Study, folder: Path, setting: str, name: str, seed: int, pair: Pair, start: Cell | None) -> Cell:
    arm = study.arms[name]
    source = start.source if start else None
    is_trained = bool(arm.script or source)
    arguments: Arguments = {}
    if arm.script:
        merged = {**study.arguments, **study.settings[setting], **pair.arguments, **arm.arguments}
        arguments = {key: value for key, value in merged.items() if value is not False}
    files = arm.start.arguments if arm.start else {}
    identity: list[Any] = [arm.checkpoint]
    if is_trained:
        start_digest = source.folder.name.rpartition("_")[2] if source else None
        identity = [start_digest, arm.script, arm.launch, arguments, files, seed, pair.train]
    labels = [slug(setting), slug(pair.train), f"seed{seed}"] if is_trained else []
    cell_folder = folder / "_".join(filter(None, [slug(name), *labels, digest(identity)]))
    steps = []
    if arm.script:
        if source:
            run = training_folder(source.folder)
            files = {key: path_from_root(run / file) for key, file in files.items()}
        options = {**arguments, **files, "dataset": pair.train, "seed": seed}
        options["save_path"] = path_from_root(training_folder(cell_folder))
        steps.append(Step(cell_folder / "train", (*arm.launch, arm.script, *command_options(options))))
    label, cell_seed = (setting, seed) if is_trained else ("", None)
    cell = Cell(name, arm, label, cell_seed, pair, start, arguments, cell_folder, tuple(steps))
    return replace(cell, steps=(*steps, *(_test_step(study, cell, test) for test in pair.test)))


def _test_step(study: Study, cell: Cell, test: str) -> Step:
    arguments = {**study.test_arguments, **cell.arm.test_arguments}
    name = f"test_{slug(test)}_{digest([study.test_script, arguments, test, cell.arm.checkpoint])}"
    path = cell.folder / name
    options = {**arguments, "checkpoint": cell.checkpoint, "dataset": test, "output_dir": path_from_root(path)}
    return Step(path, (study.test_script, *command_options(options)), test)


def training_folder(cell_folder: Path) -> Path:
    """The `--save_path` of a cell's training."""
    return cell_folder / "run"


def digest(identity: Any) -> str:
    """A short digest of everything that determines a cell, independent of the order of arguments."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:10]


def slug(text: str) -> str:
    """A name, or the last part of a path, as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", Path(text).name if "/" in text else text).strip("_")[:40]


def path_from_root(path: Path) -> str:
    """A path relative to the repository if it is inside."""
    return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()
