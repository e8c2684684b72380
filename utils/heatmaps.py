"""Heatmaps over images: single ones, several models side by side, grids of examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage

from utils.figures import literal, save_png
from utils.files import replacing

COLOURS = "turbo"
OPACITY = 0.5
# Rows coloured at a time, which limits memory for large photographs.
_BAND = 256


def on_scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values scaled from [low, high] to [0, 1] and clipped."""
    return np.clip((values - low) / max(high - low, 1e-12), 0, 1)


def overlay(image: Image.Image, anomaly_map: np.ndarray, opacity: float = OPACITY) -> Image.Image:
    """A heatmap over an image, at the image's size; anomaly_map (h, w), coloured from 0 to 1."""
    heat = Image.fromarray((on_scale(anomaly_map, 0, 1) * 255).astype(np.uint8))
    heat = heat.resize(image.size, Image.Resampling.BILINEAR)
    grey, mixed = np.asarray(heat), np.array(image.convert("RGB"))
    for top in range(0, image.height, _BAND):
        rows = slice(top, top + _BAND)
        coloured = matplotlib.colormaps[COLOURS](grey[rows])[..., :3]
        mixed[rows] = (opacity * coloured * 255 + (1 - opacity) * mixed[rows]).astype(np.uint8)
    return Image.fromarray(mixed)


def outlined(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """An image with a white line around the mask (H, W)."""
    pixels = np.array(image.convert("RGB"))
    pixels[ndimage.binary_dilation(mask, iterations=2) & ~mask] = 255
    return Image.fromarray(pixels)


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image as PNG, atomically."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


@dataclass(frozen=True)
class Heatmap:
    """A model's result for one image: anomaly map (h, w) in [0, 1], score, pixel AUROC in percent (None: undefined).

    attention: attention maps by title, on the patch grid; 1 is uniform attention.
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
# Of attention maps: from half to one and a half times uniform attention.
LEAST_REACH = 0.5
NO_TICKS: dict[str, Any] = {"xticks": [], "yticks": []}


def comparison_figure(
    image: Image.Image, mask: np.ndarray, heatmaps: Sequence[Heatmap], path: Path, title: str
) -> None:
    """One image with heatmaps of several models: original, ground truth, heatmaps on one scale, attention below."""
    extra = list(dict.fromkeys(name for heatmap in heatmaps for name in heatmap.attention))
    columns, rows = 2 + len(heatmaps), 1 + len(extra)
    figure = Figure(figsize=(2.3 * columns + 0.8, 2.6 * rows + 0.5), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw=NO_TICKS)
    _draw(axes[0], image, mask, heatmaps, titles=True)
    _colour_bar(figure, axes[0], COLOURS, 0, 1, "p(abnormal)")
    for row, name in zip(axes[1:], extra, strict=True):
        low, high = attention_range([h.attention[name] for h in heatmaps if name in h.attention])
        for axis in row[:2]:
            axis.set_axis_off()
        row[1].text(1, 0.5, name, ha="right", va="center", fontsize=10, transform=row[1].transAxes)
        for axis, heatmap in zip(row[2:], heatmaps, strict=True):
            if name not in heatmap.attention:
                axis.set_axis_off()
                continue
            extent = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
            axis.imshow(heatmap.attention[name], cmap=ATTENTION_COLOURS, vmin=low, vmax=high, extent=extent)
            _outline(axis, mask)
        _colour_bar(figure, row, ATTENTION_COLOURS, low, high, "1 is uniform")
    figure.suptitle(literal(title), fontsize=11)
    save_png(figure, path)


@dataclass(frozen=True)
class Example:
    """A row of a grid: an image, its mask (H, W), and the heatmap of each model."""

    title: str
    image: Image.Image
    mask: np.ndarray
    heatmaps: Sequence[Heatmap]


def example_grid(examples: Sequence[Example], path: Path, title: str) -> None:
    """Rows of image, mask and one heatmap for each model, on one scale from 0 to 1; all rows have the same models."""
    columns = 2 + len(examples[0].heatmaps)
    figure = Figure(figsize=(1.75 * columns + 0.6, 1.75 * len(examples) + 0.9), layout="compressed")
    axes = figure.subplots(len(examples), columns, squeeze=False, subplot_kw=NO_TICKS)
    for row, example in zip(axes, examples, strict=True):
        _draw(row, example.image, example.mask, example.heatmaps, titles=example is examples[0])
        row[0].set_ylabel(literal(example.title), fontsize=8)
    _colour_bar(figure, axes, COLOURS, 0, 1, "p(abnormal)")
    figure.suptitle(title, fontsize=11)
    save_png(figure, path)


def stacked_picture(image: Image.Image, mask: np.ndarray, heatmap: Heatmap, path: Path) -> None:
    """The result of one model, from top to bottom: original, ground truth, heatmap."""
    figure = Figure(figsize=(2.8, 8.2), layout="constrained")
    axes = figure.subplots(3, 1, subplot_kw=NO_TICKS)
    _draw(axes, image, mask, [heatmap], titles=True)
    save_png(figure, path)


def attention_range(maps: Sequence[np.ndarray]) -> tuple[float, float]:
    """A range around 1, uniform attention, for all maps; at least `LEAST_REACH`, so that tiny differences look tiny."""
    reach = max(LEAST_REACH, *(float(np.abs(values - 1).max()) for values in maps))
    return 1 - reach, 1 + reach


def _draw(axes: np.ndarray, image: Image.Image, mask: np.ndarray, heatmaps: Sequence[Heatmap], titles: bool) -> None:
    """An image, its ground truth and its heatmaps, one on each of the axes."""
    axes[0].imshow(image)
    axes[1].imshow(mask, cmap="gray", vmin=0, vmax=1)
    for axis, heatmap in zip(axes[2:], heatmaps, strict=True):
        axis.imshow(overlay(image, heatmap.anomaly_map))
        axis.set_xlabel(heatmap.caption, fontsize=8, labelpad=2)
        _outline(axis, mask)
    names = ["Original", "Ground truth", *(literal(heatmap.model) for heatmap in heatmaps)]
    for axis, name in zip(axes, names, strict=True) if titles else ():
        axis.set_title(name, fontsize=10)


def _outline(axis: Axes, mask: np.ndarray) -> None:
    """The outline of the ground truth, unless it is empty or everywhere."""
    if mask.any() and not mask.all():
        axis.contour(mask, levels=[0.5], colors="white", linewidths=0.8)


def _colour_bar(figure: Figure, axes: np.ndarray, colours: str, low: float, high: float, label: str) -> None:
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(low, high), colours)
    bar = figure.colorbar(scale, ax=axes, fraction=0.025, pad=0.01)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
