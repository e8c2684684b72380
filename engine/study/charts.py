"""Forest plots of a study: the differences between its arms with their intervals."""

import math
from collections.abc import Mapping
from functools import partial

from matplotlib.figure import Figure

from engine.study.results import Results, SettingResult, metric_title
from engine.study.statistics import BETTER, WORSE, Verdict
from utils.figures import literal
from utils.svg_charts import Chart, make_chart

# Characters of an arm's name.
MAX_NAME = 44
COLOURS = {BETTER: "tab:green", WORSE: "tab:red"}


def forest_charts(results: Results, setting: SettingResult) -> list[Chart]:
    """A forest plot for each metric: the difference of every arm from the arm to compare with, and its interval."""
    study = results.plan.study
    charts = []
    for metric in results.metrics:
        verdicts = {arm.name: arm.verdicts[metric] for arm in setting.arms if metric in arm.verdicts}
        verdicts = {name: verdict for name, verdict in verdicts.items() if not math.isnan(verdict.gain)}
        if verdicts:
            title = metric_title(metric)
            alternative = f"{title}: difference of each arm from {study.compare_with}, with its 95 % interval"
            label = f"percentage points compared with {_short(study.compare_with)}"
            draw = partial(_draw_forest, verdicts=verdicts, margin=study.margin, label=label)
            charts.append(make_chart(title, alternative, draw, 0.8 + 0.46 * len(verdicts)))
    return charts


def _draw_forest(figure: Figure, verdicts: Mapping[str, Verdict], margin: float, label: str) -> None:
    axis, rows = figure.subplots(), range(len(verdicts))
    axis.axvspan(-margin, margin, color="grey", alpha=0.15, linewidth=0)
    # Only next to the intervals, and no grid: lines would cross the labels between them.
    axis.vlines(
        [0] * len(verdicts), [row - 0.15 for row in rows], [row + 0.3 for row in rows], color="grey", linewidth=0.8
    )
    for row, (name, verdict) in enumerate(verdicts.items()):
        colour = COLOURS.get(verdict.outcome, "tab:blue")
        if not math.isnan(verdict.low):
            axis.plot([verdict.low, verdict.high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
        axis.plot(verdict.differences, [row + 0.16] * len(verdict.differences), "|", color=colour, markersize=5)
        axis.plot(verdict.gain, row, "o", color=colour, markersize=6)
        place = axis.get_yaxis_transform()
        axis.text(0.01, row - 0.2, literal(_short(name)), transform=place, fontsize=8, va="bottom")
    axis.set_yticks([])
    axis.set_ylim(len(verdicts) - 0.5, -0.75)
    axis.set_xlabel(literal(label), fontsize=8)
    axis.tick_params(labelsize=8)


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
