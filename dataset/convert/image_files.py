"""Annotation files of one image each, as labelme and YOLO's tools write them next to images or in a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.convert.items import Outlines, Region, without_stray_clicks
from dataset.images import read_image
from utils.errors import UserError
from utils.reading import read_json, read_text
from utils.schema import MayHoldMore, check

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".txt")


@dataclass(frozen=True)
class _Shape(MayHoldMore):
    label: str
    points: list[tuple[float, float]]
    shape_type: str = "polygon"


def read_outlines(file: Path, image: Path, names: Mapping[int, str]) -> Outlines | None:
    """The regions of an annotation file; None if a JSON file is not labelme's. `names`: YOLO's classes."""
    if file.suffix.lower() == ".txt":
        return Outlines.of(_yolo_regions(file, image, names))
    content = read_json(file)
    if not isinstance(content, dict) or "shapes" not in content:
        return None
    check(content["shapes"], list[_Shape], file, "shapes")
    width, height = content.get("imageWidth"), content.get("imageHeight")
    regions = (_labelme_region(shape, file) for shape in content["shapes"])
    return Outlines.of(regions, (width, height) if width and height else None)


def _labelme_region(shape: Mapping, file: Path) -> Region:
    """The region of a shape; lines and points have no area, but mean that the image is anomalous."""
    kind, points, shape_type = shape["label"], shape["points"], shape.get("shape_type") or "polygon"
    if shape_type == "rectangle" and len(points) == 2:
        (left, right), (top, bottom) = map(sorted, zip(*points, strict=True))
        return Region(kind, boxes=((left, top, right - left, bottom - top),))
    if shape_type == "circle" and len(points) == 2:
        centre, edge = np.array(points)
        angles = np.linspace(0, 2 * np.pi, 64)
        circle = centre + np.linalg.norm(edge - centre) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return Region(kind, polygons=(tuple(circle.flatten().tolist()),))
    if shape_type in ("line", "linestrip", "point", "points", "mask"):
        logger.warning("%s: %s is a %s, which is not drawn in the mask", file, kind, shape_type)
        return Region(kind)
    return Region(kind, without_stray_clicks([[value for point in points for value in point]], str(file)))


def _yolo_regions(file: Path, image: Path, names: Mapping[int, str]) -> Iterable[Region]:
    """The boxes and polygons of a file of YOLO; one more number at the end of a line is a confidence."""
    size = read_image(image).size
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            first, *values = map(float, line.split())
        except ValueError:
            first, values = 0, []
        if len(values) < 4 or first != int(first) or not all(-0.01 <= value <= 1.01 for value in values):
            raise UserError(
                f"{file}:{number}: expected a class of YOLO and a box or polygon as shares of the image; move other "
                "text files that are named like images elsewhere"
            )
        kind = names.get(int(first), f"class_{int(first)}")
        points = tuple(value * size[i % 2] for i, value in enumerate(values[: len(values) // 2 * 2]))
        if len(points) > 4:
            yield Region(kind, polygons=(points,))
        else:
            x, y, width, height = points
            yield Region(kind, boxes=((x - width / 2, y - height / 2, width, height),))


def class_names(files: Iterable[Path]) -> dict[int, str]:
    """The classes of YOLO in classes.txt, or under `names` in a YAML file."""
    for file in files:
        if file.name == "classes.txt":
            return dict(enumerate(read_text(file).splitlines()))
        if file.suffix in (".yaml", ".yml"):
            import yaml

            try:
                names = yaml.safe_load(read_text(file))["names"]
                return dict(names if isinstance(names, dict) else enumerate(names))
            except (yaml.YAMLError, LookupError, TypeError, ValueError):
                logger.warning("%s: no list of class names under 'names'", file)
    return {}
