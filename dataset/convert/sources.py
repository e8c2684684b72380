"""Recognise a source and list its images."""

from __future__ import annotations

from pathlib import Path

from dataset.conventions import is_normal_name
from dataset.convert.arguments import ConversionArguments
from dataset.convert.coco import read_coco
from dataset.convert.image_folders import read_folder, read_visa
from dataset.convert.items import Item
from dataset.convert.lists import TABLES, read_list, read_table, rows_of
from dataset.folders import images_in, subfolders
from dataset.layouts import image_folder, test_folder, visa_classes
from utils.errors import UserError
from utils.paths import is_file, is_folder
from utils.reading import parse_json, read_text


def read_source(arguments: ConversionArguments) -> tuple[str, list[Item]]:
    """The kind of a source, for messages, and its images in order; `UserError` for an unknown kind."""
    source = arguments.source
    if is_file(source):
        return _read_file(arguments)
    if not is_folder(source):
        raise UserError(f"{source}: no such file or folder")
    if arguments.images is not None:
        raise UserError("--images is for a list or COCO file: leave it out")
    if not (arguments.normal or arguments.anomalous or arguments.masks):
        if classes := visa_classes(source, [child.name for child in subfolders(source)]):
            return "VisA's layout", read_visa(source, classes)
        if folder := _in_mvtec_layout(source):
            raise UserError(f"{folder} is in MVTec's layout already: use --dataset {folder}")
    return "a folder of images", read_folder(arguments)


def _in_mvtec_layout(folder: Path) -> Path | None:
    """The folder with classes in MVTec's layout that have normal test images, also if others contain only this one."""
    while True:
        children = subfolders(folder)
        kinds = [kind for child in (folder, *children) for kind in subfolders(test_folder(child))]
        if any(is_normal_name(kind.name) and images_in(image_folder(kind)) for kind in kinds):
            return folder
        if len(children) != 1:
            return None
        folder = children[0]


def _read_file(arguments: ConversionArguments) -> tuple[str, list[Item]]:
    source, root = arguments.source, arguments.images or arguments.source.parent
    if arguments.anomalous or arguments.masks:
        raise UserError("--anomalous and --masks are for a folder: leave them out")
    if source.suffix.lower() in TABLES:
        return "a list", read_list(read_table(source), root, arguments)
    text = read_text(source, "the list")
    try:
        content = parse_json(text, source)
    except UserError:
        content = None  # JSON lines, or damaged: then the first bad line is reported
    if isinstance(content, dict) and "images" in content:
        return "COCO annotations", read_coco(content, source, root, arguments.class_name or "object")
    if isinstance(content, dict) and "shapes" in content:
        raise UserError(f"{source} is labelme's file of one image: convert its folder")
    if isinstance(content, dict) and isinstance(content.get("meta"), dict):  # Real-IAD
        root /= str(content.pop("meta").get("prefix", ""))
    return "a list", read_list(rows_of(content, source), root, arguments)
