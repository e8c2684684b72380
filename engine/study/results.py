"""The results of a study: metrics and verdicts of its arms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.study.evaluations import (
    AVERAGE,
    CLASS,
    NO_METRICS,
    Evaluations,
    MetricTable,
    arm_table,
    as_number,
    metrics_of,
    read_evaluations,
)
from engine.study.plan import ROOT, Plan
from engine.study.statistics import BETTER, NOT_DECIDED, WORSE, Comparison, Groups, Verdict, judge, nanmean
from utils.reading import read_table
from utils.text import list_names

CAPITALS = {"auroc": "AUROC", "aupro": "AUPRO", "aupimo": "AUPIMO", "iou": "IoU", "ap": "AP", "f1": "F1", "max": "max"}


@dataclass(frozen=True)
class ArmResult:
    """An arm in a setting.

    Attributes:
        means: (seeds, metrics): the mean over classes, test datasets and pairs.
        verdicts: By metric; empty for the arm to compare with, and for arms that are only listed.
        summary: The verdicts in one sentence.
    """

    name: str
    table: MetricTable
    means: np.ndarray
    verdicts: dict[str, Verdict]
    summary: str

    def mean(self, metric: str) -> tuple[float, float, int]:
        """Mean and standard deviation over the complete seeds, and their number."""
        values = self.means[:, self.table.metrics.index(metric)]
        values = values[~np.isnan(values)]
        spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        return (float(values.mean()) if len(values) else math.nan), spread, len(values)


@dataclass(frozen=True)
class SettingResult:
    """The arms in one setting that have results."""

    name: str
    arms: list[ArmResult]


@dataclass(frozen=True)
class Results:
    """The results of a study; `missing` lists the missing evaluations in sentences."""

    plan: Plan
    metrics: tuple[str, ...]
    verdict_metrics: tuple[str, ...]
    settings: list[SettingResult]
    missing: list[str]


def read_results(plan: Plan) -> Results:
    """Read the finished evaluations of a study, and judge its arms."""
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
    others = [name for name in tables if name != study.compare_with and study.arms[name].compare]
    compared = others if study.compare_with in tables else []
    # The metrics of the verdict form one family over all arms; every other metric is a family of its own.
    families = [list(verdict_metrics), *([metric] for metric in metrics if metric not in verdict_metrics)]
    verdicts: dict[tuple[str, str], Verdict] = {}
    for family in families:
        keys = [(name, metric) for name in compared for metric in family]
        comparisons = [_compare(tables[name], tables[study.compare_with], metric) for name, metric in keys]
        judged = judge(comparisons, study.margin)
        verdicts |= dict(zip(keys, judged, strict=True))
    arms = []
    for name, table in tables.items():
        means = Groups.of(table.columns).mean(np.moveaxis(table.values, 1, -1))
        by_metric = {metric: verdicts[name, metric] for metric in metrics if (name, metric) in verdicts}
        arms.append(ArmResult(name, table, means, by_metric, _summary(by_metric, verdict_metrics)))
    return SettingResult(setting, arms)


def _compare(table: MetricTable, base: MetricTable, metric: str) -> Comparison:
    """The differences in a metric, of the seeds that are complete in both arms and the classes defined in both."""
    index = table.metrics.index(metric)
    differences = table.values[..., index] - base.values[..., index]
    groups = Groups.of(table.columns)
    complete = ~np.isnan(groups.mean(differences))
    seeds = tuple(seed for seed, is_complete in zip(table.seeds, complete, strict=True) if is_complete)
    return Comparison(metric, seeds, differences[complete], groups)


def _summary(verdicts: Mapping[str, Verdict], metrics: Sequence[str]) -> str:
    """One sentence on an arm: the verdict on the study's metric, or a summary of several verdicts."""
    relevant = [verdicts[metric] for metric in metrics if metric in verdicts]
    if not relevant:
        return ""
    if len(relevant) == 1:
        return f"{metric_title(relevant[0].metric)}: {relevant[0].sentence}"
    by_outcome: dict[str, list[str]] = {}
    for verdict in relevant:
        by_outcome.setdefault(verdict.outcome, []).append(metric_title(verdict.metric))
    text = "; ".join(f"{outcome} in {', '.join(titles)}" for outcome, titles in by_outcome.items())
    decided = [outcome for outcome in (BETTER, WORSE) if outcome in by_outcome]
    return text if len(by_outcome) == 1 else f"{' and '.join(decided) or NOT_DECIDED}: {text}"


def metric_title(metric: str) -> str:
    """A metric's name in words, with the usual capitals."""
    words = metric.replace("published_image", "published").split("_")
    title = " ".join(CAPITALS.get(word, word) for word in words).replace("F1 max", "F1-max")
    return title[:1].upper() + title[1:]


def missing_cells(plan: Plan, evaluations: Evaluations) -> list[str]:
    """The missing evaluations, a sentence for each arm."""
    missing: dict[tuple[str, str], list[str]] = {}
    for (setting, arm, seed, number), cell in plan.by_key.items():
        for test in plan.study.pairs[number].test:
            if (setting, arm, seed, number, test) not in evaluations:
                name = f"seed {seed}: {test}" if cell.seed is not None else test
                missing.setdefault((setting, arm), []).append(name)
    return [
        f"{', '.join(filter(None, [arm, setting]))}: no results for {list_names(list(dict.fromkeys(names)), 4)}"
        for (setting, arm), names in missing.items()
    ]


def read_literature(results: Results) -> list[dict[str, str]]:
    """Results of other methods for the study's pairs, reported elsewhere or rescored here.

    Reported image metrics are those of published scores. Raises `UserError` if a file cannot be read.
    """
    study = results.plan.study
    pairs = [(pair.train, test) for pair in study.pairs for test in pair.test]
    reported = read_table(ROOT / study.literature, "literature") if study.literature else ()
    rows = [
        {f"published_{name}" if name.startswith("image") else name: value for name, value in row.items()}
        | {"method": f"{row.get('method', '')} (reported elsewhere)"}
        for _, row in reported
        if (row.get("train"), row.get("test")) in pairs
    ]
    for source in study.rescored:
        for _, row in read_table(ROOT / source.file, "rescored", ("model", "dataset", CLASS)):
            numbers = {name: as_number(value) for name, value in row.items() if name not in NO_METRICS}
            values = {name: f"{value:.2f}" for name, value in numbers.items() if not math.isnan(value)}
            values |= {"method": f"{row['model']} (rescored here)", "source": source.file}
            for train, test in pairs:
                if row[CLASS] == AVERAGE and row["dataset"] == test and source.train in ("", train):
                    rows.append({**values, "train": train, "test": test})
    return rows


def dataset_means(arm: ArmResult) -> dict[tuple[str, str], np.ndarray]:
    """The means over classes and seeds (metrics,) of an arm by (training, test dataset); NaN if undefined."""
    means = {}
    for pair in dict.fromkeys(column[:2] for column in arm.table.columns):
        classes = [index for index, column in enumerate(arm.table.columns) if column[:2] == pair]
        # (seeds, classes, metrics) to (metrics, seeds, classes)
        means[pair] = nanmean(nanmean(np.moveaxis(arm.table.values[:, classes], -1, 0)))
    return means
