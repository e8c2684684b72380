"""Whether the arms of a study were compared fairly, and in which arguments they differ."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.study.evaluations import read_arguments, read_facts
from engine.study.results import Results
from utils.text import as_typed, list_names

SAME, UNKNOWN = "same", "unknown"
# What the runner adds to every training.
RUNNER_ARGUMENTS = ("save_path", "seed", "dataset")


@dataclass(frozen=True)
class Fairness:
    """How arms differ from the arm to compare with in what should be equal.

    Attributes:
        facts: What is compared.
        rows: An arm (and setting), and for each fact "same", "unknown" or the difference.
        unfair: The differences of the arms that have verdicts, in sentences.
    """

    facts: list[str]
    rows: list[tuple[str, list[str]]]
    unfair: list[str]


def check_fairness(results: Results) -> Fairness:
    """Compare training data, seed, training budget and evaluation of all arms, cell by cell."""
    plan = results.plan
    facts_by_key = {key: read_facts(cell) for key, cell in plan.by_key.items() if cell.done}
    findings: dict[str, dict[str, str]] = {}
    compared: list[str] = []
    for setting in results.settings:
        base = next((arm for arm in setting.arms if arm.name == plan.study.compare_with), None)
        for arm in setting.arms:
            if base is None or arm is base:
                continue
            by_fact: dict[str, set[str]] = defaultdict(set)
            for (setting_name, name, seed, pair), own in facts_by_key.items():
                other = facts_by_key.get((setting_name, base.name, seed, pair))
                if (setting_name, name) == (setting.name, arm.name) and other is not None:
                    for fact in {**other, **own}:
                        by_fact[fact].add(_difference(own.get(fact), other.get(fact)))
            counts = (str((~np.isnan(table.values).all(axis=(0, 2))).sum()) for table in (arm.table, base.table))
            by_fact["classes with results"].add(_difference(*counts))
            label = ", ".join(filter(None, [arm.name, setting.name]))
            findings[label] = {fact: _in_words(differences) for fact, differences in by_fact.items()}
            if arm.verdicts:
                compared.append(label)
    facts = list(dict.fromkeys(fact for row in findings.values() for fact in row))
    rows = [(label, [row.get(fact, UNKNOWN) for fact in facts]) for label, row in findings.items()]
    unfair = [
        f"{label} differs in {fact}: {finding}"
        for label in compared
        for fact, finding in findings[label].items()
        if finding not in (SAME, UNKNOWN)
    ]
    return Fairness(facts, rows, unfair)


def _difference(own: str | None, other: str | None) -> str:
    if own is None or other is None:
        return UNKNOWN
    return SAME if own == other else f"{own} compared with {other}"


def _in_words(findings: set[str]) -> str:
    """The findings over seeds and pairs in one cell of a table."""
    different = sorted(findings - {SAME, UNKNOWN})
    return list_names(different, 2) if different else UNKNOWN if UNKNOWN in findings else SAME


def argument_differences(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the arguments in which the arms differ.

    Arguments that the runner adds are left out, and so are the files of other arms, except for the arm's start.
    """
    study = results.plan.study
    cells = results.plan.by_key
    files = {name for arm in study.arms.values() if arm.start for name in arm.start.arguments}
    arguments: dict[str, dict[str, Any]] = {}
    for name, arm in study.arms.items():
        cell = cells[next(iter(study.settings)), name, study.seeds[0], 0]
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
        values = [as_typed(of_arm.get(name)) for of_arm in arguments.values()]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return ["Argument", *arguments], rows
