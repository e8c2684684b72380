"""COCO annotations: images with annotations are anomalous; the categories are the kinds of defects, or normal."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.convert.items import ANOMALOUS, Item, Outlines, Region, existing_file, without_stray_clicks
from utils.errors import UserError
from utils.reading import short_repr
from utils.schema import MayHoldMore, check

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Image(MayHoldMore):
    id: int | str
    file_name: str
    width: float | None = None
    height: float | None = None


@dataclass(frozen=True)
class _Annotation(MayHoldMore):
    image_id: int | str
    category_id: int | str | None = None
    segmentation: Any = None
    bbox: list[float] | None = None


@dataclass(frozen=True)
class _Runs(MayHoldMore):
    size: tuple[int, int]
    counts: list[int] | str


@dataclass(frozen=True)
class _Category(MayHoldMore):
    id: int | str
    name: str


@dataclass(frozen=True)
class _Coco(MayHoldMore):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category] | None = None


def read_coco(content: Mapping[str, Any], source: Path, root: Path, class_name: str) -> list[Item]:
    """The images of a COCO file, all of one class; paths are relative to `root`."""
    check(content, _Coco, source)
    names = {category["id"]: category["name"] for category in content.get("categories") or ()}
    annotations: dict[Any, list[tuple[str, Mapping[str, Any]]]] = {image["id"]: [] for image in content["images"]}
    if len(annotations) < len(content["images"]):
        raise UserError(f"{source}: two of its images have the same id")
    for number, annotation in enumerate(content["annotations"]):
        where = f"{source}: annotations[{number}]"
        if annotation["image_id"] not in annotations:
            raise UserError(f"{where}.image_id {short_repr(annotation['image_id'])} names no image")
        annotations[annotation["image_id"]].append((where, annotation))
    items = []
    for number, image in enumerate(content["images"]):
        path = existing_file(image["file_name"], f"{source}: images[{number}]", "file_name", root)
        width, height = image.get("width"), image.get("height")
        size = (int(width), int(height)) if width and height else None
        regions = [
            _region(annotation, names.get(annotation.get("category_id"), ANOMALOUS), size, where)
            for where, annotation in annotations[image["id"]]
        ]
        outlines = Outlines.of(filter(None, regions), size)
        items.append(Item(path, int(bool(outlines.regions)), class_name, outlines.kind, outlines))
    return items


def _region(annotation: Mapping[str, Any], kind: str, size: tuple[int, int] | None, where: str) -> Region | None:
    """The region of an annotation of an image of this size; None for a stray click."""
    segmentation, box = annotation.get("segmentation"), annotation.get("bbox")
    if isinstance(segmentation, dict):
        check(segmentation, _Runs, where, "segmentation")
        counts, (height, width) = segmentation["counts"], segmentation["size"]
        runs = tuple(_decoded(counts) if isinstance(counts, str) else counts)
        if size != (width, height) or min(runs, default=-1) < 0 or sum(runs) != height * width:
            raise UserError(f"{where}: the counts of its segmentation, its size and that of the image do not fit")
        return Region(kind, runs=runs) if any(runs[1::2]) else None
    if segmentation:
        if isinstance(segmentation, list) and not isinstance(segmentation[0], list):
            segmentation = [segmentation]
        check(segmentation, list[list[float]], where, "segmentation")
        if any(len(polygon) % 2 for polygon in segmentation):
            raise UserError(f"{where}: a polygon of its segmentation has a point without y")
        polygons = without_stray_clicks(segmentation, where)
        return Region(kind, polygons) if polygons else None
    if box is None or len(box) != 4 or min(box[2:]) < 0:
        raise UserError(f"{where}: has neither a segmentation nor a bbox of x, y, width and height")
    if min(box[2:]) == 0:
        logger.warning("%s: skipped a box of width or height 0", where)
        return None
    return Region(kind, boxes=(tuple(box),))


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
