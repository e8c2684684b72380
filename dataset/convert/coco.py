"""COCO annotations: images with annotations are anomalous; the categories are the kinds of defects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.convert.items import ANOMALOUS, Item, Outlines, existing_file
from utils.errors import UserError
from utils.reading import short_repr
from utils.schema import MayHoldMore, check


@dataclass(frozen=True)
class _Image(MayHoldMore):
    id: int | str
    file_name: str
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class _Annotation(MayHoldMore):
    image_id: int | str
    category_id: int | str | None = None
    segmentation: Any = None
    bbox: list[float] | None = None


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
    annotations: dict[Any, list[Mapping[str, Any]]] = {image["id"]: [] for image in content["images"]}
    if len(annotations) < len(content["images"]):
        raise UserError(f"{source}: two of its images have the same id")
    for number, annotation in enumerate(content["annotations"]):
        where = f"{source}: annotations[{number}]"
        if annotation["image_id"] not in annotations:
            raise UserError(f"{where}.image_id {short_repr(annotation['image_id'])} names no image")
        annotations[annotation["image_id"]].append({**annotation, "where": where})
    items = []
    for number, image in enumerate(content["images"]):
        path = existing_file(image["file_name"], f"{source}: images[{number}]", "file_name", root)
        own = annotations[image["id"]]
        kinds = list(dict.fromkeys(names.get(annotation.get("category_id"), ANOMALOUS) for annotation in own))
        size = (image.get("width"), image.get("height"))
        outlines = _outlines(own, None if None in size else size) if own else None
        items.append(Item(path, int(bool(own)), class_name, kinds[0] if len(kinds) == 1 else "combined", outlines))
    return items


def _outlines(annotations: Sequence[Mapping[str, Any]], size: tuple[int, int] | None) -> Outlines:
    polygons: list[tuple[float, ...]] = []
    boxes: list[tuple[float, ...]] = []
    for annotation in annotations:
        where, segmentation, box = annotation["where"], annotation.get("segmentation"), annotation.get("bbox")
        if isinstance(segmentation, (dict, str)):
            raise UserError(f"{where}: run-length encoded segmentations are not supported: export polygons")
        if segmentation:
            if not isinstance(segmentation, list) or not isinstance(segmentation[0], list):
                segmentation = [segmentation]
            check(segmentation, list[list[float]], where, "segmentation")
            if any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
                raise UserError(f"{where}: a polygon of its segmentation has no three points")
            polygons += map(tuple, segmentation)
        elif box is not None and len(box) == 4 and box[2] > 0 and box[3] > 0:
            boxes.append(tuple(box))
        else:
            raise UserError(f"{where}: has neither polygons nor a bbox of x, y, width and height")
    return Outlines(tuple(polygons), tuple(boxes), size)
