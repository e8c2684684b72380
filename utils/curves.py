"""Curves over epochs and loops: losses, gradient norms, metrics."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from utils.figures import save_png

STAGE_COLOURS = {"text": "tab:blue", "image": "tab:orange", "both": "tab:purple"}


Span = tuple[tuple[int, str], list[tuple[int, Mapping[str, Any]]]]


def training_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses and gradient norms over all epochs of a run, in the order of training, loops and stages marked.

    history: rows of `history.jsonl`; every (loop, stage) is a separate line on a background of its stage's colour.
    """
    figure = Figure(figsize=(max(7.0, 3.5 + 0.16 * len(history)), 5.6), layout="constrained")
    losses, norms = figure.subplots(2, 1, sharex=True)
    spans = stage_spans(history)
    draw_losses(losses, spans)
    draw_norms(norms, spans)
    mark_loops([losses, norms], spans)
    norms.set_xlabel("epoch, in the order of training")
    stage_legend(figure, history)
    save_png(figure, path)


def stage_spans(history: Sequence[Mapping[str, Any]]) -> list[Span]:
    """Each (loop, stage) with its rows and their positions, counted from 1."""
    numbered = enumerate(history, start=1)
    return [(key, list(rows)) for key, rows in groupby(numbered, key=lambda item: (item[1]["loop"], item[1]["stage"]))]


def _draw_spans(axis: Axes, spans: Sequence[Span], value: Callable[[Mapping[str, Any]], float], **style: Any) -> None:
    """A line for each stage over its epochs, in its colour."""
    for (_, stage), rows in spans:
        epochs, values = [position for position, _ in rows], [value(row) for _, row in rows]
        axis.plot(epochs, values, **{"marker": "o", "markersize": 3, "color": STAGE_COLOURS[stage], **style})


def draw_losses(axis: Axes, spans: Sequence[Span]) -> None:
    """The loss of every epoch."""
    _draw_spans(axis, spans, lambda row: row["loss"])
    losses = [row["loss"] for _, rows in spans for _, row in rows]
    if max(losses) > 8 * min(losses) > 0:
        _use_log_scale(axis)
    _finish_epochs(axis, spans, "loss")


def draw_norms(axis: Axes, spans: Sequence[Span]) -> None:
    """The gradient's norm in every epoch, and that of the cross-attention alone."""
    _draw_spans(axis, spans, lambda row: row["grad_norm/total"])
    _draw_spans(axis, spans, _cross_attention_norm, linestyle=":", marker=".")
    _use_log_scale(axis)
    _finish_epochs(axis, spans, "gradient norm")


def draw_watch(axis: Axes, spans: Sequence[Span]) -> None:
    """Mean p(abnormal) inside the masks, and dashed outside, in every epoch."""
    _draw_spans(axis, spans, lambda row: row["abnormal_inside"])
    _draw_spans(axis, spans, lambda row: row["abnormal_outside"], linestyle="--", marker=".")
    axis.set_ylim(bottom=0)
    _finish_epochs(axis, spans, "mean p(abnormal)")


def _use_log_scale(axis: Axes) -> None:
    """A logarithmic y axis with plain numbers, such as 0.05 and 20."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _cross_attention_norm(row: Mapping[str, Any]) -> float:
    """The norm over all cross-attentions that the epoch trained; NaN if there are none."""
    norms = [value for name, value in row.items() if name.startswith("grad_norm/") and name.endswith("_cross_attn")]
    return math.hypot(*norms) or np.nan


def _finish_epochs(axis: Axes, spans: Sequence[Span], label: str) -> None:
    for (_, stage), rows in spans:
        axis.axvspan(rows[0][0] - 0.5, rows[-1][0] + 0.5, color=STAGE_COLOURS[stage], alpha=0.08, linewidth=0)
    axis.set_xlim(0.5, spans[-1][1][-1][0] + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.set_ylabel(label)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)


def mark_loops(axes: Sequence[Axes], spans: Sequence[Span]) -> None:
    """A line before each loop, and its number above the first axes."""
    many = spans[-1][0][0] > 5
    for loop, group in groupby(spans, key=lambda span: span[0][0]):
        rows = [position for _, rows in group for position, _ in rows]
        if loop > 1:
            for axis in axes:
                axis.axvline(rows[0] - 0.5, color="grey", linewidth=0.8)
        middle = (rows[0] + rows[-1]) / 2
        label, place = f"{loop}" if many and loop > 1 else f"loop {loop}", axes[0].get_xaxis_transform()
        axes[0].text(middle, 1.02, label, transform=place, ha="center", fontsize=8)


def stage_legend(figure: Figure, history: Sequence[Mapping[str, Any]]) -> None:
    """A legend of the stages' colours, and of the dotted lines of cross-attention if there are any."""
    present = {row["stage"] for row in history}
    colours = {stage: colour for stage, colour in STAGE_COLOURS.items() if stage in present}
    handles = [Line2D([], [], color=colour, marker="o", markersize=3) for colour in colours.values()]
    labels = ["both sides" if stage == "both" else f"{stage} stage" for stage in colours]
    if any(_cross_attention_norm(row) > 0 for row in history):
        handles.append(Line2D([], [], color="grey", linestyle=":", marker=".", markersize=3))
        labels.append("cross-attention only")
    bottom_legend(figure, handles, labels)


def bottom_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below all axes, compact enough for a narrow figure."""
    style = {"fontsize": 8, "frameon": False, "handlelength": 1.4, "columnspacing": 1.1, "handletextpad": 0.5}
    figure.legend(handles, labels, loc="outside lower center", ncols=3, **style)


REFERENCE_STYLES = (("tab:orange", "--"), ("tab:green", "-."), ("tab:gray", ":"), ("tab:purple", (0, (5, 1))))
# Percentage points from the loops within which other models are drawn.
FAR = 10.0
Panel = tuple[Mapping[int, float | None], Mapping[str, float | None]]


def loop_curves(panels: Mapping[str, Panel], path: Path, title: str) -> None:
    """A panel per metric, two in a row; panels: by the panel's title, as `draw_loops` takes them."""
    height = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 3.1 * height), layout="constrained")
    axes = figure.subplots(height, 2, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (heading, panel) in zip(axes[: len(panels)], panels.items(), strict=True):
        draw_loops(axis, panel)
        axis.set_title(heading, fontsize=10)
    figure.suptitle(title, fontsize=11)
    save_png(figure, path)


def draw_loops(axis: Axes, panel: Panel) -> None:
    """One metric over the loops as a line, and other models' as horizontal lines with a legend.

    The axis shows the loops; models that are far from them are named in the legend only. panel: the values by loop and
    those of other models by name, in percent; None is not drawn, and a missing loop interrupts the line.
    """
    values, references = panel
    loops = range(min(values, default=1), max(values, default=1) + 1)
    line = [np.nan if (value := values.get(loop)) is None else value for loop in loops]
    axis.plot(loops, line, color="tab:blue", marker="o", markersize=5)
    defined = {name: value for name, value in references.items() if value is not None}
    styles = reference_styles(references)
    found = [value for value in line if not np.isnan(value)] or list(defined.values())
    reach = max(FAR, 2 * (max(found) - min(found))) if found else 0.0
    near = [value for value in defined.values() if min(found) - reach <= value <= max(found) + reach]
    for name, value in defined.items():
        colour, style = styles[name]
        label = f"{name} {value:.2f}" + ("" if value in near else " (not in the chart)")
        axis.axhline(value, color=colour, linestyle=style, linewidth=1.4, zorder=1, label=label)
    if defined:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2, fontsize=7, frameon=False)
    # A margin of at least half a percentage point, so that tiny differences do not fill the panel.
    drawn = [*found, *near] or [0.0, 100.0]
    margin = max(0.1 * (max(drawn) - min(drawn)), 0.5)
    axis.set_ylim(min(drawn) - margin, max(drawn) + margin)
    axis.set_xlim(loops[0] - 0.4, loops[-1] + 0.4)
    axis.set_xticks(loops)
    axis.set_xlabel("loop", fontsize=9)
    axis.locator_params(axis="y", nbins=5)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)


def reference_styles(names: Iterable[str]) -> dict[str, tuple[str, Any]]:
    """Colour and line style of the other models, in their order."""
    return {name: REFERENCE_STYLES[index % len(REFERENCE_STYLES)] for index, name in enumerate(names)}
