"""`report.html` of own images: a page, in one file, of heatmaps with the most anomalous image first.

Everything is inside the file, which loads nothing. Its script, a few lines, marks what a threshold would reject; the
page can be read without. Pictures wait in a temporary file and are written one by one, so that memory does not grow
with their number.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from engine.evaluation.pages import write_page
from utils.heatmaps import overlay
from utils.regions import Region
from utils.svg_charts import data_uri

TEMPLATE = Path(__file__).with_name("templates") / "gallery.html"
# Longer side of the pictures in the page, in pixels, and how well JPEG keeps them.
SIDE, QUALITY = 240, 78
# Bytes of pictures that stay in memory.
IN_MEMORY = 2**26
# Positions of the slider between the lowest and the highest score, at least.
STEPS = 200


class Place(NamedTuple):
    """Where a picture lies in the temporary file, in bytes, and its size in pixels."""

    start: int
    length: int
    width: int
    height: int


@dataclass(frozen=True)
class Entry:
    """An image on the page; decision: in a word, and rank: the share of normal images with a lower score; empty and
    None where there is no calibration."""

    path: str
    class_name: str
    score: float
    region: Region | None
    decision: str
    rank: float | None
    pictures: tuple[Place, Place]


class Scale(NamedTuple):
    """What a slider runs over, and with how many digits its values are shown."""

    low: float
    high: float
    step: float
    digits: int


class Gallery:
    """Images with what a model says of them, gathered one by one and then written as a page."""

    def __init__(self) -> None:
        self._pictures = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115
        self.entries: list[Entry] = []

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: object) -> None:
        self._pictures.close()

    def add(
        self,
        image: Image.Image,
        anomaly_map: np.ndarray,
        path: str,
        class_name: str,
        score: float,
        region: Region | None,
        decision: str = "",
        rank: float | None = None,
    ) -> None:
        """An image as it is and under its anomaly map (h, w), which shows the region's box; both kept small."""
        shown = image.convert("RGB")
        shown.thumbnail((SIDE, SIDE))
        heat = overlay(shown, anomaly_map)
        if region is not None:
            scale = (shown.width / image.width, shown.height / image.height)
            left, top, right, bottom = (value * scale[index % 2] for index, value in enumerate(region[:4]))
            box = (left, top, max(left, right - 1), max(top, bottom - 1))
            ImageDraw.Draw(heat).rectangle(box, outline="white")
        places = (self._keep(shown), self._keep(heat))
        self.entries.append(Entry(path, class_name, score, region, decision, rank, places))

    def write(
        self,
        path: Path,
        title: str,
        facts: Sequence[tuple[str, str]],
        problems: Sequence[str] = (),
        threshold: float | None = None,
    ) -> None:
        """Write the page, the highest scores first.

        facts: names and values above the images; problems: a line for each file that could not be read; threshold:
        where the slider begins, to the last digit until it is moved; without a calibration that is the highest score,
        above which nothing is.
        """
        ranked = sorted(self.entries, key=lambda entry: (-entry.score, entry.path))
        shown = [entry.score for entry in ranked]
        scale = scale_of(shown if threshold is None else [*shown, threshold])
        write_page(
            TEMPLATE,
            path,
            title=title,
            written=f"{datetime.now():%Y-%m-%d %H:%M}",
            facts_of_page=facts,
            problems=problems,
            scale=scale,
            threshold=scale.high if threshold is None else threshold,
            count=len(ranked),
            several_classes=len({entry.class_name for entry in ranked}) > 1,
            shown=self._shown(ranked),
        )

    def _keep(self, picture: Image.Image) -> Place:
        content = io.BytesIO()
        picture.save(content, format="JPEG", quality=QUALITY)
        start = self._pictures.tell()
        return Place(start, self._pictures.write(content.getvalue()), *picture.size)

    def _shown(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, list[tuple[str, str, Place]]]]:
        """Each entry with its pictures: what they show, their address, and their place."""
        for entry in entries:
            pictures = []
            for name, place in zip(("image", "heatmap"), entry.pictures, strict=True):
                self._pictures.seek(place.start)
                pictures.append((name, data_uri(self._pictures.read(place.length), "image/jpeg"), place))
            yield entry, pictures


def scale_of(scores: Sequence[float]) -> Scale:
    """A slider over all scores in round steps, so fine that close scores can be told apart."""
    low, high = min(scores), max(scores)
    digits = max(1, math.ceil(-math.log10(max(high - low, 1e-4) / STEPS)))
    step = 10.0**-digits
    return Scale(math.floor(low / step) * step, math.ceil(high / step) * step, step, digits)
