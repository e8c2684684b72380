"""Recognise a source and list its images; the labels in folders follow from names, masks, or annotation files."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dataset.conventions import IMAGE_FOLDER_NAMES, folder_word, is_anomalous_name, is_normal_name
from dataset.convert.annotations import read_coco, read_outlines, yolo_classes
from dataset.convert.arguments import ConversionArguments
from dataset.convert.items import ANOMALOUS, Item, Outlines
from dataset.convert.lists import read_json_list, read_list
from dataset.folders import (
    FoundImages,
    describe_folder,
    files_below,
    images_below,
    images_in,
    is_called,
    is_image,
    skip_reason,
    skipped_note,
    subfolders,
)
from dataset.images import read_mask
from dataset.layouts import image_folder, test_folder, visa_classes, visa_records
from dataset.masks import group_masks, grouped, pair_in_folders
from utils.errors import UserError
from utils.paths import is_file, is_folder
from utils.reading import parse_json, read_table, read_text
from utils.text import list_names

logger = logging.getLogger(__name__)

# The extensions of tables, with columns separated by commas, semicolons, tabs or bars.
TABLES = (".csv", ".tsv")
LISTS = (".json", ".jsonl", *TABLES)
# Folders of annotation files of one image each.
TOOLS = ("json", "txt", "labelme", "yolo")
_NO_KINDS = IMAGE_FOLDER_NAMES | {"train", "training", "test", "testing", "val", "valid", "validation"}


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
            items = []
            for split in ("train", "test"):
                for record in visa_records(source, classes, split):
                    mask = source / record.mask_path if record.mask_path else None
                    items.append(Item(source / record.image_path, record.label, record.class_name, "bad", mask, split))
            return "VisA's layout", items
        if folder := _in_mvtec_layout(source):
            raise UserError(f"{folder} is in MVTec's layout already: use --dataset {folder}")
    return "a folder of images", read_folder(arguments)


def _in_mvtec_layout(folder: Path) -> Path | None:
    """The folder with classes in MVTec's layout that have normal test images, also if others contain only this one."""
    children = subfolders(folder)
    kinds = [kind for child in (folder, *children) for kind in subfolders(test_folder(child))]
    if any(is_normal_name(kind.name) and images_in(image_folder(kind)) for kind in kinds):
        return folder
    return _in_mvtec_layout(children[0]) if len(children) == 1 else None


def _read_file(arguments: ConversionArguments) -> tuple[str, list[Item]]:
    source, root = arguments.source, arguments.images or arguments.source.parent
    if arguments.anomalous or arguments.masks:
        raise UserError("--anomalous and --masks are for a folder: leave them out")
    if source.suffix.lower() in TABLES:
        return "a list", read_list(read_table(source, "the list"), root, arguments)
    text = read_text(source, "the list")
    try:
        content = parse_json(text, source)
    except UserError:
        content = None  # JSON lines, or damaged: then the first bad line is reported
    if isinstance(content, dict) and "images" in content:
        return "COCO annotations", read_coco(content, source, root, arguments.class_name or "object")
    if isinstance(content, dict) and "shapes" in content:
        raise UserError(f"{source} is labelme's file of one image: convert its folder")
    return "a list", read_json_list(content, root, arguments)


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
        file, outlines = annotations.get(image, (None, Outlines()))
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
        mask = outlines if any(region.has_area for region in outlines.regions) else masks.get(image)
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
    names = {
        image: [name for name in image.relative_to(common).parts[:-1] if folder_word(name) not in _NO_KINDS]
        for image in labels
    }
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
    file_of = {file.with_suffix(".png"): file for file in files if file.suffix.lower() in (".json", ".txt")}
    kinds = yolo_classes(files)
    annotations = {}
    for image, named_like_image in pair_in_folders(source, images, grouped(source, file_of, TOOLS)).items():
        file = file_of[named_like_image]
        if outlines := read_outlines(file, image, kinds):
            annotations[image] = (file, outlines)
    return annotations


def _unused(files: Iterable[Path]) -> str:
    """Why each of these files is not used, with numbers."""
    return skipped_note(Counter("unused masks" if is_image(file) else skip_reason(file) for file in files))
