"""VisA's folders, and folders of normal and anomalous images."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from dataset.conventions import is_normal_name
from dataset.convert.arguments import ConversionArguments
from dataset.convert.items import Item
from dataset.folders import describe_folder, find_mask_folders, images_below, subfolders
from dataset.layouts import visa_records
from utils.errors import UserError
from utils.paths import is_folder

logger = logging.getLogger(__name__)


def read_visa(source: Path, classes: Sequence[str]) -> list[Item]:
    """The images of VisA's folders, with its split."""
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


def read_two_folders(arguments: ConversionArguments) -> list[Item]:
    """One folder of normal images, others of anomalous images, and masks that have the names of their images."""
    source = arguments.source
    others = [child for child in subfolders(source) if os.path.realpath(child) != os.path.realpath(arguments.target)]
    masks = find_mask_folders(others)
    others = [child for child in others if child not in masks]
    normal = [child for child in others if is_normal_name(child.name)]
    if arguments.normal:
        normal = [source / arguments.normal]
    anomalous = [source / arguments.anomalous] if arguments.anomalous else [c for c in others if c not in normal]
    for folder in (*normal, *anomalous):
        if not is_folder(folder):
            raise UserError(f"{folder}: no such folder")
    if not normal or not anomalous:
        raise UserError(
            f"{source} holds {describe_folder(source)}: expected a folder good, ok or "
            "normal and one of anomalous images (set with --normal and --anomalous), VisA's layout, or a "
            "list of images in JSON lines or COCO's format instead of a folder"
        )
    class_name = arguments.class_name or source.resolve().name or "object"
    items = [Item(image, 0, class_name) for folder in normal for image in _images(folder)]
    mask_of = {_stem(mask, folder): mask for folder in masks for mask in _images(folder)}
    for folder in anomalous:
        for image in _images(folder):
            parts = image.relative_to(folder).parts
            kind = parts[0] if len(anomalous) == 1 and len(parts) > 1 else folder.name
            stem = _stem(image, folder)
            mask = mask_of.get(f"{folder.name}/{stem}") or mask_of.get(stem)
            items.append(Item(image, 1, class_name, kind, mask))
    return items


def _images(folder: Path) -> list[Path]:
    content = images_below(folder)
    for problem in content.problems:
        logger.warning("skipped: %s", problem)
    return content.images


def _stem(path: Path, folder: Path) -> str:
    """What the paths of an image and its mask have in common: no ending, and no "_mask"."""
    return path.relative_to(folder).with_suffix("").as_posix().removesuffix("_mask")
