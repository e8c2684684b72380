"""Write the results of a study: CSV files, and a Markdown and an HTML report for each arm to compare with."""

import logging
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.evaluation.pages import render_page
from engine.study.charts import forest_charts
from engine.study.fairness import Fairness, argument_differences, check_fairness
from engine.study.plan import Plan, path_from_root, slug
from engine.study.results import Results, SettingResult, dataset_means, metric_title, read_literature, read_results
from engine.study.statistics import LEVEL, Verdict, nanmean
from engine.study.study import Study
from utils.files import write_text
from utils.text import csv_table, markdown_table

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("study.html")
UNDEFINED = "n/a"
VERDICT_NUMBERS = ("gain", "low", "high", "p", "p_holm", "probability_of_gain", "detectable_gain")
VERDICT_COLUMNS = ("Seeds", "Gain", "95 % interval", "p", "p, Holm", "P(gain)", "Detectable gain", "Verdict")
# Header and rows.
TextTable = tuple[list[str], list[list[str]]]


def write_study_report(plan: Plan, command: Sequence[str]) -> Results:
    """Write the files of a study from its finished evaluations.

    Args:
        plan: The study.
        command: The command that runs it again.

    Returns:
        The results, compared with the study's `compare_with`.
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
    logger.info("Report: %s", ", ".join(path_from_root(plan.folder / name) for name in files))
    return reports[0]


def report_name(study: Study, compared_with: str) -> str:
    """The file name, without ending, of the report that compares all arms with this one."""
    return "study" if compared_with == study.compare_with else f"study_against_{slug(compared_with)}"


def csv_text(results: Results) -> str:
    """All metrics in percent, a row for each setting, arm, seed, pair of datasets and class."""
    rows: list[Sequence[object]] = [["setting", "arm", "seed", "train", "test", "class", *results.metrics]]
    for setting in results.settings:
        for arm in setting.arms:
            for seed, seed_values in zip(arm.table.seeds, arm.table.values, strict=True):
                for column, values in zip(arm.table.columns, seed_values, strict=True):
                    if not np.isnan(values).all():
                        cells = [UNDEFINED if math.isnan(value) else f"{value:.6f}" for value in values]
                        rows.append([setting.name, arm.name, seed, *column, *cells])
    return csv_table(rows)


def verdicts_csv(reports: Sequence[Results]) -> str:
    """Every verdict, a row for each comparison, setting, arm and metric; undefined values are empty."""
    header = ["compared_with", "setting", "arm", "metric", "seeds", *VERDICT_NUMBERS, "verdict", "reason"]
    rows: list[Sequence[object]] = [header]
    for results in reports:
        for setting in results.settings:
            for arm in setting.arms:
                for metric, verdict in arm.verdicts.items():
                    numbers = [getattr(verdict, name) for name in VERDICT_NUMBERS]
                    cells = ["" if math.isnan(value) else f"{value:.6g}" for value in numbers]
                    start = [results.plan.study.compare_with, setting.name, arm.name, metric, len(verdict.seeds)]
                    rows.append([*start, *cells, verdict.outcome, verdict.reason])
    return csv_table(rows)


def number(value: float, signed: bool = False) -> str:
    """A number with two decimals, or n/a."""
    # Adding 0 removes the sign of a negative value that is rounded to zero.
    return UNDEFINED if math.isnan(value) else f"{round(value, 2) + 0:{'+' if signed else ''}.2f}"


def means_table(results: Results, setting: SettingResult) -> TextTable:
    """The means over seeds of all arms, with their standard deviations."""
    rows = []
    for arm in setting.arms:
        means = [arm.mean(metric) for metric in results.metrics]
        cells = [number(mean) + ("" if math.isnan(spread) else f" ± {spread:.2f}") for mean, spread, _ in means]
        rows.append([arm.name, str(max((count for *_, count in means), default=0)), *cells])
    return ["Arm", "Seeds", *map(metric_title, results.metrics)], rows


def gain_cell(gain: float, low: float, high: float) -> str:
    """A gain and its interval in one cell."""
    return number(gain, True) + ("" if math.isnan(low) else f" ({interval(low, high)})")


def interval(low: float, high: float) -> str:
    return UNDEFINED if math.isnan(low) else f"{number(low, True)} to {number(high, True)}"


def differences_table(results: Results, setting: SettingResult) -> TextTable:
    """All numbers of every verdict."""
    rows = [
        [arm.name, metric_title(metric), *verdict_cells(verdict)]
        for metric in results.metrics
        for arm in setting.arms
        if (verdict := arm.verdicts.get(metric))
    ]
    return ["Arm", "Metric", *VERDICT_COLUMNS], rows


def verdict_cells(verdict: Verdict) -> list[str]:
    p, corrected = (UNDEFINED if math.isnan(value) else f"{value:.2g}" for value in (verdict.p, verdict.p_holm))
    probability = verdict.probability_of_gain
    return [
        str(len(verdict.seeds)),
        number(verdict.gain, True),
        interval(verdict.low, verdict.high),
        p,
        corrected,
        UNDEFINED if math.isnan(probability) else f"{100 * probability:.0f} %",
        "none" if math.isnan(verdict.detectable_gain) else number(verdict.detectable_gain),
        verdict.outcome + (f": {verdict.reason}" if verdict.reason else ""),
    ]


def class_table(results: Results, setting: SettingResult, metric: str) -> dict[str, Any]:
    """The mean over seeds of a metric in every class, coloured by the difference from the arm to compare with."""
    index = results.metrics.index(metric)
    columns = setting.arms[0].table.columns
    means = {arm.name: nanmean(arm.table.values[..., index].T) for arm in setting.arms}
    base = means.get(results.plan.study.compare_with, np.full(len(columns), np.nan))
    differences = {name: values - base for name, values in means.items()}
    largest = float(np.nanmax(np.abs([*differences.values()]), initial=0))
    several = len({column[:2] for column in columns}) > 1
    rows = []
    for place, (train, test, class_name) in enumerate(columns):
        name = f"{train} → {test}: {class_name}" if several else class_name
        rows.append((name, [(number(means[arm][place]), heat(differences[arm][place], largest)) for arm in means]))
    return {"title": metric_title(metric), "arms": list(means), "largest": number(largest), "rows": rows}


def heat(difference: float, largest: float) -> str:
    """The background colour of a difference: green for a gain, red for a loss, as strong as it is large."""
    if math.isnan(difference) or largest <= 0:
        return "transparent"
    colour = "46, 160, 67" if difference > 0 else "218, 54, 51"
    return f"rgba({colour}, {0.6 * abs(difference) / largest:.2f})"


def literature_table(results: Results) -> TextTable:
    """Published results for the study's pairs next to the means of the study, pair by pair; may be empty."""
    rows = []
    published = read_literature(results)
    own = [
        (", ".join(filter(None, [arm.name, setting.name])), dataset_means(arm))
        for setting in results.settings
        for arm in setting.arms
    ]
    for pair in dict.fromkeys((row["train"], row["test"]) for row in published):
        for row in published:
            if (row["train"], row["test"]) == pair:
                cells = [row.get(metric) or "–" for metric in results.metrics]
                rows.append([row["method"], *pair, *cells, row.get("source", "")])
        for name, means in own:
            if pair in means:
                rows.append([name, *pair, *(number(value) for value in means[pair]), "this study"])
    return ["Method", "Trained on", "Tested on", *map(metric_title, results.metrics), "Source"], rows


def study_facts(results: Results) -> list[tuple[str, str]]:
    """What the study compares."""
    study = results.plan.study
    pairs = "; ".join(f"{pair.train} → {', '.join(pair.test)}" for pair in study.pairs)
    other = [f"{name} ({report_name(study, name)}.html)" for name in study.also_compare_with]
    done = sum(cell.done for cell in results.plan.cells)
    facts = [
        ("Trained on → tested on", pairs),
        ("Seeds", ", ".join(map(str, study.seeds))),
        ("Compared with", study.compare_with),
        ("Other reports", "; ".join(other)),
        ("Verdict on", ", ".join(map(metric_title, results.verdict_metrics))),
        ("Margin", f"differences up to {study.margin:g} percentage points do not matter"),
        ("Complete", f"{done} of {len(results.plan.cells)} cells"),
    ]
    return [fact for fact in facts if fact[1]]


def explanation(results: Results) -> str:
    """The columns of the differences."""
    study = results.plan.study
    family = "all arms" + (" and the metrics of the verdict" if len(results.verdict_metrics) > 1 else "")
    return (
        f"Gain: mean over seeds of the difference from {study.compare_with}, in percentage points. Interval: "
        "hierarchical bootstrap over seeds and classes. p: sign-flip permutation test over seeds. p, Holm: corrected "
        f"over {family}; at most {LEVEL:g} for better or worse. P(gain): probability that one more seed shows a gain. "
        "Detectable gain: the gain that this many seeds detect in 80 % of studies; none: they detect no gain."
    )


def markdown(results: Results, fairness: Fairness, command: Sequence[str]) -> str:
    """The study as Markdown: verdicts, means and differences. The HTML report and the CSV files have the classes."""
    study = results.plan.study
    parts = [f"# {study.title or study.name}", _bullets(f"{name}: {value}" for name, value in study_facts(results))]
    if results.missing:
        parts += ["## Missing", _bullets(results.missing)]
    for setting in results.settings:
        if not setting.arms:
            continue
        suffix = f": {setting.name}" if setting.name else ""
        verdicts = (f"**{arm.name}**: {arm.summary}" for arm in setting.arms if arm.summary)
        parts += [f"## Verdicts{suffix}", _bullets(verdicts)]
        parts += [f"## Means{suffix}", "In percent, over classes, then datasets; mean ± standard deviation over seeds."]
        parts += [_table(means_table(results, setting)), f"## Differences{suffix}"]
        parts += [explanation(results), _table(differences_table(results, setting))]
    if fairness.unfair:
        parts += ["## Unfair comparisons", _bullets(fairness.unfair)]
    parts += ["## Command", "```\n" + shlex.join(command) + "\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(table: TextTable) -> str:
    header, rows = table
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return markdown_table(escaped[0], escaped[1:]) if rows else ""


def page(results: Results, fairness: Fairness, command: Sequence[str]) -> str:
    """The study as one HTML file without scripts and external files."""
    study = results.plan.study
    sections = [
        {
            "name": setting.name,
            "verdicts": [(arm.name, arm.summary) for arm in setting.arms if arm.summary],
            "table": means_table(results, setting),
            "differences": differences_table(results, setting),
            "forests": forest_charts(results, setting),
            "classes": [class_table(results, setting, metric) for metric in results.metrics],
        }
        for setting in results.settings
        if setting.arms
    ]
    return render_page(
        TEMPLATE,
        title=study.title or study.name,
        study_facts=study_facts(results),
        results=results,
        study=study,
        sections=sections,
        explanation=explanation(results),
        fairness=fairness,
        arguments=argument_differences(results),
        notes=[(name, arm.note) for name, arm in study.arms.items() if arm.note],
        literature=literature_table(results),
        command=shlex.join(command),
        all_commands=[step.typed for cell in results.plan.cells for step in cell.steps],
    )
