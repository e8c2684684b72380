"""The layouts of datasets, and how to list the test split of each."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from dataset.conventions import (
    IMAGE_FOLDER_NAMES,
    folder_word,
    is_normal_name,
    pair_masks,
    possible_masks,
    without_separators,
)
from dataset.folders import (
    files_below,
    find_folder,
    find_mask_folders,
    images_and_masks_in,
    images_in,
    is_image,
    is_named_like_masks,
    skip_reason,
    skipped_note,
    subfolders,
)
from dataset.images import read_mask
from dataset.masks import group_masks, pair_in_folders
from dataset.records import Record, parse_label, path_within
from utils.errors import UserError
from utils.paths import is_file
from utils.reading import read_json, read_table
from utils.text import list_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """A layout: the files it expects, and two functions of the dataset's folder and class names.

    Args:
        expected: The expected files, for error messages.
        classes: Returns the classes that have images.
        records: Returns the images of the test split in any order; raises `UserError` if a file is missing, except
            for masks in MVTec's layout.
    """

    expected: str
    classes: Callable[[Path, Sequence[str]], list[str]]
    records: Callable[[Path, Sequence[str]], list[Record]]


def _test_folder_classes(root: Path, class_names: Sequence[str]) -> list[str]:
    return [
        name
        for name in class_names
        if any(images_in(image_folder(kind)) for kind in _kinds(test_folder(class_folder(root, name, class_names))))
    ]


def _test_folder_records(root: Path, class_names: Sequence[str]) -> list[Record]:
    """CLASS/test/KIND/x with masks CLASS/ground_truth/KIND/x_mask, and the other names of `dataset.conventions`."""
    records: list[Record] = []
    skipped: Counter[str] = Counter()
    for class_name in class_names:
        if test := test_folder(class_folder(root, class_name, class_names)):
            records += _class_records(root, class_name, test, skipped)
    if note := skipped_note(skipped):
        logger.warning("%s: %s", root, note)
    return records


def _class_records(root: Path, class_name: str, test: Path, skipped: Counter[str]) -> Iterator[Record]:
    """The records of a class; `skipped` counts the files of its test folder that are not used."""
    mask_folders = [child for child in (*subfolders(test.parent), *subfolders(test)) if is_named_like_masks(child)]
    kinds = [kind for kind in _kinds(test) if kind not in mask_folders]
    mask_folders += [child for kind in kinds for child in subfolders(kind) if is_named_like_masks(child)]
    content = {kind: images_and_masks_in(image_folder(kind)) for kind in kinds}
    # A kind that has masks is surely no folder of masks, and need not be looked at.
    masked = {without_separators(child.name) for folder in mask_folders for child in subfolders(folder)}
    mask_folders += find_mask_folders(kinds, [kind for kind in kinds if without_separators(kind.name) not in masked])
    kinds = [kind for kind in kinds if kind not in mask_folders]
    normal = [kind for kind in kinds if is_normal_name(kind.name)]
    if any(content[kind][0] for kind in kinds) and not normal:
        names = list_names([kind.name for kind in kinds])
        advice = "such a folder is called good, ok, normal or similar"
        logger.warning("%s: none of the folders %s in %s has normal images: %s", class_name, names, test, advice)
    groups = group_masks(test.parent, mask_folders, [mask for kind in kinds for mask in content[kind][1]])
    anomalous = [image for kind in kinds if kind not in normal for image in content[kind][0]]
    mask_of = pair_in_folders(test.parent, anomalous, groups)
    for kind in kinds:
        for image in content[kind][0]:
            yield _record(root, image, int(kind not in normal), class_name, mask_of.get(image))
    used = chain(mask_of.values(), *(content[kind][0] for kind in kinds))
    skipped.update(_unused(test, mask_folders, set(used)))


def class_folder(root: Path, class_name: str, class_names: Sequence[str]) -> Path | None:
    """The folder of a class: `root` itself if it is that of the only class, or a folder of its name, maybe doubled."""
    if len(class_names) == 1 and test_folder(root) is not None:
        return root
    outer = find_folder(root, class_name)
    return outer if test_folder(outer) else find_folder(outer, class_name) or outer


def test_folder(class_folder: Path | None) -> Path | None:
    """The folder of a class's test images; in MVTec AD 2 it is called test_public."""
    return find_folder(class_folder, "test") or find_folder(class_folder, "test_public")


def _kinds(test: Path | None) -> list[Path]:
    """The folders of a test folder, but for one called "images", which is no type of defect: YOLO's test split."""
    return [kind for kind in subfolders(test) if folder_word(kind.name) not in ("images", "image", "imgs", "img")]


def image_folder(kind: Path) -> Path:
    """The folder of the images of a kind: itself, or a folder such as "rgb" in it."""
    inner = (child for child in subfolders(kind) if folder_word(child.name) in IMAGE_FOLDER_NAMES)
    return kind if images_in(kind) else next(inner, kind)


def _unused(test: Path, mask_folders: Sequence[Path], used: Collection[Path]) -> Iterator[str]:
    """Why each file in the test folder and the mask folders is not used."""
    for path in dict.fromkeys(path for folder in (test, *mask_folders) for path in files_below(folder)):
        if path in used or path.parent in used:
            continue
        if not is_image(path):
            yield skip_reason(path)
        elif any(folder in path.parents for folder in mask_folders):
            yield "masks without an anomalous image"
        else:
            yield f"in the folder {path.parent.relative_to(test.parent).as_posix()}, which is not read"


def visa_classes(root: Path, class_names: Sequence[str]) -> list[str]:
    def has_images(name: str) -> bool:
        return any(images_in(find_folder(root, f"{name}/Data/Images/{side}")) for side in ("Normal", "Anomaly"))

    return list(filter(has_images, class_names))


def visa_records(root: Path, class_names: Sequence[str], split: str = "test") -> list[Record]:
    """Rows of a split, "test" or "train", of split_csv/1cls.csv, for the classes that have images."""
    table = root / "split_csv" / "1cls.csv"
    present = set(visa_classes(root, class_names))
    records = []
    for source, row in read_table(table, columns=("object", "split", "label", "image", "mask")):
        if row["split"] == split and row["object"] in present:
            records.append(_visa_record(root, row, source))
    return records


def _visa_record(root: Path, row: dict[str, str], source: str) -> Record:
    image_path, mask_path = (row[key].strip().replace("\\", "/") for key in ("image", "mask"))
    if row["label"] not in ("normal", "anomaly"):
        raise UserError(f"{source}: label must be normal or anomaly, not {row['label']!r}")
    label = int(row["label"] == "anomaly")
    if not is_file(root / path_within(image_path, source, "image")):
        raise UserError(f"{source}: the image {root / image_path} does not exist; unpack VisA's archive completely")
    if label and not (mask_path and is_file(root / path_within(mask_path, source, "mask"))):
        raise UserError(f"{source}: the anomalous image {image_path} has no mask: expected {root / mask_path}")
    return Record(image_path, label, row["object"], mask_path if label else None)


def _flat(expected: str, normal: str | None, anomalous: str, masks: str | None) -> Layout:
    """A layout of one class: folders of normal images (or None), of anomalous images, and of their masks (or None)."""

    def images_of(root: Path, name: str | None) -> list[Path]:
        folder = find_folder(root, name) if name else None
        # Some copies contain each folder twice.
        return images_in(folder) or images_in(find_folder(folder, folder.name if folder else ""))

    def classes(root: Path, class_names: Sequence[str]) -> list[str]:
        return list(class_names) if images_of(root, normal) or images_of(root, anomalous) else []

    def records(root: Path, class_names: Sequence[str]) -> list[Record]:
        (name,) = class_names
        images = images_of(root, anomalous)
        mask_of = pair_masks(images, images_of(root, masks))
        if masks and (missing := next((image for image in images if image not in mask_of), None)):
            raise UserError(_no_mask(missing, find_folder(root, masks) or root / masks, ""))
        return [
            *(_record(root, image, 0, name) for image in images_of(root, normal)),
            *(_record(root, image, 1, name, mask_of.get(image)) for image in images),
        ]

    return Layout(expected, classes, records)


def _labelled_by_masks(expected: str, groups: Callable[[Path, str], Iterable[list[Path]]], all_masks: bool) -> Layout:
    """A layout in which masks tell which images are anomalous; they are named like these, with an addition.

    groups: the files of a class, in groups in which the names of images are unique. all_masks: every image has a mask,
    whose content decides; otherwise normal images have none.
    """

    def pairs(root: Path, name: str) -> dict[Path, Path | None]:
        paired: dict[Path, Path | None] = {}
        for files in groups(root, name):
            image_of = possible_masks(files)
            mask_of = {image: mask for mask, image in image_of.items()}
            paired |= {file: mask_of.get(file) for file in files if file not in image_of}
        return paired

    def is_anomalous(mask: Path | None) -> bool:
        return mask is not None and (not all_masks or read_mask(mask).getbbox() is not None)

    def classes(root: Path, class_names: Sequence[str]) -> list[str]:
        return [name for name in class_names if any(pairs(root, name).values())]

    def records(root: Path, class_names: Sequence[str]) -> list[Record]:
        rows: list[Record] = []
        for name in class_names:
            masks = pairs(root, name)
            if all_masks and (missing := next((image for image, mask in masks.items() if mask is None), None)):
                raise UserError(f"the image {missing} has no mask next to it, which would tell whether it is normal")
            with ThreadPoolExecutor() as pool:
                labels = list(map(int, pool.map(is_anomalous, masks.values())))
            for (image, mask), label in zip(masks.items(), labels, strict=True):
                rows.append(_record(root, image, label, name, mask if label else None))
        return rows

    return Layout(expected, classes, records)


def _dagm_files(root: Path, name: str) -> Iterator[list[Path]]:
    test = find_folder(class_folder(root, name, ()), "Test")
    yield [*images_in(test), *images_in(find_folder(test, "Label"))]


def _kolektor_files(root: Path, name: str) -> Iterator[list[Path]]:
    return (images_in(folder) for folder in subfolders(root) if re.fullmatch(r"kos\d+", folder.name, re.IGNORECASE))


def _head_ct_table(root: Path) -> Path | None:
    """The labels of the images in a folder: in it or up to two folders above, as the archive is unpacked."""
    return next(filter(is_file, (folder / "labels.csv" for folder in (root, *root.parents[:2]))), None)


def _head_ct_classes(root: Path, class_names: Sequence[str]) -> list[str]:
    return list(class_names) if images_in(root) and _head_ct_table(root) else []


def _head_ct_records(root: Path, class_names: Sequence[str]) -> list[Record]:
    """The images in a folder, by the rows of number and label in labels.csv: "7, 1" is the label of 007.png."""
    (name,), table = class_names, _head_ct_table(root)
    labels = {}
    for source, row in read_table(table) if table else ():
        number, label, *_ = (*row.values(), "", "")
        labels[number.strip().lstrip("0")] = parse_label(label, source)
    images = {image.stem.lstrip("0"): image for image in images_in(root)}
    if different := sorted(labels.keys() ^ images.keys()):
        names = list_names([number or "0" for number in different])
        raise UserError(f"{table} and the images in {root} do not fit: only one of them has {names}")
    return [_record(root, image, labels[number], name) for number, image in images.items()]


def _real_iad_images(root: Path) -> Path:
    """The folder of the classes: that with the largest images."""
    sizes = (find_folder(root, f"realiad_{size}") for size in (1024, 512, 256))
    return next(filter(None, sizes), root)


def _real_iad_files(root: Path, name: str) -> Iterator[list[Path]]:
    if folder := find_folder(_real_iad_images(root), name):
        yield list(filter(is_image, files_below(folder)))


def _real_iad_classes(root: Path, class_names: Sequence[str]) -> list[str]:
    images = _real_iad_images(root)
    return [name for name in class_names if any(find_folder(images, f"{name}/{side}") for side in ("OK", "NG"))]


def _real_iad_records(root: Path, class_names: Sequence[str]) -> list[Record]:
    """The test images of the single-view lists, of the lists of all views, or without lists all images."""
    from dataset.convert.arguments import ConversionArguments
    from dataset.convert.lists import read_json_list

    images, names = _real_iad_images(root), _real_iad_classes(root, class_names)
    folders = (f"{outer}realiad_jsons{views}" for views in ("_sv", "") for outer in ("realiad_jsons/", ""))
    lists = next((found for folder in folders if (found := find_folder(root, folder))), None)
    logger.info("%s: images in %s, test split: %s", root, images.name, "all images" if lists is None else lists.name)
    if lists is None:
        return _REAL_IAD_FILES.records(root, names)
    rows: list[Record] = []
    for name in names:
        file = lists / f"{name}.json"
        items = read_json_list(read_json(file, dict), images, ConversionArguments(source=file, target=file))
        for item in items:
            if item.split == "test":
                mask = item.mask if isinstance(item.mask, Path) else None
                rows.append(_record(root, item.image, item.label, name, mask))
    return rows


def missing_mask(root: Path, record: Record) -> str:
    """The message about a missing mask in MVTec's layout."""
    image = root / record.image_path
    return _no_mask(image, image.parents[2] / "ground_truth" / image.parent.name, "_mask")


def _no_mask(image: Path, masks: Path, mask_suffix: str) -> str:
    names = dict.fromkeys((f"{image.stem}{mask_suffix}.png", f"{image.stem}.png"))
    return f"the anomalous image {image} has no mask: expected {masks / ' or '.join(names)}"


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _record(root: Path, image: Path, label: int, class_name: str, mask: Path | None = None) -> Record:
    return Record(_relative(image, root), label, class_name, None if mask is None else _relative(mask, root))


_REAL_IAD_FILES = _labelled_by_masks("", _real_iad_files, all_masks=False)
_YES_NO = _flat("no/x.jpg and yes/x.jpg", "no", "yes", None)
_ISIC = "ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth"
LAYOUTS: dict[str, Layout] = {
    "mvtec": Layout(
        "CLASS/test/good/x.png (or ok, normal), CLASS/test/DEFECT/x.png with mask "
        "CLASS/ground_truth/DEFECT/x_mask.png (or x.png)",
        _test_folder_classes,
        _test_folder_records,
    ),
    "visa": Layout(
        "split_csv/1cls.csv and CLASS/Data/Images/{Normal,Anomaly}/x.JPG with CLASS/Data/Masks/Anomaly/x.png",
        visa_classes,
        visa_records,
    ),
    "medical": _flat(
        "test/good/img/x.png, test/Ungood/img/x.png with mask test/Ungood/label/x.png",
        *("test/good/img", "test/Ungood/img", "test/Ungood/label"),
    ),
    "colon": _flat("images/x.png with mask masks/x.png", None, "images", "masks"),
    "isic": _flat(f"{_ISIC[0]}/x.jpg with mask {_ISIC[1]}/x_Segmentation.png", None, *_ISIC),
    "tn3k": _flat("test-image/x.jpg with mask test-mask/x.jpg", None, "test-image", "test-mask"),
    "yes_no": _YES_NO,
    "br35h": replace(
        _YES_NO,
        expected=f"{_YES_NO.expected} next to pred",
        classes=lambda root, names: _YES_NO.classes(root, names) if find_folder(root, "pred") else [],
    ),
    "head_ct": Layout("head_ct/000.png with its row in labels.csv next to head_ct", _head_ct_classes, _head_ct_records),
    "dagm": _labelled_by_masks(
        "CLASS/Test/0576.PNG, anomalous ones with mask CLASS/Test/Label/0576_label.PNG", _dagm_files, all_masks=False
    ),
    "kolektor": _labelled_by_masks("kos01/Part0.jpg with mask kos01/Part0_label.bmp", _kolektor_files, all_masks=True),
    "kolektor2": _labelled_by_masks(
        "test/10000.png with mask test/10000_GT.png",
        lambda root, name: [images_in(find_folder(root, "test"))],
        all_masks=True,
    ),
    "real_iad": Layout(
        "realiad_1024/CLASS/{OK,NG}/x.jpg (or 512, 256) and realiad_jsons/realiad_jsons_sv/CLASS.json",
        _real_iad_classes,
        _real_iad_records,
    ),
}
