"""Annotated regions: COCO files, and the files of one image each that labelme and YOLO's tools write."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.convert.items import ANOMALOUS, Item, Outlines, Region, existing_file
from dataset.images import read_image
from utils.errors import UserError
from utils.reading import read_json, read_text, short_repr
from utils.schema import MayHoldMore, check

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Image(MayHoldMore):
    id: int | str
    file_name: str
    width: float | None = None
    height: float | None = None


@dataclass(frozen=True)
class _Runs(MayHoldMore):
    size: tuple[int, int]
    counts: list[int] | str


@dataclass(frozen=True)
class _Annotation(MayHoldMore):
    image_id: int | str
    category_id: int | str | None = None
    segmentation: _Runs | list[float] | list[list[float]] | None = None
    bbox: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class _Category(MayHoldMore):
    id: int | str
    name: str


@dataclass(frozen=True)
class _Coco(MayHoldMore):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category] | None = None


@dataclass(frozen=True)
class _Shape(MayHoldMore):
    label: str
    points: list[tuple[float, float]]
    shape_type: str = "polygon"


def read_coco(content: Mapping[str, Any], source: Path, root: Path, class_name: str) -> list[Item]:
    """The images of a COCO file, all of one class; paths are relative to `root`.

    Images with annotations are anomalous; the categories are the kinds of defects, or normal.
    """
    check(content, _Coco, source)
    kinds = {category["id"]: category["name"] for category in content.get("categories") or ()}
    annotations = defaultdict(list)
    for number, annotation in enumerate(content["annotations"]):
        annotations[annotation["image_id"]].append((annotation, f"{source}: annotations[{number}]"))
    ids = {image["id"] for image in content["images"]}
    if len(ids) < len(content["images"]):
        raise UserError(f"{source}: two of its images have the same id")
    if unknown := annotations.keys() - ids:
        raise UserError(f"{source}: the image_id {short_repr(unknown.pop())} of its annotations names no image")
    items = []
    for number, image in enumerate(content["images"]):
        path = existing_file(image["file_name"], f"{source}: images[{number}]", "file_name", root)
        width, height = image.get("width"), image.get("height")
        size = (int(width), int(height)) if width and height else None
        regions = (
            _coco_region(annotation, kinds.get(annotation.get("category_id"), ANOMALOUS), size, where)
            for annotation, where in annotations[image["id"]]
        )
        outlines = Outlines.of((region for region in regions if region.has_area), size)
        items.append(Item(path, int(bool(outlines.regions)), class_name, outlines.kind, outlines))
    return items


def _coco_region(annotation: Mapping[str, Any], kind: str, size: tuple[int, int] | None, where: str) -> Region:
    """The region of an annotation of an image of this size."""
    segmentation, box = annotation.get("segmentation"), annotation.get("bbox")
    if isinstance(segmentation, dict):
        counts, (height, width) = segmentation["counts"], segmentation["size"]
        runs = tuple(_decoded(counts) if isinstance(counts, str) else counts)
        if size != (width, height) or min(runs, default=-1) < 0 or sum(runs) != height * width:
            raise UserError(f"{where}: the counts of its segmentation, its size and that of the image do not fit")
        return Region(kind, runs=runs)
    if segmentation:
        polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
        if any(len(polygon) % 2 for polygon in polygons):
            raise UserError(f"{where}: a polygon of its segmentation has a point without y")
        return Region(kind, _without_stray_clicks(polygons, where))
    if box is None or min(box[2:]) < 0:
        raise UserError(f"{where}: has neither a segmentation nor a bbox of x, y, width and height")
    if min(box[2:]) == 0:
        logger.warning("%s: skipped a box of width or height 0", where)
        return Region(kind)
    return Region(kind, (_box(*box),))


def _decoded(counts: str) -> list[int]:
    """The run lengths of COCO's compressed text: five bits a character, from the fourth on as differences."""
    runs: list[int] = []
    value = shift = 0
    for bits in (ord(sign) - 48 for sign in counts):
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _without_stray_clicks(polygons: Sequence[Sequence[float]], where: object) -> tuple[tuple[float, ...], ...]:
    """The polygons with at least three points; a warning counts the others."""
    kept = tuple(tuple(polygon) for polygon in polygons if len(polygon) >= 6)
    if len(kept) < len(polygons):
        logger.warning("%s: skipped %d polygons with fewer than three points", where, len(polygons) - len(kept))
    return kept


def _box(left: float, top: float, width: float, height: float) -> tuple[float, ...]:
    """The polygon of a box; its outline is part of a polygon."""
    right, bottom = int(max(left, left + width - 1)), int(max(top, top + height - 1))
    left, top = int(left), int(top)
    return left, top, right, top, right, bottom, left, bottom


def read_outlines(file: Path, image: Path, kinds: Mapping[int, str]) -> Outlines | None:
    """The regions of an annotation file of one image; None if a JSON file is not labelme's. `kinds`: YOLO's classes."""
    if file.suffix.lower() == ".txt":
        return Outlines.of(_yolo_regions(file, image, kinds))
    content = read_json(file)
    if not isinstance(content, dict) or "shapes" not in content:
        return None
    check(content["shapes"], list[_Shape], file, "shapes")
    width, height = content.get("imageWidth"), content.get("imageHeight")
    regions = [_labelme_region(shape, file) for shape in content["shapes"]]
    return Outlines.of(regions, (width, height) if width and height else None)


def _labelme_region(shape: Mapping[str, Any], file: Path) -> Region:
    kind, points, shape_type = shape["label"], shape["points"], shape.get("shape_type") or "polygon"
    if shape_type == "rectangle" and len(points) == 2:
        (left, right), (top, bottom) = map(sorted, zip(*points, strict=True))
        return Region(kind, (_box(left, top, right - left, bottom - top),))
    if shape_type == "circle" and len(points) == 2:
        centre, edge = np.array(points)
        angles = np.linspace(0, 2 * np.pi, 64)
        circle = centre + np.linalg.norm(edge - centre) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return Region(kind, (tuple(circle.flatten().tolist()),))
    if shape_type in ("line", "linestrip", "point", "points", "mask"):
        logger.warning("%s: %s is a %s, which is not drawn in the mask", file, kind, shape_type)
        return Region(kind)
    return Region(kind, _without_stray_clicks([[value for point in points for value in point]], file))


def _yolo_regions(file: Path, image: Path, kinds: Mapping[int, str]) -> Iterator[Region]:
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
        points = tuple(value * size[i % 2] for i, value in enumerate(values[: len(values) // 2 * 2]))
        if len(points) == 4:
            x, y, width, height = points
            points = _box(x - width / 2, y - height / 2, width, height)
        yield Region(kinds.get(int(first), f"class_{int(first)}"), (points,))


def yolo_classes(files: Iterable[Path]) -> dict[int, str]:
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
