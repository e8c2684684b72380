"""Pictures: heatmaps over images, and grids of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from scipy import ndimage

from utils.files import replacing

COLOURS = "turbo"
OPACITY = 0.5
STAGE_COLOURS = {"text": "tab:blue", "image": "tab:orange"}


def literal(text: str) -> str:
    """Text in which matplotlib sees no formulas."""
    return text.replace("$", r"\$")


def overlay(image: Image.Image, anomaly_map: np.ndarray, low: float = 0.0, high: float = 1.0) -> Image.Image:
    """A heatmap over an image, at the image's size; anomaly_map (h, w), coloured from `low` to `high`."""
    scaled = np.clip((anomaly_map - low) / max(high - low, 1e-12), 0, 1)
    heat = Image.fromarray((scaled * 255).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    coloured = matplotlib.colormaps[COLOURS](np.asarray(heat))[..., :3]
    mixed = OPACITY * coloured * 255 + (1 - OPACITY) * np.asarray(image.convert("RGB"))
    return Image.fromarray(mixed.astype(np.uint8))


def outlined(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture with a white line around the ground truth (H, W)."""
    pixels = np.array(image.convert("RGB"))
    pixels[ndimage.binary_dilation(mask, iterations=2) & ~mask] = 255
    return Image.fromarray(pixels)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def save_png(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG, whole or not at all, without a display."""
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")


Span = tuple[tuple[int, str], list[tuple[int, Mapping[str, Any]]]]


def training_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses and gradient norms over all epochs of a run, in the order of training, loops and stages marked.

    history: rows of `history.jsonl`; every (loop, stage) is a line of its own on a ground of its stage's colour.
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
    """A line over the epochs of each stage, in its colour."""
    for (_, stage), rows in spans:
        epochs, values = [position for position, _ in rows], [value(row) for _, row in rows]
        axis.plot(epochs, values, **{"marker": "o", "markersize": 3, "color": STAGE_COLOURS[stage], **style})


def draw_losses(axis: Axes, spans: Sequence[Span]) -> None:
    """The loss of every epoch."""
    _draw_spans(axis, spans, lambda row: row["loss"])
    found = [row["loss"] for _, rows in spans for _, row in rows]
    if max(found) > 8 * min(found) > 0:
        axis.set_yscale("log")
    _finish_epochs(axis, spans, "loss")


def draw_norms(axis: Axes, spans: Sequence[Span]) -> None:
    """The gradient's norm in every epoch, and that of the cross-attention alone."""
    _draw_spans(axis, spans, lambda row: row["grad_norm/total"])
    _draw_spans(axis, spans, _cross_attention_norm, linestyle=":", marker=".")
    axis.set_yscale("log")
    _finish_epochs(axis, spans, "gradient norm")


def draw_watch(axis: Axes, spans: Sequence[Span]) -> None:
    """Mean p(abnormal) inside the masks, and dashed outside, in every epoch."""
    _draw_spans(axis, spans, lambda row: row["abnormal_inside"])
    _draw_spans(axis, spans, lambda row: row["abnormal_outside"], linestyle="--", marker=".")
    axis.set_ylim(bottom=0)
    _finish_epochs(axis, spans, "mean p(abnormal)")


def _cross_attention_norm(row: Mapping[str, Any]) -> float:
    return row.get(f"grad_norm/{row['stage']}_cross_attn") or np.nan


def _finish_epochs(axis: Axes, spans: Sequence[Span], label: str) -> None:
    for (_, stage), rows in spans:
        axis.axvspan(rows[0][0] - 0.5, rows[-1][0] + 0.5, color=STAGE_COLOURS[stage], alpha=0.08, linewidth=0)
    axis.set_xlim(0.5, spans[-1][1][-1][0] + 0.5)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel(label)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)


def mark_loops(axes: Sequence[Axes], spans: Sequence[Span]) -> None:
    """A line before each loop, and its number above the first of the axes, alone where there are many."""
    many = spans[-1][0][0] > 5
    for loop, group in groupby(spans, key=lambda span: span[0][0]):
        rows = [position for _, rows in group for position, _ in rows]
        if loop > 1:
            for axis in axes:
                axis.axvline(rows[0] - 0.5, color="grey", linewidth=0.8)
        middle = (rows[0] + rows[-1]) / 2
        axes[0].annotate(
            f"{loop}" if many and loop > 1 else f"loop {loop}", (middle, 1), xycoords=("data", "axes fraction"),
            xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8,
        )  # fmt: skip


def stage_legend(figure: Figure, history: Sequence[Mapping[str, Any]]) -> None:
    """Which colour is which stage, and that dotted lines are cross-attention's where there is any."""
    handles = [Line2D([], [], color=colour, marker="o", markersize=3) for colour in STAGE_COLOURS.values()]
    labels = ["text stage", "image stage"]
    if any(row.get(f"grad_norm/{side}_cross_attn") for row in history for side in STAGE_COLOURS):
        handles.append(Line2D([], [], color="grey", linestyle=":", marker=".", markersize=3))
        labels.append("its cross-attention alone")
    bottom_legend(figure, handles, labels)


def bottom_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below all axes, compact enough for a narrow figure."""
    style = {"fontsize": 8, "frameon": False, "handlelength": 1.4, "columnspacing": 1.1, "handletextpad": 0.5}
    figure.legend(handles, labels, loc="outside lower center", ncols=3, **style)


REFERENCE_STYLES = (("tab:orange", "--"), ("tab:green", "-."), ("tab:gray", ":"), ("tab:purple", (0, (5, 1))))
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
    """One metric over the loops as a line, and other models' as horizontal lines with labels.

    panel: the values by loop and those of other models by name, in percent; None is left out, and a loop that is not
    there breaks the line.
    """
    values, references = panel
    colours = reference_styles(references)
    loops = range(min(values, default=1), max(values, default=1) + 1)
    line = [np.nan if values.get(loop) is None else values[loop] for loop in loops]
    axis.plot(loops, line, color="tab:blue", marker="o", markersize=5)
    known = {name: value for name, value in references.items() if value is not None}
    for name, value in known.items():
        axis.axhline(value, color=colours[name][0], linestyle=colours[name][1], linewidth=1.4, zorder=1)
    _limit_to(axis, [*(value for value in line if not np.isnan(value)), *known.values()])
    _label_lines(axis, known, {name: colour for name, (colour, _) in colours.items()})
    axis.set_xlim(loops[0] - 0.4, loops[-1] + 0.4)
    axis.set_xticks(loops)
    axis.set_xlabel("loop", fontsize=9)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)


def reference_styles(names: Iterable[str]) -> dict[str, tuple[str, Any]]:
    """Colour and line style of the models beside the loops, in their order."""
    return {name: REFERENCE_STYLES[index % len(REFERENCE_STYLES)] for index, name in enumerate(names)}


def _limit_to(axis: Axes, values: Sequence[float]) -> None:
    """Room around the values, at least a point, so that differences which mean nothing do not fill the panel."""
    low, high = (min(values), max(values)) if values else (0.0, 100.0)
    margin = max(0.1 * (high - low), 0.5)
    axis.set_ylim(low - margin, high + margin)


def _label_lines(axis: Axes, values: Mapping[str, float], colours: Mapping[str, str], gap: float = 0.075) -> None:
    """Name horizontal lines with their values right of the axis, at least `gap` of its height apart."""
    bottom, top = axis.get_ylim()
    names = sorted(values, key=values.get)
    places: list[float] = []
    for name in names:
        place = (values[name] - bottom) / (top - bottom)
        places.append(max(place, places[-1] + gap) if places else place)
    for index in range(len(places) - 1, -1, -1):
        above = places[index + 1] - gap if index + 1 < len(places) else 1.0
        places[index] = min(places[index], above)
    for name, place in zip(names, places, strict=True):
        axis.annotate(
            f"{name} {values[name]:.2f}", (1, values[name]), xycoords=("axes fraction", "data"), xytext=(1.06, place),
            textcoords="axes fraction", va="center", fontsize=8, color=colours[name],
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.8, "relpos": (0, 0.5)},
        )  # fmt: skip


@dataclass(frozen=True)
class Heatmap:
    """What one model says of an image: anomaly map (h, w) in [0, 1], score, pixel AUROC in percent (None: undefined).

    attention: more maps by their title, on the patch grid, where 1 is even attention.
    """

    model: str
    anomaly_map: np.ndarray
    score: float
    auroc: float | None
    attention: Mapping[str, np.ndarray]

    @property
    def caption(self) -> str:
        value = "n/a" if self.auroc is None else f"{self.auroc:.1f}"
        return f"score {self.score:.2f}, AUROC {value}"


ATTENTION_COLOURS = "PuOr_r"


def comparison_figure(
    image: Image.Image, mask: np.ndarray, heatmaps: Sequence[Heatmap], path: Path, title: str
) -> None:
    """One image as several models see it: original, ground truth, heatmaps on one colour scale; attention below."""
    extra = list(dict.fromkeys(name for heatmap in heatmaps for name in heatmap.attention))
    columns, rows = 2 + len(heatmaps), 1 + len(extra)
    figure = Figure(figsize=(2.3 * columns + 0.8, 2.6 * rows + 0.5), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, name in zip(axes[0], ["Original", "Ground truth", *(literal(h.model) for h in heatmaps)], strict=True):
        axis.set_title(name, fontsize=10)
    axes[0, 0].imshow(image)
    axes[0, 1].imshow(mask, cmap="gray", vmin=0, vmax=1)
    for axis, heatmap in zip(axes[0, 2:], heatmaps, strict=True):
        axis.imshow(overlay(image, heatmap.anomaly_map))
        axis.set_xlabel(heatmap.caption, fontsize=9)
        _outline(axis, mask)
    _colour_bar(figure, axes[0], COLOURS, 0, 1, "p(abnormal)")
    for row, name in zip(axes[1:], extra, strict=True):
        shown = [h.attention[name] for h in heatmaps if name in h.attention]
        reach = max(float(np.abs(values - 1).max()) for values in shown)
        low, high = 1 - max(reach, 0.01), 1 + max(reach, 0.01)
        for axis in row[:2]:
            axis.set_axis_off()
        first = next(column for column, heatmap in enumerate(heatmaps, start=2) if name in heatmap.attention)
        row[first - 1].text(1, 0.5, name, ha="right", va="center", fontsize=10, transform=row[first - 1].transAxes)
        for axis, heatmap in zip(row[2:], heatmaps, strict=True):
            if name not in heatmap.attention:
                axis.set_axis_off()
                continue
            extent = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
            axis.imshow(heatmap.attention[name], cmap=ATTENTION_COLOURS, vmin=low, vmax=high, extent=extent)
            _outline(axis, mask)
        _colour_bar(figure, row, ATTENTION_COLOURS, low, high, "1 is even")
    figure.suptitle(literal(title), fontsize=11)
    save_png(figure, path)


@dataclass(frozen=True)
class Example:
    """A row of a grid: an image, its mask (H, W), and what each model says of it."""

    title: str
    image: Image.Image
    mask: np.ndarray
    heatmaps: Sequence[Heatmap]


def example_grid(examples: Sequence[Example], path: Path, title: str) -> None:
    """Rows of image, mask and one heatmap per model, the same in every row, on one colour scale from 0 to 1."""
    columns = ["Image", "Ground truth", *(heatmap.model for heatmap in examples[0].heatmaps)]
    figure = Figure(figsize=(1.75 * len(columns) + 0.6, 1.75 * len(examples) + 0.9), layout="compressed")
    axes = figure.subplots(len(examples), len(columns), squeeze=False)
    for row, example in zip(axes, examples, strict=True):
        row[0].imshow(example.image)
        row[0].set_ylabel(literal(example.title), fontsize=8)
        row[1].imshow(example.mask, cmap="gray", vmin=0, vmax=1)
        for axis, heatmap in zip(row[2:], example.heatmaps, strict=True):
            axis.imshow(overlay(example.image, heatmap.anomaly_map))
            _outline(axis, example.mask)
            axis.set_xlabel(heatmap.caption, fontsize=8, labelpad=2)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=9)
    _colour_bar(figure, axes, COLOURS, 0, 1, "p(abnormal)")
    figure.suptitle(title, fontsize=11)
    save_png(figure, path)


def stacked_picture(image: Image.Image, mask: np.ndarray, heatmap: Heatmap, path: Path) -> None:
    """One model alone, from top to bottom: original, ground truth, heatmap."""
    figure = Figure(figsize=(2.8, 8.2), layout="constrained")
    axes = figure.subplots(3, 1)
    axes[0].imshow(image)
    axes[1].imshow(mask, cmap="gray", vmin=0, vmax=1)
    axes[2].imshow(overlay(image, heatmap.anomaly_map))
    _outline(axes[2], mask)
    axes[2].set_xlabel(heatmap.caption, fontsize=9)
    for axis, name in zip(axes, ("Original", "Ground truth", heatmap.model), strict=True):
        axis.set_title(name, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    save_png(figure, path)


def _outline(axis: Axes, mask: np.ndarray) -> None:
    """The ground truth's outline, where there is one."""
    if mask.any() and not mask.all():
        axis.contour(mask, levels=[0.5], colors="white", linewidths=0.8)


def _colour_bar(figure: Figure, axes: np.ndarray, colours: str, low: float, high: float, label: str) -> None:
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(low, high), colours)
    bar = figure.colorbar(scale, ax=axes, fraction=0.025, pad=0.01)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
