"""Charts of a study: differences with their intervals, and the losses of all arms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from engine.study.figures import read_history
from engine.study.plan import Cell
from engine.study.results import Results, SettingResult, cells_of, metric_title
from engine.study.statistics import BETTER, WORSE
from utils.figures import literal
from utils.svg_charts import Chart, make_chart

# Characters of an arm's name, and those of a legend's line in all its columns.
LONGEST, LINE = 44, 50
COLOURS = {BETTER: "tab:green", WORSE: "tab:red"}


def forest_charts(results: Results, setting: SettingResult) -> list[Chart]:
    """A forest plot for each metric: every arm's difference from the arm to compare with, and its interval."""
    against = results.plan.study.compare_with
    charts = []
    for metric in results.metrics:
        arms = [(arm.name, arm.verdicts[metric]) for arm in setting.arms if metric in arm.verdicts]
        arms = [(name, verdict) for name, verdict in arms if not math.isnan(verdict.gain)]
        if not arms:
            continue

        def draw(figure: Figure, arms: Sequence[tuple[str, Any]] = tuple(arms)) -> None:
            axis = figure.subplots()
            axis.axvspan(-results.plan.study.margin, results.plan.study.margin, color="grey", alpha=0.15, linewidth=0)
            axis.axvline(0, color="grey", linewidth=0.8)
            for row, (name, verdict) in enumerate(arms):
                colour = COLOURS.get(verdict.word, "tab:blue")
                if not math.isnan(verdict.low):
                    axis.plot([verdict.low, verdict.high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
                axis.plot(verdict.differences, [row + 0.16] * len(verdict.differences), "|", color=colour, markersize=5)
                axis.plot(verdict.gain, row, "o", color=colour, markersize=6)
                axis.annotate(
                    _label(name),
                    (0, row - 0.2),
                    xycoords=("axes fraction", "data"),
                    xytext=(2, 0),
                    textcoords="offset points",
                    fontsize=8,
                    va="bottom",
                )
            axis.set_yticks([])
            axis.set_ylim(len(arms) - 0.5, -0.75)
            axis.set_xlabel(literal(f"points from {_short(against)}"), fontsize=8)
            axis.grid(axis="x", alpha=0.25)
            axis.tick_params(labelsize=8)

        title = metric_title(metric)
        alternative = f"{title}: difference of each arm from {against} in points, with its 95 % interval"
        charts.append(make_chart(title, alternative, draw, 0.8 + 0.46 * len(arms)))
    return charts


def loss_chart(results: Results, setting: SettingResult) -> Chart | None:
    """The losses of all arms in one chart, a panel for each stage; None where no run has left a history.

    A line is the mean over the runs of an arm, the band around it their least and greatest; an arm that starts from
    another one goes on where that one ended.
    """
    panels = loss_panels(results, setting)
    if not panels:
        return None
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = matplotlib.colormaps["tab10"].colors + matplotlib.colormaps["Dark2"].colors
    styles = {
        name: {"color": colours[i % len(colours)], "linestyle": ("-", "--", ":")[i // len(colours) % 3]}
        for i, name in enumerate(names)
    }

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axis, (stage, lines) in zip(axes, panels.items(), strict=True):
            for name, (first, losses) in lines.items():
                epochs, style = np.arange(first, first + losses.shape[1]), styles[name]
                axis.plot(epochs, losses.mean(0), **style, linewidth=1.3, marker=".", markersize=5, label=_label(name))
                axis.fill_between(epochs, losses.min(0), losses.max(0), color=style["color"], alpha=0.12, linewidth=0)
            axis.set_title(literal(f"{stage} stage" if stage else "loss"), fontsize=9)
            axis.set_ylabel("loss", fontsize=8)
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=8)
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[-1].set_xlabel("epoch of the stage, those of the run it started from included", fontsize=8)
        handles: dict[str, Any] = {}
        for axis in axes:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            handles.values(),
            handles,
            loc="outside lower center",
            ncols=columns,
            fontsize=8,
            frameon=False,
            handlelength=1.4,
            columnspacing=1.1,
            handletextpad=0.5,
        )

    columns = max(1, min(3, LINE // max(len(_short(name)) for name in names)))
    height = 0.7 + 1.8 * len(panels) + 0.17 * math.ceil(len(names) / columns)
    return make_chart("Losses", "The loss of every arm in each epoch, a panel for each stage", draw, height)


def loss_panels(results: Results, setting: SettingResult) -> dict[str, dict[str, tuple[int, np.ndarray]]]:
    """By stage and arm: the first epoch's number and the losses (runs, epochs) of the runs that are there."""
    panels: dict[str, dict[str, tuple[int, np.ndarray]]] = {}
    for name, arm in results.plan.study.arms.items():
        if not arm.script:
            continue
        found: dict[str, list[tuple[int, list[float]]]] = {}
        for cell in cells_of(results.plan, setting.name, name).values():
            for stage, losses in losses_of(cell).items():
                before = sum(len(losses_of(link).get(stage, [])) for link in cell.chain[:-1])
                found.setdefault(stage, []).append((before + 1, losses))
        for stage, runs in found.items():
            # Runs that are under way have fewer epochs: their mean would be of others.
            longest = max(len(losses) for _, losses in runs)
            whole = [losses for _, losses in runs if len(losses) == longest]
            panels.setdefault(stage, {})[name] = (runs[0][0], np.array(whole))
    return panels


def losses_of(cell: Cell) -> dict[str, list[float]]:
    """The losses of a cell's training in the order of its epochs, by stage."""
    found: dict[str, list[float]] = {}
    for row in read_history(cell):
        if isinstance(row.get("loss"), (int, float)):
            found.setdefault(str(row.get("stage", "")), []).append(float(row["loss"]))
    return found


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _label(name: str) -> str:
    return literal(_short(name))


def heat(value: float, largest: float) -> str:
    """The ground of a difference: green where it is to the good, red to the bad, as deep as it is large."""
    if math.isnan(value) or largest <= 0:
        return "transparent"
    share = min(abs(value) / largest, 1.0)
    return f"rgba({'46, 160, 67' if value > 0 else '218, 54, 51'}, {0.6 * share:.2f})"
