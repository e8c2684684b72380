"""Whether the arms of a study were compared fairly, and in which arguments they differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.study.evaluations import MetricTable, read_arguments, read_evaluation, read_facts
from engine.study.plan import Cell, Plan
from engine.study.results import Results, SettingResult, cells_of
from utils.text import list_names

SAME, UNKNOWN = "same", "unknown"
# What the runner adds to every training.
RUNNER_ARGUMENTS = ("save_path", "seed", "dataset")
# The findings on each fact, over seeds and pairs.
Findings = dict[str, set[str]]


@dataclass(frozen=True)
class Fairness:
    """How arms differ from the arm to compare with in what should be equal.

    Attributes:
        facts: What is compared.
        rows: An arm (and setting), and for each fact "same", "unknown" or the difference.
        compared: The arms that have verdicts.
    """

    facts: list[str]
    rows: list[tuple[str, list[str]]]
    compared: frozenset[str]

    @property
    def unfair(self) -> list[str]:
        """The differences of the arms that have verdicts, in sentences."""
        return [
            f"{arm} differs in {fact}: {finding}"
            for arm, row in self.rows
            for fact, finding in zip(self.facts, row, strict=True)
            if finding not in (SAME, UNKNOWN) and arm in self.compared
        ]


def check_fairness(results: Results) -> Fairness:
    """Compare training data, seed, training budget and evaluation of all arms, cell by cell."""
    facts_by_source: dict[tuple[Any, ...], dict[str, str]] = {}

    def facts_of(cell: Cell) -> dict[str, str]:
        key = (cell.source.folder if cell.source else None, cell.arm.checkpoint)
        if key not in facts_by_source:
            facts_by_source[key] = read_facts(cell)
        return facts_by_source[key]

    findings: dict[str, Findings] = {}
    compared: set[str] = set()
    for setting in results.settings:
        base = next((arm for arm in setting.arms if arm.name == results.plan.study.compare_with), None)
        for arm in setting.arms:
            if base is None or arm is base:
                continue
            label = ", ".join(filter(None, [arm.name, setting.name]))
            if arm.verdicts:
                compared.add(label)
            row = _compare_cells(results.plan, setting, arm.name, facts_of)
            row["classes with results"] = {_compare_columns(arm.table, base.table)}
            findings[label] = row
    facts = list(dict.fromkeys(fact for row in findings.values() for fact in row))
    rows = [(arm, [_in_words(row.get(fact, {UNKNOWN})) for fact in facts]) for arm, row in findings.items()]
    return Fairness(facts, rows, frozenset(compared))


def _compare_cells(
    plan: Plan, setting: SettingResult, arm: str, facts_of: Callable[[Cell], dict[str, str]]
) -> Findings:
    """The findings on the finished cells of an arm."""
    base_cells = cells_of(plan, setting.name, plan.study.compare_with)
    findings: Findings = {}
    for key, cell in cells_of(plan, setting.name, arm).items():
        base = base_cells[key]
        if not (cell.done and base.done):
            continue
        if cell.source is None:
            findings.setdefault("training data", set()).add("not trained")
        else:
            own, other = facts_of(cell), facts_of(base)
            for fact in {**other, **own}:
                values = (own.get(fact), other.get(fact))
                difference = SAME if values[0] == values[1] else f"{values[0]} compared with {values[1]}"
                findings.setdefault(fact, set()).add(UNKNOWN if None in values else difference)
        findings.setdefault("evaluation", set()).add(_compare_evaluations(cell, base))
    return findings


def _compare_evaluations(cell: Cell, base: Cell) -> str:
    """Whether two cells were tested with the same arguments and, judging by their numbers, on the same images."""
    arguments = cell.arm.test_arguments
    if arguments != base.arm.test_arguments:
        return "other arguments: " + " ".join(f"--{name} {value}" for name, value in sorted(arguments.items()))
    own, other = (
        {
            step.test: [(row.class_name, row.counts) for row in read_evaluation(step.path)]
            for step in tested.steps
            if step.test in tested.pair.test
        }
        for tested in (cell, base)
    )
    return SAME if all(own[test] == other[test] for test in own.keys() & other.keys()) else "other images"


def _compare_columns(table: MetricTable, base: MetricTable) -> str:
    own, other = (~np.isnan(one.values).all(axis=(0, 2)) for one in (table, base))
    return SAME if (own == other).all() else f"{own.sum()} compared with {other.sum()}"


def _in_words(findings: set[str]) -> str:
    """The findings over seeds and pairs in one cell of a table."""
    different = sorted(findings - {SAME, UNKNOWN})
    return list_names(different, 2) if different else UNKNOWN if UNKNOWN in findings else SAME


def argument_differences(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the arguments in which the arms differ.

    Arguments that the runner adds are left out, and so are the files of other arms, except for the arm's start.
    """
    study = results.plan.study
    setting = next(iter(study.settings))
    files = {name for arm in study.arms.values() if arm.start for name in arm.start.arguments}
    arguments: dict[str, dict[str, Any]] = {}
    for name, arm in study.arms.items():
        cell = next(iter(cells_of(results.plan, setting, name).values()))
        trained = {} if cell.training is None else read_arguments(cell)
        arguments[name] = {
            "script": arm.script or "none",
            "starts from": arm.start.arm if arm.start else "nothing",
            **{key: value for key, value in trained.items() if key not in files.union(RUNNER_ARGUMENTS)},
            **{f"test: {key}": value for key, value in arm.test_arguments.items()},
            "checkpoint": arm.checkpoint,
        }
    rows = []
    for name in dict.fromkeys(key for values in arguments.values() for key in values):
        values = [_as_typed(of_arm.get(name)) for of_arm in arguments.values()]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return ["Argument", *arguments], rows


def _as_typed(value: Any) -> str:
    """A value as on the command line; a dash for none."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
