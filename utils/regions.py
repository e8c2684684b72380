"""Where in an image its anomaly map is high: regions, in pixels of the original image."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from utils.metrics import EIGHT_CONNECTED

# Of the map's maximum: from here on a pixel belongs to the worst region, where no threshold is known.
PEAK_SHARE = 0.5


class Region(NamedTuple):
    """Connected pixels of an image: the box that holds them, whose right and bottom lie outside, and their number."""

    left: int
    top: int
    right: int
    bottom: int
    area: int


def worst_region(anomaly_map: np.ndarray, size: tuple[int, int]) -> Region | None:
    """The region around the map's maximum (docs/testing.md, "Your own images"); None where nothing stands out.

    The map (h, w) is brought to the image's `size` (width, height), bilinear, as heatmaps are. The region is what
    touches the highest pixel, also by corners, among the pixels of at least half of the maximum. None for a maximum of
    0.
    """
    values = np.asarray(Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    peak = float(values.max())
    if not peak > 0:
        return None
    labels = ndimage.label(values >= PEAK_SHARE * peak, structure=EIGHT_CONNECTED)[0]
    inside = labels == labels.flat[values.argmax()]
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return Region(*map(int, box), int(inside.sum()))


def regions_of(mask: np.ndarray, anomaly_map: np.ndarray, size: tuple[int, int]) -> tuple[Region, ...]:
    """All regions of a mask, the one with the map's highest value first; none where the mask is empty.

    mask and map (h, w) lie over an image of `size` (width, height), to whose pixels boxes and areas are brought: a box
    holds its region whole, and no region is lost, however small the image.
    """
    labels, count = ndimage.label(mask, structure=EIGHT_CONNECTED)
    numbers = np.arange(1, count + 1)
    peaks = ndimage.maximum(anomaly_map, labels, numbers)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    across, down = size[0] / mask.shape[1], size[1] / mask.shape[0]
    found = []
    for index in np.argsort(-np.asarray(peaks), kind="stable"):
        rows, columns = ndimage.find_objects(labels)[index]
        first = (math.floor(columns.start * across), math.floor(rows.start * down))
        last = (math.ceil(columns.stop * across), math.ceil(rows.stop * down))
        found.append(Region(*first, *last, max(1, round(areas[index] * across * down))))
    return tuple(found)
