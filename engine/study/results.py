"""What a study found: figures and verdicts of its arms, and whether they were compared fairly."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.study.figures import (
    Evaluations,
    Table,
    arm_table,
    metrics_of,
    read_arguments,
    read_evaluations,
    read_facts,
    read_figures,
)
from engine.study.plan import ROOT, Cell, Plan
from engine.study.statistics import BETTER, NOT_DECIDED, WORSE, Contrast, Groups, Verdict, judge
from utils.errors import UserError

UNKNOWN = "unknown"


@dataclass(frozen=True)
class ArmResult:
    """An arm in a setting: its figures, their mean of each seed (seeds, metrics), and verdicts by metric.

    verdicts: empty for the arm compared with, and for one that is only shown; summary: all of them in a sentence.
    """

    name: str
    table: Table
    means: np.ndarray
    verdicts: dict[str, Verdict]
    summary: str

    def mean(self, metric: str) -> tuple[float, float, int]:
        """Mean and standard deviation over the seeds that have all datasets of the setting, and how many these are."""
        values = self.means[:, self.table.metrics.index(metric)]
        values = values[~np.isnan(values)]
        spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        return (float(values.mean()) if len(values) else math.nan), spread, len(values)


@dataclass(frozen=True)
class SettingResult:
    """All arms in one setting, those without any figure left out."""

    name: str
    arms: list[ArmResult]


@dataclass(frozen=True)
class Results:
    """A study's figures; `missing`: what is not there, in sentences."""

    plan: Plan
    metrics: tuple[str, ...]
    verdict_metrics: tuple[str, ...]
    settings: list[SettingResult]
    missing: list[str]


def read_results(plan: Plan) -> Results:
    """Read what a study's cells have left so far, and judge it."""
    evaluations = read_evaluations(plan)
    metrics = metrics_of(plan, evaluations)
    verdict_metrics = plan.study.verdict_metrics or metrics[:1]
    settings = [_setting_result(plan, evaluations, name, metrics, verdict_metrics) for name in plan.study.settings]
    return Results(plan, metrics, verdict_metrics, settings, missing_cells(plan, evaluations))


def _setting_result(
    plan: Plan, evaluations: Evaluations, setting: str, metrics: Sequence[str], verdict_metrics: Sequence[str]
) -> SettingResult:
    study = plan.study
    tables = {name: arm_table(plan, evaluations, setting, name, metrics) for name in study.arms}
    tables = {name: table for name, table in tables.items() if not np.isnan(table.values).all()}
    compared = [
        name
        for name in tables
        if name != study.compare_with and study.arms[name].compare and study.compare_with in tables
    ]
    contrasts = {
        (name, metric): _contrast(tables[name], tables[study.compare_with], metric)
        for name in compared
        for metric in metrics
    }
    # What the verdict is about is corrected together, over all arms; every other metric by itself.
    families = [list(verdict_metrics), *([metric] for metric in metrics if metric not in verdict_metrics)]
    verdicts: dict[tuple[str, str], Verdict] = {}
    for family in families:
        keys = [(name, metric) for name in compared for metric in family]
        judged = judge([contrasts[key] for key in keys], study.margin)
        verdicts |= dict(zip(keys, judged, strict=True))
    arms = []
    for name, table in tables.items():
        groups = Groups.of(table.columns)
        means = np.stack([groups.mean(table.values[..., index]) for index in range(len(metrics))], axis=-1)
        mine = {metric: verdicts[name, metric] for metric in metrics if (name, metric) in verdicts}
        arms.append(ArmResult(name, table, means, mine, _summary(mine, verdict_metrics)))
    return SettingResult(setting, arms)


def _contrast(table: Table, against: Table, metric: str) -> Contrast:
    """The differences in a metric of the seeds that both arms have completely, where it is defined for both."""
    index = table.metrics.index(metric)
    differences = table.values[..., index] - against.values[..., index]
    groups = Groups.of(table.columns)
    both = ~np.isnan(groups.mean(differences))
    seeds = tuple(seed for seed, kept in zip(table.seeds, both, strict=True) if kept)
    return Contrast(metric, seeds, differences[both], groups)


def _summary(verdicts: Mapping[str, Verdict], metrics: Sequence[str]) -> str:
    """The one verdict on an arm: on the study's metric, or gathered from several."""
    known = [verdicts[metric] for metric in metrics if metric in verdicts]
    if not known:
        return ""
    if len(known) == 1:
        return f"{metric_title(known[0].metric)}: {known[0].sentence}"
    by_word: dict[str, list[str]] = {}
    for verdict in known:
        by_word.setdefault(verdict.word, []).append(metric_title(verdict.metric))
    said = "; ".join(f"{word} in {', '.join(names)}" for word, names in by_word.items())
    # Better is better somewhere and worse nowhere.
    decided = [word for word in (BETTER, WORSE) if word in by_word]
    return said if len(by_word) == 1 else f"{' and '.join(decided) or NOT_DECIDED}: {said}"


def metric_title(metric: str) -> str:
    """A metric's name in words; what everybody writes in capitals is so written."""
    capitals = {"auroc": "AUROC", "aupro": "AUPRO", "ap": "AP", "f1": "F1", "max": "max"}
    said = " ".join(capitals.get(word, word) for word in metric.split("_")).replace("F1 max", "F1-max")
    return said[:1].upper() + said[1:]


def missing_cells(plan: Plan, evaluations: Evaluations) -> list[str]:
    """What has no figures yet, an arm in a sentence."""
    wanted: dict[tuple[str, str], list[str]] = {}
    expected = 0
    for (setting, arm, seed, number), cell in plan.by_key.items():
        tests = plan.study.pairs[number].test
        expected += len(tests)
        for test in tests:
            if (setting, arm, seed, number, test) not in evaluations:
                what = f"seed {seed}: {test}" if cell.seed is not None else test
                wanted.setdefault((setting, arm), []).append(what)
    sentences = []
    for (setting, arm), what in wanted.items():
        gone = list(dict.fromkeys(what))
        shown = "; ".join(gone[:4]) + (f"; and {len(gone) - 4} more" if len(gone) > 4 else "")
        sentences.append(f"{', '.join(filter(None, [arm, setting]))}: no figures for {shown}")
    return sentences


def cells_of(plan: Plan, setting: str, arm: str) -> dict[tuple[int, int], Cell]:
    """An arm's cells in a setting by seed and number of the pair."""
    return {(seed, number): cell for (s, a, seed, number), cell in plan.by_key.items() if (s, a) == (setting, arm)}


@dataclass(frozen=True)
class Fairness:
    """How arms differ from the arm to compare with in what a comparison must be fair in.

    facts: the columns; rows: an arm (and setting) and a cell for each fact, "same" or what differs; compared: the arms
    that are not only shown.
    """

    facts: list[str]
    rows: list[tuple[str, list[str]]]
    compared: frozenset[str]

    @property
    def unfair(self) -> list[str]:
        """The differences of the arms that are compared, in sentences."""
        return [
            f"{arm} differs in {fact}: {found}"
            for arm, row in self.rows
            for fact, found in zip(self.facts, row, strict=True)
            if found not in (SAME, UNKNOWN) and arm in self.compared
        ]


SAME = "same"


def check_fairness(results: Results) -> Fairness:
    """Compare, cell by cell, what arms were trained on, from which seed and for how long, and how they were tested."""
    plan, study = results.plan, results.plan.study
    read: dict[tuple[Any, ...], dict[str, str]] = {}

    def facts_of(cell: Cell) -> dict[str, str]:
        key = (cell.run.folder if cell.run else None, cell.arm.checkpoint)
        if key not in read:
            read[key] = read_facts(cell)
        return read[key]

    found: dict[str, dict[str, set[str]]] = {}
    compared: set[str] = set()
    for setting in results.settings:
        shown = [arm.name for arm in setting.arms]
        if study.compare_with not in shown:
            continue
        base_cells = cells_of(plan, setting.name, study.compare_with)
        base_table = next(arm.table for arm in setting.arms if arm.name == study.compare_with)
        for arm in setting.arms:
            if arm.name == study.compare_with:
                continue
            label = ", ".join(filter(None, [arm.name, setting.name]))
            row = found.setdefault(label, {})
            if arm.verdicts:
                compared.add(label)
            for key, cell in cells_of(plan, setting.name, arm.name).items():
                base = base_cells[key]
                if not (cell.done and base.done):
                    continue
                mine, theirs = facts_of(cell), facts_of(base)
                if cell.run is None:
                    row.setdefault("training data", set()).add("not trained")
                for fact in dict.fromkeys([*theirs, *mine] if cell.run is not None else []):
                    pair = (mine.get(fact), theirs.get(fact))
                    said = UNKNOWN if None in pair else SAME if pair[0] == pair[1] else f"{pair[0]} against {pair[1]}"
                    row.setdefault(fact, set()).add(said)
                row.setdefault("evaluation", set()).add(_evaluation(cell, base))
            row.setdefault("classes with figures", set()).add(_same_columns(arm.table, base_table))
    facts = list(dict.fromkeys(fact for row in found.values() for fact in row))
    rows = [(arm, [_in_words(row.get(fact, {UNKNOWN})) for fact in facts]) for arm, row in found.items()]
    return Fairness(facts, rows, frozenset(compared))


def _evaluation(cell: Cell, base: Cell) -> str:
    """Whether two cells were tested with the same arguments, on the same images as far as their numbers tell."""
    arguments = sorted(cell.arm.test_arguments.items(), key=str)
    if arguments != sorted(base.arm.test_arguments.items(), key=str):
        return "other arguments: " + " ".join(f"--{name} {value}" for name, value in arguments)
    counts = [
        {
            step.test: [(row.class_name, row.counts) for row in read_figures(step.place)]
            for step in of.steps
            if step.test in of.pair.test
        }
        for of in (cell, base)
    ]
    shared = set(counts[0]) & set(counts[1])
    return SAME if all(counts[0][test] == counts[1][test] for test in shared) else "other images"


def _same_columns(table: Table, against: Table) -> str:
    mine, theirs = (~np.isnan(of.values).all(axis=(0, 2)) for of in (table, against))
    return SAME if (mine == theirs).all() else f"{mine.sum()} against {theirs.sum()}"


def _in_words(said: set[str]) -> str:
    """What was found over seeds and pairs, in one cell: what differs, else what is not known, else the same."""
    different = sorted(said - {SAME, UNKNOWN})
    if different:
        return "; ".join(different[:2]) + (f"; and {len(different) - 2} more" if len(different) > 2 else "")
    return UNKNOWN if UNKNOWN in said else SAME


def argument_differences(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the arguments in which the arms differ: of all that a run says it was asked for, else given.

    What the runner fills in, and the files of other arms, are left out but for the arm that an arm starts from.
    """
    plan, study = results.plan, results.plan.study
    setting = next(iter(study.settings))
    filled = {flag.lstrip("-") for flag in (study.flags.save, study.flags.seed, study.flags.dataset)}
    arguments: dict[str, dict[str, Any]] = {}
    for name, arm in study.arms.items():
        cell = next(iter(cells_of(plan, setting, name).values()))
        given = {} if cell.training is None else read_arguments(cell)
        files = set(arm.start.arguments) if arm.start else set()
        arguments[name] = {
            "script": arm.script or "none",
            "starts from": arm.start.arm if arm.start else "nothing",
            **{key: value for key, value in given.items() if key not in filled | files},
            **{f"test: {key}": value for key, value in arm.test_arguments.items()},
            "tested": arm.checkpoint,
        }
    names = list(dict.fromkeys(key for found in arguments.values() for key in found))
    # A file of another arm may be unset in those that start from nothing.
    files = {name for arm in study.arms.values() if arm.start for name in arm.start.arguments}
    names = [name for name in names if name not in files]
    rows = []
    for name in names:
        values = [_typed(found.get(name)) for found in arguments.values()]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return ["Argument", *arguments], rows


def _typed(value: Any) -> str:
    """A value as it is typed; a dash for none."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def read_literature(results: Results) -> list[dict[str, str]]:
    """The rows of the study's literature file for its pairs; `UserError` where the file cannot be read."""
    study = results.plan.study
    if not study.literature:
        return []
    path = ROOT / Path(study.literature)
    try:
        with path.open(encoding="utf-8", newline="") as content:
            rows = list(csv.DictReader(content))
    except OSError as error:
        raise UserError(f"literature = {study.literature!r}: cannot be read ({error})") from error
    pairs = {(pair.train, test) for pair in study.pairs for test in pair.test}
    return [row for row in rows if (row.get("train"), row.get("test")) in pairs]


def dataset_means(arm: ArmResult) -> dict[tuple[str, str], np.ndarray]:
    """An arm's mean over classes and seeds of each (training, test dataset), by metric; NaN where there is none."""
    found = {}
    for train, test in dict.fromkeys((train, test) for train, test, _ in arm.table.columns):
        columns = [index for index, column in enumerate(arm.table.columns) if column[:2] == (train, test)]
        values = np.stack(
            [
                Groups((tuple(range(len(columns))),), (1.0,)).mean(arm.table.values[:, columns, index])
                for index in range(len(arm.table.metrics))
            ],
            axis=-1,
        )
        known = ~np.isnan(values).all(axis=1)
        found[train, test] = values[known].mean(0) if known.any() else np.full(values.shape[1], np.nan)
    return found
