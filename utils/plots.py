"""Pictures: heatmaps over images, and grids of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

from utils.files import replacing

COLOURS = "turbo"
OPACITY = 0.5
STAGE_COLOURS = {"text": "tab:blue", "image": "tab:orange"}


def overlay(image: Image.Image, anomaly_map: np.ndarray, low: float = 0.0, high: float = 1.0) -> Image.Image:
    """A heatmap over an image, at the image's size; anomaly_map (h, w), coloured from `low` to `high`."""
    scaled = np.clip((anomaly_map - low) / max(high - low, 1e-12), 0, 1)
    heat = Image.fromarray((scaled * 255).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    coloured = matplotlib.colormaps[COLOURS](np.asarray(heat))[..., :3]
    mixed = OPACITY * coloured * 255 + (1 - OPACITY) * np.asarray(image.convert("RGB"))
    return Image.fromarray(mixed.astype(np.uint8))


@dataclass(frozen=True)
class Example:
    """A row of a grid: an image, its mask (H, W; None: normal), and a map with its score for each model."""

    title: str
    image: Image.Image
    mask: np.ndarray | None
    maps: Sequence[np.ndarray]
    scores: Sequence[float]


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def save_png(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG, whole or not at all, without a display."""
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")


def example_grid(examples: Sequence[Example], models: Sequence[str], path: Path, title: str) -> None:
    """Rows of image, mask and one heatmap per model, all maps of the grid on one colour scale from 0 to 1."""
    columns = ["Image", "Ground truth", *models]
    figure = Figure(figsize=(1.75 * len(columns) + 0.6, 1.75 * len(examples) + 0.9), layout="constrained")
    axes = figure.subplots(len(examples), len(columns), squeeze=False)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), COLOURS)
    for row, example in zip(axes, examples, strict=True):
        size = (example.image.height, example.image.width)
        mask = np.zeros(size, bool) if example.mask is None else example.mask
        row[0].imshow(example.image)
        row[0].set_ylabel(example.title, fontsize=8)
        row[1].imshow(mask, cmap="gray", vmin=0, vmax=1)
        for axis, anomaly_map, score in zip(row[2:], example.maps, example.scores, strict=True):
            axis.imshow(overlay(example.image, anomaly_map))
            if mask.any():
                axis.contour(mask, levels=[0.5], colors="white", linewidths=0.8)
            axis.set_xlabel(f"score {score:.2f}", fontsize=8, labelpad=2)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=9)
    bar = figure.colorbar(scale, ax=axes, fraction=0.025, pad=0.01)
    bar.set_label("p(abnormal)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=11)
    save_png(figure, path)


def training_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses and gradient norms over all epochs of a run, in the order of training, loops and stages marked.

    history: rows of `history.jsonl`; every (loop, stage) is a line of its own on a ground of its stage's colour.
    """
    figure = Figure(figsize=(max(7.0, 3.5 + 0.16 * len(history)), 5.6), layout="constrained")
    losses, norms = figure.subplots(2, 1, sharex=True)
    spans = _stage_spans(history)
    for (_, stage), rows in spans:
        epochs = [position for position, _ in rows]
        style = {"color": STAGE_COLOURS[stage], "marker": "o", "markersize": 3}
        losses.plot(epochs, [row["loss"] for _, row in rows], **style)
        norms.plot(epochs, [row["grad_norm/total"] for _, row in rows], **style)
        crossed = [row.get(f"grad_norm/{stage}_cross_attn") or np.nan for _, row in rows]
        norms.plot(epochs, crossed, ":", marker=".", markersize=3, color=STAGE_COLOURS[stage])
        for axis in (losses, norms):
            axis.axvspan(epochs[0] - 0.5, epochs[-1] + 0.5, color=STAGE_COLOURS[stage], alpha=0.08, linewidth=0)
    _mark_loops(losses, norms, spans)
    losses.set_ylabel("loss")
    norms.set_ylabel("gradient norm")
    norms.set_yscale("log")
    found = [row["loss"] for row in history]
    if max(found) > 8 * min(found) > 0:
        losses.set_yscale("log")
    norms.set_xlim(0.5, len(history) + 0.5)
    norms.set_xlabel("epoch, in the order of training")
    norms.xaxis.get_major_locator().set_params(integer=True)
    crossed = any(row.get(f"grad_norm/{side}_cross_attn") for row in history for side in STAGE_COLOURS)
    handles = [Line2D([], [], color=colour, marker="o", markersize=3) for colour in STAGE_COLOURS.values()]
    labels = ["text stage", "image stage"]
    if crossed:
        handles.append(Line2D([], [], color="grey", linestyle=":", marker=".", markersize=3))
        labels.append("its cross-attention alone")
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    for axis in (losses, norms):
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    save_png(figure, path)


Span = tuple[tuple[int, str], list[tuple[int, Mapping[str, Any]]]]


def _stage_spans(history: Sequence[Mapping[str, Any]]) -> list[Span]:
    """Each (loop, stage) with its rows and their positions, counted from 1."""
    numbered = enumerate(history, start=1)
    return [(key, list(rows)) for key, rows in groupby(numbered, key=lambda item: (item[1]["loop"], item[1]["stage"]))]


def _mark_loops(top: Axes, bottom: Axes, spans: Sequence[Span]) -> None:
    """A line before each loop, and its number above the upper axis."""
    for loop, group in groupby(spans, key=lambda span: span[0][0]):
        rows = [position for _, rows in group for position, _ in rows]
        if loop > 1:
            for axis in (top, bottom):
                axis.axvline(rows[0] - 0.5, color="grey", linewidth=0.8)
        middle = (rows[0] + rows[-1]) / 2
        top.annotate(
            f"loop {loop}", (middle, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
            ha="center", fontsize=8,
        )  # fmt: skip
