"""Where in an image its anomaly map is highest: the worst region, in pixels of the original image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from utils.metrics import EIGHT_CONNECTED

# Of the map's maximum: from here on a pixel belongs to the worst region, where no threshold is given.
PEAK_SHARE = 0.5


class Region(NamedTuple):
    """Connected pixels of an image: the box that holds them, whose right and bottom lie outside, and their number."""

    left: int
    top: int
    right: int
    bottom: int
    area: int


def worst_region(anomaly_map: np.ndarray, size: tuple[int, int], threshold: float | None = None) -> Region | None:
    """The region around the map's maximum (docs/testing.md, "Your own images"); None where nothing stands out.

    The map (h, w) is brought to the image's `size` (width, height), bilinear, as heatmaps are. The region is what
    touches the highest pixel, also by corners, among the pixels of at least `threshold`: without one, half of the
    maximum. None for a maximum of 0, or one below the threshold.
    """
    values = np.asarray(Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    peak = float(values.max())
    least = PEAK_SHARE * peak if threshold is None else threshold
    if not 0 < peak >= least:
        return None
    labels = ndimage.label(values >= least, structure=EIGHT_CONNECTED)[0]
    inside = labels == labels.flat[values.argmax()]
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return Region(*map(int, box), int(inside.sum()))
