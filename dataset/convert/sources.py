"""Recognise a source and list its images."""

from __future__ import annotations

from dataset.convert.arguments import ConversionArguments
from dataset.convert.coco import read_coco
from dataset.convert.image_folders import read_two_folders, read_visa
from dataset.convert.items import Item
from dataset.convert.lists import read_list
from dataset.folders import subfolders
from dataset.layouts import test_folder, visa_classes
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
    if arguments.normal or arguments.anomalous:
        return "two folders", read_two_folders(arguments)
    children = [child.name for child in subfolders(source)]
    if classes := visa_classes(source, children):
        return "VisA's layout", read_visa(source, classes)
    if test_folder(source) or any(test_folder(source / name) for name in children):
        raise UserError(f"{source} is in MVTec's layout already: use it as --dataset")
    return "two folders", read_two_folders(arguments)


def _read_file(arguments: ConversionArguments) -> tuple[str, list[Item]]:
    source, class_name = arguments.source, arguments.class_name
    if arguments.normal or arguments.anomalous:
        raise UserError("--normal and --anomalous are for a folder of folders: leave them out")
    text = read_text(source, "the list")
    try:
        content = parse_json(text, source)
    except UserError:
        content = None  # JSON lines, or damaged: then the first bad line is reported
    root = arguments.images or source.parent
    if isinstance(content, dict) and "images" in content:
        return "COCO annotations", read_coco(content, source, root, class_name or "object")
    return "a list", read_list(content, source, root, class_name)
