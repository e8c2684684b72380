"""The cells of a study: what is run for each arm, seed and training dataset, where, and after what."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.study.study import Arguments, Arm, Pair, Study

# Where every process runs: the repository's root.
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Step:
    """One process: its words after `python`, and the path beside which its marker and log lie.

    kind: "train" or "test"; test: the dataset tested on. marker: written last, by the keeper.
    """

    kind: str
    place: Path
    words: tuple[str, ...]
    test: str = ""

    @property
    def marker(self) -> Path:
        return self.place.with_name(f"{self.place.name}.done")

    @property
    def log(self) -> Path:
        return self.place.with_name(f"{self.place.name}.log")

    @property
    def done(self) -> bool:
        return self.marker.is_file()

    @property
    def seconds(self) -> float:
        """How long it took, once it is done."""
        return json.loads(self.marker.read_text(encoding="utf-8"))["seconds"]


@dataclass(frozen=True)
class Cell:
    """One arm, seed and training dataset in one setting: its training, if it has one, and its evaluations.

    given: the training's arguments, as the study file has them; seed and pair are None where nothing is trained.
    """

    arm_name: str
    arm: Arm
    setting: str
    seed: int | None
    pair: Pair
    start: Cell | None
    given: Arguments
    folder: Path
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        trained = [f"on {self.pair.train}", f"seed {self.seed}"] if self.seed is not None else []
        return ", ".join(filter(None, [self.arm_name, self.setting, *trained]))

    @property
    def training(self) -> Step | None:
        return next((step for step in self.steps if step.kind == "train"), None)

    @property
    def trained(self) -> bool:
        """Whether other cells can start from this one."""
        return self.training is None or self.training.done

    @property
    def done(self) -> bool:
        return all(step.done for step in self.steps)

    @property
    def run(self) -> Cell | None:
        """The cell whose training made what this one tests; None where nothing was trained."""
        return self if self.training else self.start

    @property
    def checkpoint(self) -> str:
        """What its tests are told to test."""
        if self.run is None:
            return self.arm.checkpoint
        return shown(run_folder(self.run.folder) / self.arm.checkpoint)

    @property
    def chain(self) -> list[Cell]:
        """The cells whose trainings made its weights, the first of them first."""
        run = self.run
        return [] if run is None else [*(run.start.chain if run.start else []), run]

    @cached_property
    def level(self) -> int:
        """How many cells must come before."""
        return 0 if self.start is None else 1 + self.start.level


@dataclass(frozen=True)
class Plan:
    """All cells of a study in the order in which they are run, by setting, arm, seed and number of the pair."""

    study: Study
    folder: Path
    by_key: Mapping[tuple[str, str, int, int], Cell]

    @cached_property
    def cells(self) -> list[Cell]:
        """Each once: what does not depend on the seed, such as an untrained arm, is the same cell for all of them."""
        found: dict[Path, Cell] = {}
        for cell in self.by_key.values():
            if cell.folder in found:
                known = found[cell.folder]
                steps = {step.place: step for step in (*known.steps, *cell.steps)}
                cell = replace(known, steps=tuple(steps.values()))
            found[cell.folder] = cell
        return list(found.values())


def make_plan(study: Study, folder: Path) -> Plan:
    """The cells of a study under `folder`, seed by seed, so that what is finished early is whole seeds."""
    found: dict[tuple[str, str, int, int], Cell] = {}

    def cell(setting: str, name: str, seed: int, number: int) -> Cell:
        key = (setting, name, seed, number)
        if key not in found:
            start = study.arms[name].start
            before = cell(setting, start.arm, seed, number) if start else None
            found[key] = _make_cell(study, folder / "cells", setting, name, seed, study.pairs[number], before)
        return found[key]

    for seed in study.seeds:
        for setting in study.settings:
            for number in range(len(study.pairs)):
                for name in study.arms:
                    cell(setting, name, seed, number)
    return Plan(study, folder, found)


def _make_cell(study: Study, folder: Path, setting: str, name: str, seed: int, pair: Pair, start: Cell | None) -> Cell:
    arm, flags = study.arms[name], study.flags
    run = start.run if start else None
    given: Arguments = {}
    identity: dict[str, Any] = {"start": run.folder.name.rpartition("_")[2] if run else None}
    if arm.script:
        given = {**study.arguments, **study.settings[setting].arguments, **pair.arguments, **arm.arguments}
        given = {key: value for key, value in given.items() if value is not False}
        files = arm.start.arguments if arm.start else {}
        identity |= {
            "script": arm.script,
            "launch": list(arm.launch),
            "arguments": given,
            "files": files,
            "seed": seed,
            "dataset": pair.train,
            "flags": [flags.seed, flags.dataset],
        }
    elif run is None:
        identity |= {"checkpoint": arm.checkpoint, "arm": name}
    trained = [slug(setting), slug(pair.train), f"seed{seed}"] if arm.script or run else []
    cell_folder = folder / "_".join(filter(None, [slug(name), *trained, digest(identity)]))
    steps = []
    if arm.script:
        saved = run_folder(cell_folder)
        files = {key: shown(run_folder(run.folder) / file) for key, file in files.items()} if run else {}
        words = [
            *arm.launch,
            arm.script,
            *words_of({**given, **files}),
            *_filled(flags.dataset, pair.train),
            *_filled(flags.seed, seed),
            *_filled(flags.save, shown(saved)),
        ]
        steps.append(Step("train", cell_folder / "train", tuple(words)))
    is_trained = bool(arm.script or run)
    bare = Cell(
        name,
        arm,
        setting if is_trained else "",
        seed if is_trained else None,
        pair,
        start,
        given,
        cell_folder,
        tuple(steps),
    )
    steps += [_test_step(study, bare, test) for test in pair.test]
    return replace(bare, steps=tuple(steps))


def _test_step(study: Study, cell: Cell, test: str) -> Step:
    flags = study.flags
    given = {**study.test_arguments, **cell.arm.test_arguments}
    identity = {
        "script": study.test_script,
        "arguments": given,
        "dataset": test,
        "checkpoint": cell.arm.checkpoint,
        "flags": [flags.checkpoint, flags.dataset],
    }
    place = cell.folder / f"test_{slug(test)}_{digest(identity)}"
    words = [
        study.test_script,
        *words_of(given),
        *_filled(flags.checkpoint, cell.checkpoint),
        *_filled(flags.dataset, test),
        *_filled(flags.output, shown(place)),
    ]
    return Step("test", place, tuple(words), test)


def run_folder(cell_folder: Path) -> Path:
    """Where a cell's training writes."""
    return cell_folder / "run"


def _filled(flag: str, value: object) -> list[str]:
    return [flag, str(value)] if flag else []


def words_of(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments as words: true is a flag alone, false is left out, a list is spread."""
    words: list[str] = []
    for name, value in arguments.items():
        if value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list) else [value])]
    return words


def digest(identity: Mapping[str, Any]) -> str:
    """A short name for everything that determines a cell; the order of arguments does not count."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:10]


def slug(text: str) -> str:
    """A name, or the last part of a path, as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", Path(text).name if "/" in text else text).strip("_")[:40]


def shown(path: Path) -> str:
    """A path as a command names it: from the repository's root where it lies below."""
    return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()
