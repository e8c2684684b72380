"""What the page shows of an image: HTML with its pictures inside, which the browser lays over one another."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from engine.app.session import Seen, Session, Thresholds, Verdict, verdict
from engine.detector.calibration import in_words
from engine.evaluation.pages import render_page
from utils.heatmaps import ATTENTION_COLOURS, COLOURS, on_scale, overlay
from utils.svg_charts import data_uri

TEMPLATE = Path(__file__).with_name("result.html")
# Longer side of the pictures from which one of several images is chosen, in pixels.
THUMBNAIL = 240
MOST_REGIONS = 10


def thumbnails(session: Session) -> list[tuple[Image.Image, str]]:
    """All images that were looked at, under their maps, with a caption."""
    shown = []
    for seen in session.seen:
        small = seen.image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        decision = verdict(seen, session.by_hand).decision
        caption = f"{seen.prediction.score:.3f} {decision} {seen.name}"
        shown.append((overlay(small, seen.prediction.anomaly_map), " ".join(caption.split())))
    return shown


def result(seen: Seen, by_hand: Thresholds | None) -> str:
    """One image with all that a model says of it, as HTML."""
    found, judged = seen.prediction, verdict(seen, by_hand)
    return render_page(
        TEMPLATE,
        name=seen.name,
        size=seen.size,
        decision=judged.decision,
        score=found.score,
        why=why(seen, by_hand),
        ratio=f"{seen.image.width} / {seen.image.height}",
        photo=_uri(seen.image, "JPEG"),
        heat=_uri(coloured(found.anomaly_map)),
        outline=_uri(outline(seen, judged)) if judged.mask is not None or judged.worst is not None else "",
        outlined="White: above the threshold of pixels" if judged.mask is not None else "White: the worst region",
        regions=shown_regions(judged),
        said_of_regions=said_of_regions(judged),
        levels=[_uri(coloured(level)) for level in found.level_maps],
        said_of_levels="References are not in them." if seen.references else "",
        attention=[
            (title, _uri(coloured(values, ATTENTION_COLOURS, *around_one(values))), values.min(), values.max())
            for title, values in seen.attention.items()
        ],
    )


def why(seen: Seen, by_hand: Thresholds | None) -> str:
    """By what an image is called anomalous or normal, in words."""
    compared = f", compared with {seen.references} normal images" if seen.references else ""
    by = f"{seen.model} on '{seen.class_name}'{compared}. "
    if by_hand is not None:
        return by + f"By hand: anomalous above {by_hand.image:.4f} (pixels: {by_hand.pixel:.4f})."
    if seen.entry is None:
        return by + "Not calibrated for this: find thresholds from normal images, or set one by hand."
    rank = seen.prediction.rank or 0.0
    return by + f"Higher than {100 * rank:.1f} % of normal images. Anomalous {in_words(seen.entry)}."


def shown_regions(judged: Verdict) -> Sequence[object]:
    """The worst regions: of those above the threshold, else the one around the map's maximum."""
    if judged.regions is not None:
        return judged.regions[:MOST_REGIONS]
    return [] if judged.worst is None else [judged.worst]


def said_of_regions(judged: Verdict) -> str:
    """Which regions these are, in words."""
    if judged.regions is None:
        found = "The worst region, around the map's maximum" if judged.worst else "Nothing stands out"
        return f"{found}; in pixels of the image."
    more = len(judged.regions) - MOST_REGIONS
    if not judged.regions:
        return "No pixel is above its threshold."
    return (f"And {more} more. " if more > 0 else "") + "The worst first, in pixels of the image."


def outline(seen: Seen, judged: Verdict) -> Image.Image:
    """White lines on nothing, at the size of the image that is shown: around the mask, else around the worst region."""
    width, height = seen.image.size
    lines = np.zeros((height, width), bool)
    if judged.mask is not None:
        mask = np.asarray(Image.fromarray(judged.mask).resize(seen.image.size, Image.Resampling.NEAREST))
        lines = ndimage.binary_dilation(mask, iterations=max(1, round(max(width, height) / 300))) & ~mask
    elif judged.worst is not None:
        scale = (width / seen.size[0], height / seen.size[1])
        left, top, right, bottom = (value * scale[index % 2] for index, value in enumerate(judged.worst[:4]))
        drawn = Image.fromarray(lines)
        box = (left, top, max(left, right - 1), max(top, bottom - 1))
        ImageDraw.Draw(drawn).rectangle(box, outline=True, width=max(1, round(max(width, height) / 300)))
        lines = np.asarray(drawn)
    white = np.zeros((height, width, 4), np.uint8)
    white[lines] = 255
    return Image.fromarray(white)


def coloured(values: np.ndarray, colours: str = COLOURS, low: float = 0.0, high: float = 1.0) -> Image.Image:
    """A map (h, w) as a picture of its own size, coloured from `low` to `high`."""
    colour = matplotlib.colormaps[colours](on_scale(values, low, high))[..., :3]
    return Image.fromarray((colour * 255).astype(np.uint8))


def around_one(values: np.ndarray) -> tuple[float, float]:
    """A range of colours around 1, even attention, that holds all values."""
    reach = max(float(np.abs(values - 1).max()), 0.01)
    return 1 - reach, 1 + reach


def said(lines: Sequence[str], problems: Sequence[str] = ()) -> str:
    """Lines and problems as HTML; what users wrote in them is shown as it is."""
    shown = [f'<p class="quiet">{html.escape(line)}</p>' for line in lines]
    shown += [f'<p class="problem">{html.escape(line)}</p>' for line in problems]
    return f'<div class="said">{"".join(shown)}</div>'


def _uri(picture: Image.Image, kind: str = "PNG") -> str:
    content = io.BytesIO()
    picture.save(content, format=kind, **({"quality": 88} if kind == "JPEG" else {}))
    return data_uri(content.getvalue(), f"image/{kind.lower()}")
