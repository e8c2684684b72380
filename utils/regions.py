"""Regions of an image in which its anomaly map is high, in pixels of the original image."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

EIGHT_CONNECTED = np.ones((3, 3), dtype=int)

# Share of the map's maximum above which a pixel belongs to the worst region, without a calibrated threshold.
PEAK_SHARE = 0.5


class Region(NamedTuple):
    """Connected pixels of an image: their bounding box (right and bottom exclusive) and their number."""

    left: int
    top: int
    right: int
    bottom: int
    area: int


def draw_box(picture: Image.Image, region: Region, size: tuple[int, int], width: int = 1) -> None:
    """Draw the box of a region of an image of `size` (width, height) on a smaller picture of that image."""
    across, down = picture.width / size[0], picture.height / size[1]
    left, top = region.left * across, region.top * down
    box = (left, top, max(left, region.right * across - 1), max(top, region.bottom * down - 1))
    ImageDraw.Draw(picture).rectangle(box, outline="white", width=width)


def worst_region(anomaly_map: np.ndarray, size: tuple[int, int]) -> Region | None:
    """The region around the map's maximum (docs/testing.md, "Your own images").

    It consists of the pixels that are connected with the maximum, also by corners, among those of at least half of it.

    Args:
        anomaly_map: The map (h, w), resized bilinearly to the image, as heatmaps are.
        size: Width and height of the image.

    Returns:
        The region; None if the maximum is 0.
    """
    values = np.asarray(Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    peak = float(values.max())
    if not peak > 0:
        return None
    labels = ndimage.label(values >= PEAK_SHARE * peak, structure=EIGHT_CONNECTED)[0]
    inside = labels == labels.flat[values.argmax()]
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    left, top, right, bottom = (int(edge) for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return Region(left, top, right, bottom, int(inside.sum()))


def regions_of(mask: np.ndarray, anomaly_map: np.ndarray, size: tuple[int, int]) -> tuple[Region, ...]:
    """All regions of a mask.

    Args:
        mask: The mask (h, w).
        anomaly_map: The map (h, w), which orders the regions.
        size: Width and height of the image over which mask and map lie.

    Returns:
        The regions in pixels of the image, the one with the map's highest value first. A box contains its whole region,
        and every region has at least one pixel.
    """
    labels, count = ndimage.label(mask, structure=EIGHT_CONNECTED)
    numbers = np.arange(1, count + 1)
    peaks = ndimage.maximum(anomaly_map, labels, numbers)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    across, down = size[0] / mask.shape[1], size[1] / mask.shape[0]
    regions = []
    for index in np.argsort(-np.asarray(peaks), kind="stable"):
        rows, columns = ndimage.find_objects(labels)[index]
        left, top = math.floor(columns.start * across), math.floor(rows.start * down)
        right, bottom = math.ceil(columns.stop * across), math.ceil(rows.stop * down)
        regions.append(Region(left, top, right, bottom, max(1, round(areas[index] * across * down))))
    return tuple(regions)
