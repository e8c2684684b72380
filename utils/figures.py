"""Figures as files, and text in them."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.files import replacing


def literal(text: str) -> str:
    """Text without formulas and invalid UTF-8, which matplotlib cannot draw."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("$", r"\$")


def save_png(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG, atomically and without a display."""
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
