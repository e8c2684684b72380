"""Figures as files, and text in them."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.files import replacing


def literal(text: str) -> str:
    """Text in which matplotlib sees no formulas, and no bytes that are no UTF-8: it can draw neither."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("$", r"\$")


def save_png(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG, whole or not at all, without a display."""
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
