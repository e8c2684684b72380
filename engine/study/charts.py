"""Charts of a study: differences with their intervals, and the losses of all arms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from engine.study.evaluations import read_history
from engine.study.plan import Cell
from engine.study.results import Results, SettingResult, cells_of, metric_title
from engine.study.statistics import BETTER, WORSE, Verdict
from utils.figures import literal
from utils.svg_charts import Chart, make_chart

# Characters of an arm's name, and of a line of the legend.
MAX_NAME, LEGEND_LINE = 44, 50
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
    axis = figure.subplots()
    axis.axvspan(-margin, margin, color="grey", alpha=0.15, linewidth=0)
    axis.axvline(0, color="grey", linewidth=0.8)
    for row, (name, verdict) in enumerate(verdicts.items()):
        colour = COLOURS.get(verdict.outcome, "tab:blue")
        if not math.isnan(verdict.low):
            axis.plot([verdict.low, verdict.high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
        axis.plot(verdict.differences, [row + 0.16] * len(verdict.differences), "|", color=colour, markersize=5)
        axis.plot(verdict.gain, row, "o", color=colour, markersize=6)
        place: dict[str, Any] = {"xy": (0, row - 0.2), "xycoords": ("axes fraction", "data")}
        offset: dict[str, Any] = {"xytext": (2, 0), "textcoords": "offset points"}
        axis.annotate(_label(name), **place, **offset, fontsize=8, va="bottom")
    axis.set_yticks([])
    axis.set_ylim(len(verdicts) - 0.5, -0.75)
    axis.set_xlabel(literal(label), fontsize=8)
    axis.grid(axis="x", alpha=0.25)
    axis.tick_params(labelsize=8)


# By stage and arm: the number of the first epoch, and the losses (runs, epochs).
Panels = dict[str, dict[str, tuple[int, np.ndarray]]]


def loss_chart(results: Results, setting: SettingResult) -> Chart | None:
    """The losses of all arms in one chart, a panel for each stage; None if no run has a history.

    A line is the mean over the runs of an arm, the band their range. The epochs of an arm that starts from another arm
    follow those of that arm.
    """
    panels = loss_panels(results, setting)
    if not panels:
        return None
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    columns = max(1, min(3, LEGEND_LINE // max(len(_short(name)) for name in names)))
    height = 0.7 + 1.8 * len(panels) + 0.17 * math.ceil(len(names) / columns)
    draw = partial(_draw_losses, panels=panels, names=names, columns=columns)
    return make_chart("Losses", "The loss of every arm in each epoch, a panel for each stage", draw, height)


def _draw_losses(figure: Figure, panels: Panels, names: Sequence[str], columns: int) -> None:
    colours = [colour for name in ("tab10", "Dark2") for colour in matplotlib.color_sequences[name]]
    styles = {
        name: {"color": colours[i % len(colours)], "linestyle": ("-", "--", ":")[i // len(colours) % 3]}
        for i, name in enumerate(names)
    }
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    handles: dict[str, Any] = {}
    for axis, (stage, lines) in zip(axes, panels.items(), strict=True):
        for name, (first, losses) in lines.items():
            epochs, style = np.arange(first, first + losses.shape[1]), styles[name]
            (line,) = axis.plot(epochs, losses.mean(0), **style, linewidth=1.3, marker=".", markersize=5)
            axis.fill_between(epochs, losses.min(0), losses.max(0), color=style["color"], alpha=0.12, linewidth=0)
            handles.setdefault(_label(name), line)
        axis.set_title(literal(f"{stage} stage" if stage else "loss"), fontsize=9)
        axis.set_ylabel("loss", fontsize=8)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlabel("epoch of the stage, including those of the run it started from", fontsize=8)
    spacing: dict[str, Any] = {"handlelength": 1.4, "columnspacing": 1.1, "handletextpad": 0.5}
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "fontsize": 8, "frameon": False}
    figure.legend(handles.values(), handles, **place, **spacing)


def loss_panels(results: Results, setting: SettingResult) -> Panels:
    """The losses of all complete runs of the arms."""
    panels: Panels = {}
    for name, arm in results.plan.study.arms.items():
        if not arm.script:
            continue
        runs_by_stage: dict[str, list[tuple[int, list[float]]]] = {}
        for cell in cells_of(results.plan, setting.name, name).values():
            for stage, losses in losses_of(cell).items():
                before = sum(len(losses_of(link).get(stage, [])) for link in cell.chain[:-1])
                runs_by_stage.setdefault(stage, []).append((before + 1, losses))
        for stage, runs in runs_by_stage.items():
            # Unfinished runs have fewer epochs and would change the mean.
            longest = max(len(losses) for _, losses in runs)
            complete = [losses for _, losses in runs if len(losses) == longest]
            panels.setdefault(stage, {})[name] = (runs[0][0], np.array(complete))
    return panels


def losses_of(cell: Cell) -> dict[str, list[float]]:
    """The losses of a cell's training in the order of its epochs, by stage."""
    losses: dict[str, list[float]] = {}
    for row in read_history(cell):
        if isinstance(row.get("loss"), (int, float)):
            losses.setdefault(str(row.get("stage", "")), []).append(float(row["loss"]))
    return losses


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _label(name: str) -> str:
    return literal(_short(name))


def heat(value: float, largest: float) -> str:
    """The background colour of a difference: green for a gain, red for a loss, as strong as it is large."""
    if math.isnan(value) or largest <= 0:
        return "transparent"
    share = min(abs(value) / largest, 1.0)
    return f"rgba({'46, 160, 67' if value > 0 else '218, 54, 51'}, {0.6 * share:.2f})"
