"""Pictures: heatmaps over images, and grids of examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from utils.files import replacing

COLOURS = "turbo"
OPACITY = 0.5


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
