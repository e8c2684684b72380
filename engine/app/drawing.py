"""The HTML of a result, with embedded pictures that the browser stacks."""

import html
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from scipy import ndimage

from engine.app.session import ImageResult, Session, decide_on
from engine.evaluation.own_images import Finding
from engine.evaluation.pages import render_page
from model.graph import Thresholds
from utils.heatmaps import ATTENTION_COLOURS, COLOURS, attention_range, on_scale, overlay
from utils.regions import Region, draw_box
from utils.svg_charts import picture_uri

TEMPLATE = Path(__file__).with_name("result.html")
# Longer side of the thumbnails, in pixels.
THUMBNAIL = 240
MAX_REGIONS = 10


def thumbnails(session: Session) -> list[tuple[Image.Image, str]]:
    """All results as small heatmaps with captions."""
    pictures = []
    for result in session.results:
        small = result.image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        _, finding = decide_on(result, session.manual)
        caption = f"{finding.score:.3f} {finding.decision} {result.name}"
        pictures.append((overlay(small, result.prediction.anomaly_map), " ".join(caption.split())))
    return pictures


def result_html(result: ImageResult, manual: Thresholds | None) -> str:
    """One image with its decision, maps and regions."""
    prediction, finding = decide_on(result, manual)
    return render_page(
        TEMPLATE,
        result=result,
        finding=finding,
        explanation=explanation(result, manual),
        ratio=f"{result.image.width} / {result.image.height}",
        photo=picture_uri(result.image),
        heat=map_uri(prediction.anomaly_map),
        outline=picture_uri(outline(result, prediction.mask, finding.region), "PNG"),
        outline_note="White: the worst region" if prediction.mask is None else "White: above the pixel threshold",
        regions=[*filter(None, [finding.region])] if prediction.regions is None else prediction.regions[:MAX_REGIONS],
        regions_note=regions_note(prediction.regions, finding),
        levels=[map_uri(level) for level in prediction.level_maps],
        attention=[
            (title, map_uri(values, ATTENTION_COLOURS, *attention_range([values])), values.min(), values.max())
            for title, values in result.attention.items()
        ],
    )


def explanation(result: ImageResult, manual: Thresholds | None) -> str:
    """Model, class and thresholds of a decision."""
    compared = f", compared with {result.references} normal images" if result.references else ""
    text = f"{result.model} on '{result.finding.class_name}'{compared}. "
    if manual is not None:
        return text + f"Manual thresholds: anomalous above {manual.image:.4f} (pixels: {manual.pixel:.4f})."
    if result.entry is None:
        return text + "No thresholds: find them with normal images, or set them with the sliders."
    rank = result.prediction.rank or 0.0
    return text + f"Higher than {100 * rank:.1f} % of normal images. Anomalous {result.entry}."


def regions_note(regions: Sequence[Region] | None, finding: Finding) -> str:
    if regions is None:
        region = "The worst region, around the maximum of the map" if finding.region else "No region stands out"
        return f"{region}; in pixels of the image."
    if not regions:
        return "No pixel is above its threshold."
    more = len(regions) - MAX_REGIONS
    return (f"And {more} more. " if more > 0 else "") + "The worst first, in pixels of the image."


def outline(result: ImageResult, mask: np.ndarray | None, region: Region | None) -> Image.Image:
    """White lines around the mask, or else around the worst region, on a transparent image."""
    width, height = result.image.size
    thickness = max(1, round(max(width, height) / 300))
    lines = np.zeros((height, width), bool)
    if mask is not None:
        mask = np.asarray(Image.fromarray(mask).resize(result.image.size, Image.Resampling.NEAREST))
        lines = ndimage.binary_dilation(mask, iterations=thickness) & ~mask
    elif region is not None:
        drawing = Image.fromarray(lines)
        draw_box(drawing, region, result.size, thickness)
        lines = np.asarray(drawing)
    white = np.zeros((height, width, 4), np.uint8)
    white[lines] = 255
    return Image.fromarray(white)


def map_uri(values: np.ndarray, colours: str = COLOURS, low: float = 0.0, high: float = 1.0) -> str:
    """A picture of a map (H, W), coloured from `low` to `high`, as a data URI."""
    colour = matplotlib.colormaps[colours](on_scale(values, low, high))[..., :3]
    return picture_uri(Image.fromarray((colour * 255).astype(np.uint8)), "PNG")


def messages_html(lines: Sequence[str], problems: Sequence[str] = ()) -> str:
    """Messages and problems, with the visitor's text escaped."""
    paragraphs = [f'<p class="quiet">{html.escape(line)}</p>' for line in lines]
    paragraphs += [f'<p class="problem">{html.escape(line)}</p>' for line in problems]
    return f'<div class="messages">{"".join(paragraphs)}</div>'
