"""Folders of images whose labels follow from folder names, masks, or the files of an annotation tool."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dataset.conventions import IMAGE_FOLDER_NAMES, folder_word, is_anomalous_name, is_normal_name
from dataset.convert.arguments import ConversionArguments
from dataset.convert.image_files import SUFFIXES, class_names, read_outlines
from dataset.convert.items import ANOMALOUS, Item, Outlines
from dataset.convert.lists import TABLES
from dataset.folders import (
    FoundImages,
    describe_folder,
    files_below,
    images_below,
    is_called,
    is_image,
    skip_reason,
    skipped_note,
)
from dataset.images import read_mask
from dataset.layouts import visa_records
from dataset.masks import group_masks, grouped, pair_in_folders
from utils.errors import UserError
from utils.text import list_names

logger = logging.getLogger(__name__)

LISTS = (".json", ".jsonl", *TABLES)
# Folders of annotation files.
TOOLS = ("json", "txt", "labelme", "yolo")
_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})


def read_visa(source: Path, classes: Sequence[str]) -> list[Item]:
    """The images of VisA's folders, with its split."""
    rows = ((row, split) for split in ("train", "test") for row in visa_records(source, classes, split))
    return [
        Item(source / r.image_path, r.label, r.class_name, "bad", source / r.mask_path if r.mask_path else None, split)
        for r, split in rows
    ]


def read_folder(arguments: ConversionArguments) -> list[Item]:
    """The images in a folder and below.

    The innermost folder with a telling name decides whether an image is normal. If there are normal folders, all other
    images are anomalous; otherwise those with an annotated region, or with a mask that has an anomalous pixel.
    """
    source = arguments.source
    found, files = _content(arguments)
    labels = {image: _label_of(image, arguments) for image in found.images}
    has_normal = 0 in labels.values()
    annotations = _annotations(source, found.images, files)
    groups = group_masks(source, found.mask_folders, found.masks)
    masks = pair_in_folders(source, [image for image, label in labels.items() if label != 0], groups)
    if not found.images or not (has_normal or arguments.anomalous or annotations or masks):
        lists = [file.relative_to(source).as_posix() for file in files if file.suffix.lower() in LISTS]
        note = _unused(file for file in files if not is_image(file))
        raise UserError(
            f"{source} holds {describe_folder(source)}: expected images in a folder good, ok or normal (or --normal) "
            "and in others, VisA's layout, masks, files of labelme or YOLO, or the path of a list"
            f"{' such as ' * bool(lists)}{list_names(lists, 3)}{note and f' ({note})'}"
        )
    class_of, kind_of = _folder_names(labels, arguments)
    items, unlabelled = [], 0
    for image, label in labels.items():
        file, outlines = annotations.get(image, (None, Outlines(())))
        if label == 0 and outlines.regions:
            raise UserError(f"{image} lies in a folder of normal images, but {file} marks {outlines.kind} in it")
        if label is None:
            if arguments.anomalous:
                continue
            if has_normal and file is None:
                label = 1
            else:
                label = int(bool(outlines.regions or (image in masks and read_mask(masks[image]).getbbox())))
                unlabelled += file is None and image not in masks
        kind = outlines.kind if outlines.regions else kind_of[image]
        has_area = any(region.polygons or region.boxes for region in outlines.regions)
        mask = outlines if has_area else masks.get(image)
        items.append(Item(image, label, class_of[image], kind, mask))
    if unlabelled:
        logger.warning("%d images have neither a mask nor annotations, and count as normal", unlabelled)
    used = {*found.images, *masks.values(), *(file for file, _ in annotations.values())}
    if note := _unused(file for file in files if file not in used and file.parent not in used):
        logger.warning("%s: %s", source, note)
    return items


def _content(arguments: ConversionArguments) -> tuple[FoundImages, list[Path]]:
    """The images and masks, and all files, of a source that may contain the target."""
    source, target = arguments.source, Path(os.path.realpath(arguments.target))

    def outside(paths: Iterable[Path]) -> list[Path]:
        return [path for path in paths if not Path(os.path.realpath(path.parent)).is_relative_to(target)]

    files = outside(files_below(source))
    folders = {parent for file in files for parent in file.parents}
    names = list(filter(None, (arguments.normal, arguments.anomalous, arguments.masks)))
    for name in names:
        if names.count(name) > 1 or not any(is_called(folder, name, source) for folder in folders):
            raise UserError(f"{source}: no folder {name} with files in it, or the same one for two options")
    found = images_below(source, arguments.masks)
    for problem in found.problems:
        logger.warning("skipped: %s", problem)
    found.images = outside(found.images)
    return found, files


def _label_of(image: Path, arguments: ConversionArguments) -> int | None:
    """The label of an image as its folders say it, the innermost first; None if they do not."""
    normal, anomalous, source = arguments.normal, arguments.anomalous, arguments.source
    for folder in list(image.parents)[: len(image.relative_to(source).parts) - 1]:
        if is_called(folder, normal, source) if normal else is_normal_name(folder.name):
            return 0
        if is_called(folder, anomalous, source) if anomalous else is_anomalous_name(folder.name):
            return 1
    return None


def _folder_names(
    labels: Mapping[Path, int | None], arguments: ConversionArguments
) -> tuple[dict[Path, str], dict[Path, str]]:
    """The class and, if it is anomalous, the kind of each image by its folders below those that all images share.

    The first folders are classes if there are several and each has normal images in a folder.
    """
    common = os.path.commonpath([image.parent for image in labels])
    names = {}
    for image in labels:
        folders = image.relative_to(common).parts[:-1]
        names[image] = [name for name in folders if folder_word(name) not in IMAGE_FOLDER_NAMES | _SPLITS]
    class_of = dict.fromkeys(labels, arguments.class_name or arguments.source.resolve().name or "object")
    tops = {image: folders[0] if folders else "" for image, folders in names.items()}
    classes = {tops[image] for image, label in labels.items() if label == 0}
    several = len(classes) > 1 and classes == set(tops.values()) and not any(map(is_normal_name, classes))
    if several and not arguments.class_name:
        class_of, names = tops, {image: folders[1:] for image, folders in names.items()}
    kinds = {
        image: next((name for name in folders if not is_anomalous_name(name)), [*folders, ANOMALOUS][0])
        for image, folders in names.items()
    }
    return class_of, kinds


def _annotations(source: Path, images: Sequence[Path], files: Sequence[Path]) -> dict[Path, tuple[Path, Outlines]]:
    """The annotation file of each image that has one, and its regions."""
    file_of = {file.with_suffix(".png"): file for file in files if file.suffix.lower() in SUFFIXES}
    names = class_names(files)
    annotations = {}
    for image, named_like_image in pair_in_folders(source, images, grouped(source, file_of, TOOLS)).items():
        file = file_of[named_like_image]
        outlines = read_outlines(file, image, names)
        if outlines is not None:
            annotations[image] = (file, outlines)
    return annotations


def _unused(files: Iterable[Path]) -> str:
    """Why each of these files is not used, with numbers."""
    return skipped_note(Counter("unused masks" if is_image(file) else skip_reason(file) for file in files))
