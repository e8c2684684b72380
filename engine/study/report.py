"""A study's files: `study.csv`, and `study.md` and `study.html` for each arm to compare with; of whatever is there."""

from __future__ import annotations

import csv
import io
import logging
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from engine.evaluation.pages import render_page
from engine.study.charts import forest_charts, heat, loss_chart
from engine.study.plan import Plan, shown, slug
from engine.study.results import (
    ArmResult,
    Fairness,
    Results,
    SettingResult,
    argument_differences,
    check_fairness,
    dataset_means,
    metric_title,
    read_literature,
    read_results,
)
from engine.study.statistics import LEVEL, Verdict
from engine.study.study import Study
from utils.files import write_text
from utils.svg_charts import Chart
from utils.tables import markdown_table

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("study.html")
UNDEFINED = "n/a"
VERDICT_NUMBERS = ("gain", "low", "high", "p", "p_holm", "probability_of_gain", "detectable_gain")
VERDICT_COLUMNS = ("Seeds", "Gain", "95 % interval", "p", "p, Holm", "New seed gains", "Shown from", "Verdict")
ELSEWHERE = "Reported elsewhere, under protocols of their own; not run here"


@dataclass(frozen=True)
class HeatTable:
    """A metric of every class: the arms, and a row for each class of a text and a ground for each arm."""

    title: str
    arms: list[str]
    largest: str
    rows: list[tuple[str, list[tuple[str, str]]]]


@dataclass(frozen=True)
class Section:
    """What the page shows of one setting."""

    name: str
    verdicts: list[tuple[str, str]]
    table: tuple[list[str], list[list[str]]]
    differences: tuple[list[str], list[list[str]]]
    forests: list[Chart]
    heat: list[HeatTable]
    losses: Chart | None


def write_study_report(plan: Plan, command: Sequence[str]) -> Results:
    """Write the files of what a study has found so far, for each arm to compare with; the results beside the first.

    command: the words that run it again.
    """
    study = plan.study
    reports = [
        read_results(replace(plan, study=replace(study, compare_with=name)))
        for name in dict.fromkeys((study.compare_with, *study.also_compare_with))
    ]
    files = {"study.csv": csv_text(reports[0]), "study_verdicts.csv": verdicts_csv(reports)}
    for results in reports:
        fairness = check_fairness(results)
        stem = report_name(study, results.plan.study.compare_with)
        files[f"{stem}.md"] = markdown(results, fairness, command)
        files[f"{stem}.html"] = page(results, fairness, command)
    for name, text in files.items():
        write_text(plan.folder / name, text)
    logger.info("Report: %s", ", ".join(shown(plan.folder / name) for name in files))
    return reports[0]


def report_name(study: Study, compared_with: str) -> str:
    """The stem of the report in which all arms are compared with this one."""
    return "study" if compared_with == study.compare_with else f"study_against_{slug(compared_with)}"


def csv_text(results: Results) -> str:
    """Every setting, arm, seed, dataset and class with its metrics in percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["setting", "arm", "seed", "train", "test", "class", *results.metrics])
    for setting in results.settings:
        for arm in setting.arms:
            for seed, figures in zip(arm.table.seeds, arm.table.values, strict=True):
                for column, values in zip(arm.table.columns, figures, strict=True):
                    if not np.isnan(values).all():
                        cells = [UNDEFINED if math.isnan(value) else f"{value:.6f}" for value in values]
                        writer.writerow([setting.name, arm.name, seed, *column, *cells])
    return text.getvalue()


def verdicts_csv(reports: Sequence[Results]) -> str:
    """Every verdict, a row for each comparison, setting, arm and metric; undefined values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["compared_with", "setting", "arm", "metric", "seeds", *VERDICT_NUMBERS, "verdict", "reason"])
    for results in reports:
        for setting in results.settings:
            for arm in setting.arms:
                for metric, verdict in arm.verdicts.items():
                    numbers = [getattr(verdict, name) for name in VERDICT_NUMBERS]
                    cells = ["" if math.isnan(value) else f"{value:.6g}" for value in numbers]
                    start = [results.plan.study.compare_with, setting.name, arm.name, metric, len(verdict.seeds)]
                    writer.writerow([*start, *cells, verdict.word, verdict.reason])
    return text.getvalue()


def figure(value: float, signed: bool = False) -> str:
    """A figure in percent or points with two decimals; without one, as tables say it."""
    # Adding 0 takes the sign from a zero that was negative before it was rounded.
    return UNDEFINED if math.isnan(value) else f"{round(value, 2) + 0:{'+' if signed else ''}.2f}"


def means_table(results: Results, setting: SettingResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the arms' means over seeds, with their standard deviation."""
    rows = []
    for arm in setting.arms:
        found = [arm.mean(metric) for metric in results.metrics]
        cells = [figure(mean) + ("" if math.isnan(spread) else f" ± {spread:.2f}") for mean, spread, _ in found]
        rows.append([arm.name, str(max((count for *_, count in found), default=0)), *cells])
    return ["Arm", "Seeds", *map(metric_title, results.metrics)], rows


def gains_table(results: Results, setting: SettingResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the arms' gains over the one compared with, each with its interval."""
    rows = [
        [arm.name, *(gain_cell(v.gain, v.low, v.high) for v in arm.verdicts.values())]
        for arm in setting.arms
        if arm.verdicts
    ]
    return ["Arm", *map(metric_title, results.metrics)], rows


def gain_cell(gain: float, low: float, high: float) -> str:
    """A gain and its interval in one cell."""
    interval = "" if math.isnan(low) else f" ({figure(low, True)} to {figure(high, True)})"
    return figure(gain, True) + interval


def differences_table(results: Results, setting: SettingResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of every verdict: the gain, its interval, the test, and what follows."""
    rows = [
        [arm.name, metric_title(metric), *verdict_cells(verdict)]
        for metric in results.metrics
        for arm in setting.arms
        if (verdict := arm.verdicts.get(metric))
    ]
    return ["Arm", "Metric", *VERDICT_COLUMNS], rows


def verdict_cells(verdict: Verdict) -> list[str]:
    """A verdict in the cells of a row; where a gain of any size could not be shown, its cell says so."""
    interval = UNDEFINED if math.isnan(verdict.low) else f"{figure(verdict.low, True)} to {figure(verdict.high, True)}"
    p, corrected = (UNDEFINED if math.isnan(value) else f"{value:.2g}" for value in (verdict.p, verdict.p_holm))
    chance = UNDEFINED if math.isnan(verdict.probability_of_gain) else f"{100 * verdict.probability_of_gain:.0f} %"
    smallest = "none" if math.isnan(verdict.detectable_gain) else figure(verdict.detectable_gain)
    return [
        str(len(verdict.seeds)),
        figure(verdict.gain, True),
        interval,
        p,
        corrected,
        chance,
        smallest,
        verdict.word + (f": {verdict.reason}" if verdict.reason else ""),
    ]


def heat_table(results: Results, setting: SettingResult, metric: str) -> HeatTable:
    """A metric of every class, the mean over seeds, on grounds that show the difference from the arm compared with."""
    index = results.metrics.index(metric)
    columns = setting.arms[0].table.columns
    base = next((arm for arm in setting.arms if arm.name == results.plan.study.compare_with), None)
    means = {arm.name: _mean_over_seeds(arm.table.values[..., index]) for arm in setting.arms}
    against = means[base.name] if base else np.full(len(columns), np.nan)
    differences = {name: found - against for name, found in means.items()}
    known = [abs(value) for found in differences.values() for value in found if not math.isnan(value)]
    largest = max(known, default=0.0)
    several = len({column[:2] for column in columns}) > 1
    rows = []
    for place, (train, test, class_name) in enumerate(columns):
        name = f"{train} → {test}: {class_name}" if several else class_name
        cells = [(figure(means[a][place]), heat(differences[a][place], largest)) for a in means]
        rows.append((name, cells))
    return HeatTable(metric_title(metric), list(means), figure(largest), rows)


def _mean_over_seeds(values: np.ndarray) -> np.ndarray:
    known = (~np.isnan(values)).sum(0)
    return np.divide(np.nansum(values, 0), known, out=np.full(values.shape[1], np.nan), where=known > 0)


def literature_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what others report for the study's pairs beside our means, pair by pair; may be empty."""
    rows = []
    reported = read_literature(results)
    ours = [
        (", ".join(filter(None, [arm.name, setting.name])), dataset_means(arm))
        for setting in results.settings
        for arm in setting.arms
    ]
    for pair in dict.fromkeys((row["train"], row["test"]) for row in reported):
        for row in reported:
            if (row["train"], row["test"]) == pair:
                cells = [row.get(metric) or "–" for metric in results.metrics]
                rows.append([f"{row.get('method', '')} (reported elsewhere)", *pair, *cells, row.get("source", "")])
        for name, means in ours:
            if pair in means:
                rows.append([name, *pair, *(figure(value) for value in means[pair]), "this study"])
    return ["Method", "Trained on", "Tested on", *map(metric_title, results.metrics), "Source"], rows


def facts_of_study(results: Results) -> list[tuple[str, str]]:
    """What was studied, in words."""
    study = results.plan.study
    pairs = "; ".join(f"{pair.train} → {', '.join(pair.test)}" for pair in study.pairs)
    also = [f"{name} ({report_name(study, name)}.html)" for name in study.also_compare_with]
    done = sum(cell.done for cell in results.plan.cells)
    facts = [
        ("Trained on → tested on", pairs),
        ("Seeds", ", ".join(map(str, study.seeds))),
        ("Compared with", study.compare_with),
        ("In reports of their own", "; ".join(also)),
        ("Verdict on", ", ".join(map(metric_title, results.verdict_metrics))),
        ("Differences that do not matter", f"up to {study.margin:g} points"),
        ("Complete", f"{done} of {len(results.plan.cells)} cells"),
    ]
    return [fact for fact in facts if fact[1]]


def how_to_read(results: Results) -> str:
    """What the columns of the differences mean, in a paragraph."""
    study = results.plan.study
    family = "all arms" + (" and the metrics of the verdict" if len(results.verdict_metrics) > 1 else "")
    return (
        f"Gain: mean over seeds of the difference from {study.compare_with}, in points. Interval: hierarchical "
        "bootstrap over seeds and classes. p: sign-flip permutation test over seeds; Holm: corrected over "
        f"{family}, and at most {LEVEL:g} for better or worse. New seed gains: probability that one more seed shows a "
        "gain. Shown from: the smallest gain that so many seeds show in 80 % of studies; none: no gain, however large."
    )


def again(results: Results, command: Sequence[str]) -> list[str]:
    """The commands that make all of this again: the study's, then those of its cells."""
    lines = [shlex.join(command), ""]
    for cell in results.plan.cells:
        lines += [shlex.join(["python", *step.words]) for step in cell.steps]
    return lines


def markdown(results: Results, fairness: Fairness, command: Sequence[str]) -> str:
    """The study as a page of text."""
    study = results.plan.study
    parts = [f"# {study.title or study.name}", _bullets(f"{name}: {value}" for name, value in facts_of_study(results))]
    if results.missing:
        parts += ["## Not there yet", _bullets(results.missing)]
    for setting in results.settings:
        if not setting.arms:
            continue
        of = f": {setting.name}" if setting.name else ""
        parts += [f"## Verdicts{of}", _bullets(f"**{arm.name}**: {arm.summary}" for arm in _judged(setting))]
        parts += [f"## Means{of}", "In percent, over classes, then datasets; mean ± standard deviation over seeds."]
        parts += [_table(means_table(results, setting)), f"## Gains{of}"]
        parts += [f"Beside {study.compare_with}, in points: mean over seeds (95 % interval)."]
        parts += [_table(gains_table(results, setting)), f"## Differences{of}", how_to_read(results)]
        parts += [_table(differences_table(results, setting))]
    if fairness.rows:
        cells = [[name, *found] for name, found in fairness.rows]
        parts += ["## Fairness", f"Beside {study.compare_with}:", _table((["Arm", *fairness.facts], cells))]
    parts += ["## What the arms' arguments differ in", _table(argument_differences(results))]
    header, rows = literature_table(results)
    if rows:
        parts += ["## In the literature", f"{ELSEWHERE}.", _table((header, rows))]
    parts += ["## Again", "```\n" + shlex.join(command) + "\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _judged(setting: SettingResult) -> list[ArmResult]:
    return [arm for arm in setting.arms if arm.summary]


def _bullets(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(cells: tuple[list[str], list[list[str]]]) -> str:
    header, rows = cells
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return markdown_table(escaped[0], escaped[1:]) if rows else ""


def page(results: Results, fairness: Fairness, command: Sequence[str]) -> str:
    """The study as a page in one file, which loads nothing and runs no script."""
    study = results.plan.study
    sections = [
        Section(
            setting.name,
            [(arm.name, arm.summary) for arm in _judged(setting)],
            means_table(results, setting),
            differences_table(results, setting),
            forest_charts(results, setting),
            [heat_table(results, setting, metric) for metric in results.metrics],
            loss_chart(results, setting),
        )
        for setting in results.settings
        if setting.arms
    ]
    return render_page(
        TEMPLATE,
        title=study.title or study.name,
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        facts_of_study=facts_of_study(results),
        missing=results.missing,
        sections=sections,
        how_to_read=how_to_read(results),
        compare_with=study.compare_with,
        margin=f"{study.margin:g}",
        fairness=fairness,
        arguments=argument_differences(results),
        notes=[(name, arm.note) for name, arm in study.arms.items() if arm.note],
        literature=literature_table(results),
        elsewhere=ELSEWHERE,
        commands=again(results, command),
    )
