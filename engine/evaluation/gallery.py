"""`report.html` of `inference.py --image`: one self-contained page of heatmaps, the most anomalous image first.

A short script marks the images above a threshold. Pictures are kept in a temporary file, so that memory does not grow
with their number.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from engine.evaluation.pages import write_page
from utils.heatmaps import overlay
from utils.regions import Region, draw_box
from utils.svg_charts import picture_uri

TEMPLATE = Path(__file__).with_name("templates") / "gallery.html"
# Longer side of the pictures in pixels, and JPEG quality.
SIDE, QUALITY = 240, 78
# Bytes of pictures kept in memory.
IN_MEMORY = 2**26
# Minimum number of slider positions between the lowest and the highest score.
STEPS = 200


@dataclass(frozen=True)
class Finding:
    """The result for one image: score in [0, 1], and the most anomalous region in pixels of the original image.

    Empty or None without a calibration: decision, "anomalous" or "normal"; rank, the share of normal images with a
    lower score; regions, the number of regions above the pixel threshold.
    """

    path: Path
    class_name: str
    score: float
    region: Region | None
    decision: str = ""
    rank: float | None = None
    regions: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row of a table of scores, None where there is no value."""
        region = self.region or [None] * len(Region._fields)
        return {
            "path": self.path.as_posix(),
            "class_name": self.class_name,
            "score": float(f"{self.score:.9g}"),
            "decision": self.decision or None,
            "rank": None if self.rank is None else round(self.rank, 6),
            "regions": self.regions,
            **{f"region_{name}": value for name, value in zip(Region._fields, region, strict=True)},
        }


class Scale(NamedTuple):
    """The range of the slider, and the decimals of its values."""

    low: float
    high: float
    step: float
    digits: int


class Gallery:
    """Images with their results, added one by one and then written as a page."""

    def __init__(self) -> None:
        self._pictures = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115
        # With the place of each image's pictures in the temporary file.
        self.images: list[tuple[Finding, str, int]] = []

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: object) -> None:
        self._pictures.close()

    def add(
        self, image: Image.Image, anomaly_map: np.ndarray, finding: Finding, name: str, size: tuple[int, int]
    ) -> None:
        """Add an image, called `name`, and its heatmap, from an anomaly map (h, w), with a box around the region.

        size: (width, height) that the region refers to.
        """
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        heat = overlay(small, anomaly_map)
        if finding.region is not None:
            draw_box(heat, finding.region, size)
        self.images.append((finding, name, self._pictures.tell()))
        pictures = [(picture_uri(picture, quality=QUALITY), picture.size) for picture in (small, heat)]
        self._pictures.write(json.dumps(pictures).encode("ascii") + b"\n")

    def write(
        self, path: Path, title: str, facts: Sequence[tuple[str, str]], problems: Sequence[str], threshold: float | None
    ) -> None:
        """Write the page, the highest scores first.

        facts: names and values above the images; problems: a line for each file that could not be read; threshold:
        initial value of the slider; None for the highest score.
        """
        ranked = sorted(self.images, key=lambda image: (-image[0].score, image[1]))
        scores = [finding.score for finding, *_ in ranked]
        scale = scale_of(scores if threshold is None else [*scores, threshold])
        write_page(
            TEMPLATE,
            path,
            title=title,
            facts_of_page=facts,
            problems=problems,
            scale=scale,
            threshold=scale.high if threshold is None else threshold,
            count=len(ranked),
            several_classes=len({finding.class_name for finding, *_ in ranked}) > 1,
            images=self._with_pictures(ranked),
        )

    def _with_pictures(self, images: Iterable[tuple[Finding, str, int]]) -> Iterator[tuple[Finding, str, Any]]:
        """Each image with the data URI and size of its two pictures."""
        for finding, name, place in images:
            self._pictures.seek(place)
            yield finding, name, json.loads(self._pictures.readline())


def scale_of(scores: Sequence[float]) -> Scale:
    """A slider over all scores, with decimal steps small enough to separate close scores."""
    low, high = min(scores), max(scores)
    digits = max(1, math.ceil(-math.log10(max(high - low, 1e-4) / STEPS)))
    step = 10.0**-digits
    return Scale(math.floor(low / step) * step, math.ceil(high / step) * step, step, digits)
