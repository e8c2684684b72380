"""The layouts of datasets, and how to list the test split of each."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.conventions import is_normal_name
from dataset.folders import find_folder, images_in, subfolders
from dataset.records import Record, path_within
from utils.errors import UserError
from utils.paths import is_file, is_folder


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
    return [name for name in class_names if any(map(images_in, _test_kinds(_class_folder(root, name, class_names))))]


def _test_folder_records(root: Path, class_names: Sequence[str]) -> list[Record]:
    """CLASS/test/KIND/x with masks CLASS/ground_truth/KIND/x_mask or x, with any endings."""
    records = []
    for class_name in class_names:
        class_folder = _class_folder(root, class_name, class_names)
        for kind in _test_kinds(class_folder):
            if is_normal_name(kind.name):
                records += _normal_records(root, class_name, kind)
            else:
                masks = find_folder(class_folder, f"ground_truth/{kind.name}")
                records += _anomalous_records(root, class_name, kind, masks, "_mask", required=False)
    return records


def _class_folder(root: Path, class_name: str, class_names: Sequence[str]) -> Path | None:
    is_class_folder = len(class_names) == 1 and find_folder(root, "test") is not None
    return root if is_class_folder else find_folder(root, class_name)


def _test_kinds(class_folder: Path | None) -> list[Path]:
    return subfolders(find_folder(class_folder, "test"))


def visa_classes(root: Path, class_names: Sequence[str]) -> list[str]:
    sides = ("Normal", "Anomaly")
    return [
        name
        for name in class_names
        if any(images_in(find_folder(root, f"{name}/Data/Images/{side}")) for side in sides)
    ]


def visa_records(root: Path, class_names: Sequence[str], split: str = "test") -> list[Record]:
    """Rows of a split, "test" or "train", of split_csv/1cls.csv, for the classes that have images."""
    table = root / "split_csv" / "1cls.csv"
    if not is_file(table):
        raise UserError(f"{table} does not exist: it is in VisA's archive")
    present = set(visa_classes(root, class_names))
    records = []
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, restval="")
            absent = {"object", "split", "label", "image", "mask"} - set(rows.fieldnames or ())
            if absent:
                raise UserError(f"{table} lacks the column {', '.join(sorted(absent))}: use the file of VisA's archive")
            for row in rows:
                if row["split"] == split and row["object"] in present:
                    records.append(_visa_record(root, row, f"{table}:{rows.line_num}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{table} cannot be read ({reason}): use the file of VisA's archive") from error
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


@dataclass(frozen=True)
class _Flat:
    """A layout of one class: folders of normal images (or None), of anomalous images, and of their masks."""

    normal: str | None
    anomalous: str
    masks: str

    def classes(self, root: Path, class_names: Sequence[str]) -> list[str]:
        folders = (find_folder(root, name) for name in (self.normal, self.anomalous) if name)
        return list(class_names) if any(map(images_in, folders)) else []

    def records(self, root: Path, class_names: Sequence[str]) -> list[Record]:
        (class_name,) = class_names
        normal = find_folder(root, self.normal) if self.normal else None
        masks = find_folder(root, self.masks) or root / self.masks
        anomalous = _anomalous_records(root, class_name, find_folder(root, self.anomalous), masks)
        return _normal_records(root, class_name, normal) + anomalous


_MEDICAL = _Flat("test/good/img", "test/Ungood/img", "test/Ungood/label")
_COLON = _Flat(None, "images", "masks")


def _normal_records(root: Path, class_name: str, images: Path | None) -> list[Record]:
    return [Record(_relative(image, root), 0, class_name) for image in images_in(images)]


def _anomalous_records(
    root: Path, class_name: str, images: Path | None, masks: Path | None, mask_suffix: str = "", required: bool = True
) -> list[Record]:
    """Pair each image with the mask of its name, whatever their endings; `UserError` if a required mask is missing."""
    mask_of = {mask.stem: mask for mask in images_in(masks if masks and is_folder(masks) else None)}
    records = []
    for image in images_in(images):
        mask = mask_of.get(image.stem + mask_suffix) or mask_of.get(image.stem)
        if mask is None and masks is not None and required:
            raise UserError(_no_mask(image, masks, mask_suffix))
        records.append(Record(_relative(image, root), 1, class_name, None if mask is None else _relative(mask, root)))
    return records


def missing_mask(root: Path, record: Record) -> str:
    """The message about a missing mask in MVTec's layout."""
    image = root / record.image_path
    return _no_mask(image, image.parents[2] / "ground_truth" / image.parent.name, "_mask")


def _no_mask(image: Path, masks: Path, mask_suffix: str) -> str:
    names = dict.fromkeys((f"{image.stem}{mask_suffix}.png", f"{image.stem}.png"))
    return f"the anomalous image {image} has no mask: expected {masks / ' or '.join(names)}"


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


LAYOUTS: dict[str, Layout] = {
    "mvtec": Layout(
        "CLASS/test/good/x.png (or test/ok), CLASS/test/DEFECT/x.png with mask CLASS/ground_truth/DEFECT/x_mask.png "
        "(or x.png)",
        _test_folder_classes,
        _test_folder_records,
    ),
    "visa": Layout(
        "split_csv/1cls.csv and CLASS/Data/Images/{Normal,Anomaly}/x.JPG with CLASS/Data/Masks/Anomaly/x.png",
        visa_classes,
        visa_records,
    ),
    "medical": Layout(
        "test/good/img/x.png, test/Ungood/img/x.png with mask test/Ungood/label/x.png",
        _MEDICAL.classes,
        _MEDICAL.records,
    ),
    "colon": Layout("images/x.png with mask masks/x.png", _COLON.classes, _COLON.records),
}
