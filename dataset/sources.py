"""What people have in place of MVTec's layout: lists in JSON, COCO annotations, VisA's folders, two folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from dataset.folders import describe_folder, find_folder, images_below, same_name, subfolders
from dataset.images import read_image
from dataset.layouts import visa_classes, visa_records
from dataset.metadata import parse_label
from utils.errors import UserError
from utils.paths import is_file, is_folder
from utils.reading import parse_json, read_json_lines, read_text, short_repr
from utils.schema import MayHoldMore, check

logger = logging.getLogger(__name__)

NORMAL_NAMES = ("good", "ok", "normal")
_MASK_NAMES = ("mask", "masks", "ground_truth", "label", "labels")
# What a defect is called that has no name.
ANOMALOUS = "anomalous"
# A line's keys in lists that people have, the usual one first.
_KEYS = {
    "image": ("image_path", "img_path", "image", "filename", "file_name", "path"),
    "label": ("label", "anomaly", "is_anomaly", "anomalous"),
    "class": ("class_name", "cls_name", "clsname", "class", "category", "object"),
    "mask": ("mask_path", "mask", "maskname", "mask_name"),
    "kind": ("specie_name", "label_name", "defect_type", "defect"),
    "split": ("split", "phase"),
}
_LABEL_WORDS = {
    **dict.fromkeys(NORMAL_NAMES, 0),
    **dict.fromkeys(("anomaly", "anomalous", "abnormal", "bad", "ng", "defect", "defective"), 1),
}


@dataclass(frozen=True)
class Outlines:
    """Where an image is anomalous, in its pixels: polygons as x, y, x, y..., and boxes as left, top, width, height.

    size: the width and height of the image that they were drawn on, where the file says it.
    """

    polygons: tuple[tuple[float, ...], ...]
    boxes: tuple[tuple[float, ...], ...]
    size: tuple[int, int] | None

    def draw(self, image: Path) -> Image.Image:
        """The mask, mode "L", in the size in which the image is shown; `UserError` where it fits no such image."""
        with read_image(image) as turned:
            size = turned.size
        with Image.open(image) as stored:
            stored_size, exif = stored.size, stored.getexif()
        drawn_on = self.size or size
        if drawn_on not in (size, stored_size):
            raise UserError(
                f"{image} is {size[0]} x {size[1]}, but its annotations were made on {drawn_on[0]} x {drawn_on[1]}"
            )
        mask = Image.new("L", drawn_on)
        pen = ImageDraw.Draw(mask)
        for polygon in self.polygons:
            pen.polygon(polygon, fill=255)
        for left, top, width, height in self.boxes:
            pen.rectangle((left, top, max(left, left + width - 1), max(top, top + height - 1)), fill=255)
        if mask.getbbox() is None:
            raise UserError(f"the annotations of {image} lie outside of it")
        if drawn_on != size:  # drawn before the camera's rotation was applied
            mask.getexif().update(exif)
            mask = ImageOps.exif_transpose(mask)
        return mask


@dataclass(frozen=True)
class Item:
    """One image of a source: its file, what it shows, its kind of defect, where it is anomalous, and its split."""

    image: Path
    label: int
    class_name: str
    kind: str = ANOMALOUS
    mask: Path | Outlines | None = None
    split: str = "test"


@dataclass(frozen=True)
class Asked:
    """What is said of a source beside its place; None is what was not said. target: a folder that is no part of it."""

    images: Path | None = None
    class_name: str | None = None
    normal: Path | None = None
    anomalous: Path | None = None
    target: Path | None = None


def read_source(source: Path, asked: Asked) -> tuple[str, list[Item]]:
    """What a source is, in words, and its images in order; `UserError` for one that is not understood."""
    if is_file(source):
        return _read_file(source, asked)
    if not is_folder(source):
        raise UserError(f"{source}: no such file or folder")
    if asked.images is not None:
        raise UserError("--images is for a list or COCO file: leave it out")
    if asked.normal or asked.anomalous:
        return "two folders", _two_folders(source, asked)
    classes = [child.name for child in subfolders(source)]
    if found := visa_classes(source, classes):
        return "VisA's layout", _visa(source, found)
    if find_folder(source, "test") or any(find_folder(source / name, "test") for name in classes):
        raise UserError(f"{source} is in MVTec's layout already: give it as --dataset")
    return "two folders", _two_folders(source, asked)


def _read_file(source: Path, asked: Asked) -> tuple[str, list[Item]]:
    if asked.normal or asked.anomalous:
        raise UserError("--normal and --anomalous are for a folder of folders: leave them out")
    try:
        whole = parse_json(read_text(source, "the list"), source)
    except UserError:
        whole = None  # JSON lines, or damaged: then the first bad line is named
    root = asked.images or source.parent
    if isinstance(whole, dict) and "images" in whole:
        return "COCO annotations", _coco(whole, source, root, asked.class_name)
    if isinstance(whole, dict) and whole and all(isinstance(part, dict) for part in whole.values()):
        rows = _rows_of_meta(whole, source)
    elif isinstance(whole, list):
        rows = ((f"{source}: image {number}", row) for number, row in enumerate(whole, start=1))
    else:
        rows = read_json_lines(source, name="the list")
    return "a list", [_item(row, where, root, asked.class_name) for where, row in rows if not _is_tie(row)]


def _is_tie(row: Any) -> bool:
    """Whether a line is the first one of a list that this project keeps, which names no image."""
    return isinstance(row, dict) and "schema" in row and "dataset" in row


def _rows_of_meta(whole: Mapping[str, Any], source: Path) -> Iterator[tuple[str, Any]]:
    """The images of a `meta.json`: {"train": {CLASS: [...]}, "test": {CLASS: [...]}}."""
    for split, classes in whole.items():
        for class_name, rows in classes.items():
            if not isinstance(rows, list):
                raise UserError(f"{source}: {short_repr(split)}, {short_repr(class_name)} must be a list of images")
            for number, row in enumerate(rows, start=1):
                where = f"{source}: {split}, {class_name}, image {number}"
                yield where, {"split": split, "class_name": class_name, **row} if isinstance(row, dict) else row


def _item(row: Any, where: str, root: Path, class_name: str | None) -> Item:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object with image_path, label, class_name and mask_path")
    found = {name: next((row[key] for key in keys if key in row), None) for name, keys in _KEYS.items()}
    image = _file(found["image"], where, "image_path", root)
    word = found["label"].strip().lower() if isinstance(found["label"], str) else None
    label = _LABEL_WORDS[word] if word in _LABEL_WORDS else parse_label(found["label"], where)
    named = found["class"] if found["class"] is not None else class_name
    if not isinstance(named, str) or not named.strip():
        raise UserError(f"{where}: class_name must be a non-empty text, not {short_repr(named)} (or --class_name)")
    mask = _file(found["mask"], where, "mask_path", root) if label and found["mask"] not in (None, "") else None
    split = "train" if str(found["split"]).lower() == "train" else "test"
    kind = found["kind"] if isinstance(found["kind"], str) else _kind_by_folder(str(found["image"]))
    return Item(image, label, named, kind, mask, split)


def _kind_by_folder(path: str) -> str:
    """The kind of defect that a path in MVTec's layout tells."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return parts[-2] if len(parts) > 2 and parts[-3].lower() == "test" else ANOMALOUS


def _file(value: Any, where: str, key: str, root: Path) -> Path:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{where}: {key} must be the path of a file, not {short_repr(value)}")
    path = root / value.strip().replace("\\", "/")
    if not is_file(path):
        raise UserError(f"{where}: {key}: {path} is not there (--images gives the folder that paths are relative to)")
    return path


@dataclass(frozen=True)
class CocoImage(MayHoldMore):
    id: int | str
    file_name: str
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class CocoAnnotation(MayHoldMore):
    image_id: int | str
    category_id: int | str | None = None
    segmentation: Any = None
    bbox: list[float] | None = None


@dataclass(frozen=True)
class CocoCategory(MayHoldMore):
    id: int | str
    name: str


@dataclass(frozen=True)
class Coco(MayHoldMore):
    images: list[CocoImage]
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory] | None = None


def _coco(whole: Mapping[str, Any], source: Path, root: Path, class_name: str | None) -> list[Item]:
    """Images with annotations are anomalous where these are; the categories name the kinds of defects."""
    check(whole, Coco, source)
    names = {category["id"]: category["name"] for category in whole.get("categories") or ()}
    annotations: dict[Any, list[Mapping[str, Any]]] = {image["id"]: [] for image in whole["images"]}
    if len(annotations) < len(whole["images"]):
        raise UserError(f"{source}: two of its images have the same id")
    for number, annotation in enumerate(whole["annotations"]):
        if annotation["image_id"] not in annotations:
            raise UserError(
                f"{source}: annotations[{number}].image_id {short_repr(annotation['image_id'])} names no image"
            )
        annotations[annotation["image_id"]].append({**annotation, "where": f"{source}: annotations[{number}]"})
    items = []
    for number, image in enumerate(whole["images"]):
        path = _file(image["file_name"], f"{source}: images[{number}]", "file_name", root)
        found = annotations[image["id"]]
        kinds = list(dict.fromkeys(names.get(annotation.get("category_id"), ANOMALOUS) for annotation in found))
        size = (image.get("width"), image.get("height"))
        outlines = _outlines(found, None if None in size else size) if found else None
        kind = kinds[0] if len(kinds) == 1 else "combined"
        items.append(Item(path, int(bool(found)), class_name or "object", kind, outlines))
    return items


def _outlines(annotations: Sequence[Mapping[str, Any]], size: tuple[int, int] | None) -> Outlines:
    polygons: list[tuple[float, ...]] = []
    boxes: list[tuple[float, ...]] = []
    for annotation in annotations:
        where, drawn, box = annotation["where"], annotation.get("segmentation"), annotation.get("bbox")
        if isinstance(drawn, (dict, str)):
            raise UserError(f"{where}: its segmentation is run-length encoded, which is not read: export polygons")
        if drawn:
            drawn = [drawn] if not isinstance(drawn, list) or not isinstance(drawn[0], list) else drawn
            check(drawn, list[list[float]], where, "segmentation")
            if any(len(polygon) < 6 or len(polygon) % 2 for polygon in drawn):
                raise UserError(f"{where}: a polygon of its segmentation has no three points")
            polygons += map(tuple, drawn)
        elif box is not None and len(box) == 4 and box[2] > 0 and box[3] > 0:
            boxes.append(tuple(box))
        else:
            raise UserError(f"{where}: has neither polygons nor a bbox of x, y, width and height")
    return Outlines(tuple(polygons), tuple(boxes), size)


def _visa(source: Path, classes: Sequence[str]) -> list[Item]:
    return [
        Item(
            source / record.image_path,
            record.label,
            record.class_name,
            "bad",
            None if record.mask_path is None else source / record.mask_path,
            split,
        )
        for split in ("train", "test")
        for record in visa_records(source, classes, split)
    ]


def _two_folders(source: Path, asked: Asked) -> list[Item]:
    """One folder of normal images, others of anomalous ones, and masks by the images' names where there are some."""
    others = [child for child in subfolders(source) if asked.target is None or not _same(child, asked.target)]
    masks = [child for child in others if any(same_name(child.name, name) for name in _MASK_NAMES)]
    others = [child for child in others if child not in masks]
    normal = [source / asked.normal] if asked.normal else [c for c in others if c.name.lower() in NORMAL_NAMES]
    anomalous = [source / asked.anomalous] if asked.anomalous else [c for c in others if c not in normal]
    for folder in (*normal, *anomalous):
        if not is_folder(folder):
            raise UserError(f"{folder}: no such folder")
    if not normal or not anomalous:
        raise UserError(
            f"{source} holds {describe_folder(source)}: expected a folder {', '.join(NORMAL_NAMES[:-1])} or "
            f"{NORMAL_NAMES[-1]} and one of anomalous images (--normal and --anomalous name them), VisA's layout, or a "
            "list of images in JSON lines or COCO's form in place of a folder"
        )
    class_name = asked.class_name or source.resolve().name or "object"
    items = [Item(image, 0, class_name) for folder in normal for image in _images(folder)]
    mask_of = {_stem(mask, folder): mask for folder in masks for mask in _images(folder)}
    for folder in anomalous:
        for image in _images(folder):
            inside = image.relative_to(folder).parts
            kind = inside[0] if len(anomalous) == 1 and len(inside) > 1 else folder.name
            stem = _stem(image, folder)
            mask = mask_of.get(f"{folder.name}/{stem}") or mask_of.get(stem)
            items.append(Item(image, 1, class_name, kind, mask))
    return items


def _images(folder: Path) -> list[Path]:
    found = images_below(folder)
    for line in found.problems:
        logger.warning("left out: %s", line)
    return found.images


def _stem(path: Path, folder: Path) -> str:
    """What an image and its mask share: the path in their folders, without ending and "_mask"."""
    return path.relative_to(folder).with_suffix("").as_posix().removesuffix("_mask")


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
