"""Charts for HTML pages: an SVG for light and one for dark backgrounds, narrow enough for a phone."""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

from utils import curves
from utils.figures import literal

WIDTH, HEIGHT = 3.9, 2.75
# Colours of text, axes and ticks; the background is the page's.
INKS = {"light": "#22262b", "dark": "#e3e6ea"}
INKED: Any = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
SETTINGS: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "charts", "axes.facecolor": "none", "font.size": 9}
# Longer class names are cut, in characters.
LONGEST = 18
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Chart:
    """A chart as data URIs, for light and dark backgrounds, with a description."""

    title: str
    light: str
    dark: str
    alternative: str


def make_chart(title: str, alternative: str, draw: Callable[[Figure], None], height: float = HEIGHT) -> Chart:
    """A chart from a function that draws on a figure; for dark backgrounds only `INKS` differ."""
    light = _svg(draw, height)
    dark = light.replace(INKS["light"], INKS["dark"])
    light_uri, dark_uri = (data_uri(text.encode("utf-8"), "image/svg+xml") for text in (light, dark))
    return Chart(title, light_uri, dark_uri, alternative)


def _svg(draw: Callable[[Figure], None], height: float) -> str:
    with matplotlib.rc_context({**SETTINGS, **dict.fromkeys(INKED, INKS["light"])}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        text = io.StringIO()
        FigureCanvasSVG(figure)
        # Without the date, equal charts have equal files.
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Content as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def picture_uri(picture: Image.Image, kind: str = "JPEG", quality: int = 88) -> str:
    """A picture as a data URI."""
    content = io.BytesIO()
    picture.save(content, kind, quality=quality)
    return data_uri(content.getvalue(), f"image/{kind.lower()}")


def training_charts(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Loss, gradient norm, and p(abnormal) inside and outside the masks, over all epochs of a run.

    history: rows of `history.jsonl`, at least one.
    """
    spans = curves.stage_spans(history)
    several = len({row["loop"] for row in history}) > 1

    def chart(title: str, alternative: str, draw: Callable[..., None]) -> Chart:
        def on(figure: Figure) -> None:
            axis = figure.subplots()
            draw(axis, spans)
            if several:
                curves.mark_loops([axis], spans)
            axis.set_xlabel("epoch, in the order of training")
            curves.stage_legend(figure, history if draw is curves.draw_norms else [])

        return make_chart(title, alternative, on)

    inside = "Mean p(abnormal) inside and outside the masks in each epoch"
    return [
        chart("Loss", "Loss of each epoch of both stages", curves.draw_losses),
        chart("Gradient norm", "Gradient norm of each epoch, before clipping", curves.draw_norms),
        chart("p(abnormal) in masks, dashed outside", inside, curves.draw_watch),
    ]


def loop_chart(title: str, panel: curves.Panel) -> Chart:
    """One metric over the loops, and of other models, in percent (`curves.draw_loops`)."""
    alternative = f"{title} of each loop, in percent"
    return make_chart(title, alternative, lambda figure: curves.draw_loops(figure.subplots(), panel))


def class_chart(title: str, values: Mapping[str, Mapping[str, float | None]]) -> Chart | None:
    """One metric of every class, a marker for each model; None if it is undefined in all classes.

    values: percent by model, then by class; None is not drawn.
    """
    if not any(value is not None for of_class in values.values() for value in of_class.values()):
        return None
    classes = list(next(iter(values.values())))
    *others, last = values
    colours = {name: colour for name, (colour, _) in curves.reference_styles(others).items()} | {last: "tab:blue"}

    def on(figure: Figure) -> None:
        axis = figure.subplots()
        for index, (name, of_class) in enumerate(values.items()):
            points = [math.nan if value is None else value for value in of_class.values()]
            (markers,) = axis.plot(points, range(len(points)), MARKERS[index % len(MARKERS)], label=literal(name))
            markers.set(color=colours[name], markersize=6, alpha=0.9)
        labels = [literal(name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…") for name in classes]
        axis.set_yticks(range(len(classes)), labels)
        axis.set_ylim(len(classes) - 0.5, -0.5)
        axis.set_xlabel("percent")
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        curves.bottom_legend(figure, *axis.get_legend_handles_labels())

    return make_chart(title, f"{title} of each class and model, in percent", on, 1.4 + 0.24 * len(classes))
