"""Which images a dataset's test split has: read from its folders once, then kept as JSON lines.

One line per image: `image_path`, `label` (0 normal, 1 anomalous), `class_name`, and `mask_path` for anomalous ones,
with paths relative to the dataset's folder and forward slashes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dataset.catalog import LAYOUTS, LocatedDataset, find_folder
from utils.errors import UserError
from utils.files import write_text

logger = logging.getLogger(__name__)

METADATA_FILE = "metadata_test.jsonl"
IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})

_LABELS = {0: 0, 1: 1, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


@dataclass(frozen=True)
class Record:
    """One image: paths relative to the dataset's folder with forward slashes, label 0 (normal) or 1 (anomalous)."""

    image_path: str
    label: int
    class_name: str
    mask_path: str | None = None


def natural_key(path: str) -> tuple:
    """A key that sorts paths folder by folder and numbers by value: "a/2.png" before "a/10.png"."""
    parts = tuple(
        tuple(int(piece) if i % 2 else piece for i, piece in enumerate(re.split(r"([0-9]+)", part)))
        for part in path.split("/")
    )
    return parts, path


def load_records(located: LocatedDataset, metadata_file: Path | None = None) -> list[Record]:
    """The images of a dataset's test split: from `metadata_file`, from the kept file, or built and then kept.

    The kept file is `metadata_test.jsonl` in the dataset's folder. Where that folder cannot be written the records
    stay in memory. Raises UserError for a bad line (file and number), and for a kept file that names images which are
    gone.
    """
    if metadata_file is not None:
        return _read_json_lines(Path(metadata_file))
    kept = located.root / METADATA_FILE
    if kept.is_file():
        records = _read_json_lines(kept)
        _check_up_to_date(records, kept)
        logger.info("%d images listed in %s (delete it to have it built again)", len(records), kept)
        return records
    records = build_metadata(located)
    try:
        write_text(kept, "".join(map(_json_line, records)))
        logger.info("%d images found, their list is kept in %s", len(records), kept)
    except OSError as error:
        logger.info("%d images found; their list is not kept, %s cannot be written (%s)", len(records), kept, error)
    return records


def build_metadata(located: LocatedDataset) -> list[Record]:
    """List the test split from the dataset's folders: class by class, each class in natural order of its paths.

    Raises UserError where no image is found, or an anomalous one has no mask (with the path expected). Classes of the
    catalog that are not there are named in a warning.
    """
    root, class_names = located.root, list(located.spec.class_names)
    layout = located.spec.layout
    if layout == "visa":
        records = _visa_records(root, class_names)
    elif layout in ("mvtec", "btad"):
        records = _defect_folder_records(root, class_names, normal="ok" if layout == "btad" else "good")
    else:
        records = (_medical_records if layout == "medical" else _colon_records)(root, class_names[0])
    if not records:
        raise UserError(
            f"no test images of {located.spec.name} in {root}: expected {LAYOUTS[layout]} "
            "(a dataset of the catalog is given by its name, with --data_root)"
        )
    order = {class_name: i for i, class_name in enumerate(class_names)}
    missing = order.keys() - {record.class_name for record in records}
    if missing:
        logger.warning("%s: no images of %s in %s", located.spec.name, ", ".join(sorted(missing, key=order.get)), root)
    return sorted(records, key=lambda record: (order[record.class_name], natural_key(record.image_path)))


def metadata_digest(records: Sequence[Record]) -> str:
    """SHA-256 (hexadecimal) over the records and their order, whatever file they came from."""
    canonical = "\n".join(json.dumps([r.image_path, r.label, r.class_name, r.mask_path]) for r in records)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _defect_folder_records(root: Path, class_names: Sequence[str], normal: str) -> list[Record]:
    """CLASS/test/KIND/x with masks CLASS/ground_truth/KIND/x_mask or x, of any ending (all but VisA and medical)."""
    records = []
    for class_name in class_names:
        # An own folder with test/ in it is one class.
        alone = len(class_names) == 1 and (root / "test").is_dir()
        class_folder = root if alone else find_folder(root, class_name)
        test = find_folder(class_folder, "test") if class_folder else None
        for kind in _subfolders(test):
            if kind.name.lower() == normal:
                records += [Record(_relative(image, root), 0, class_name) for image in _images(kind)]
                continue
            masks = class_folder / "ground_truth" / kind.name
            records += _anomalous_records(
                root, class_name, kind, masks, mask_suffix="_mask" if normal == "good" else ""
            )
    return records


def _medical_records(root: Path, class_name: str) -> list[Record]:
    normal = _images(find_folder(root, "test/good/img"))
    records = [Record(_relative(image, root), 0, class_name) for image in normal]
    anomalous = find_folder(root, "test/Ungood/img")
    masks = find_folder(root, "test/Ungood/label") or root / "test" / "Ungood" / "label"
    return records + _anomalous_records(root, class_name, anomalous, masks)


def _colon_records(root: Path, class_name: str) -> list[Record]:
    return _anomalous_records(
        root, class_name, find_folder(root, "images"), find_folder(root, "masks") or root / "masks"
    )


def _anomalous_records(
    root: Path, class_name: str, images: Path | None, masks: Path, mask_suffix: str = ""
) -> list[Record]:
    """Pair each image with the mask of its name: endings often differ between the two, and are not compared."""
    mask_of = {mask.stem: mask for mask in _images(masks if masks.is_dir() else None)}
    records = []
    for image in _images(images):
        mask = mask_of.get(image.stem + mask_suffix) or mask_of.get(image.stem)
        if mask is None:
            expected = masks / f"{image.stem}{mask_suffix}.png"
            raise UserError(f"the anomalous image {image} has no mask: expected {expected}")
        records.append(Record(_relative(image, root), 1, class_name, _relative(mask, root)))
    return records


def _visa_records(root: Path, class_names: Sequence[str]) -> list[Record]:
    """Rows with split "test" of split_csv/1cls.csv, for the classes whose folders are there."""
    table = root / "split_csv" / "1cls.csv"
    if not table.is_file():
        raise UserError(f"{table} is not there: it comes with VisA's archive; expected {LAYOUTS['visa']}")
    present = {class_name for class_name in class_names if (root / class_name).is_dir()}
    records = []
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        absent = {"object", "split", "label", "image", "mask"} - set(rows.fieldnames or ())
        if absent:
            raise UserError(f"{table} lacks the column {', '.join(sorted(absent))}: take the file of VisA's archive")
        for row in rows:
            if row["split"] == "test" and row["object"] in present:
                records.append(_visa_record(root, row, f"{table}:{rows.line_num}"))
    return records


def _visa_record(root: Path, row: dict[str, str], where: str) -> Record:
    image_path, mask_path = _slashed(row["image"]), _slashed(row["mask"] or "")
    if row["label"] not in ("normal", "anomaly"):
        raise UserError(f"{where}: label must be normal or anomaly, not {row['label']!r}")
    label = int(row["label"] == "anomaly")
    if not (root / image_path).is_file():
        raise UserError(f"{where}: the image {root / image_path} is not there; unpack VisA's archive completely")
    if label and not (mask_path and (root / mask_path).is_file()):
        raise UserError(f"{where}: the anomalous image {image_path} has no mask: expected {root / mask_path}")
    return Record(image_path, label, row["object"], mask_path if label else None)


def _subfolders(folder: Path | None) -> list[Path]:
    return [] if folder is None else sorted(child for child in folder.iterdir() if child.is_dir())


def _images(folder: Path | None) -> list[Path]:
    """The image files in a folder; hidden ones are left out, which some systems put beside each real one."""
    if folder is None:
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith(".") and path.is_file()
    )


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _slashed(path: str) -> str:
    return str(PurePosixPath(path.strip().replace("\\", "/"))) if path.strip() else ""


def _json_line(record: Record) -> str:
    row = {"image_path": record.image_path, "label": record.label, "class_name": record.class_name}
    if record.mask_path is not None:
        row["mask_path"] = record.mask_path
    return json.dumps(row) + "\n"


def _read_json_lines(path: Path) -> list[Record]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the metadata {path} cannot be read: {' '.join(str(error).split())}") from error
    records = [_parse_line(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise UserError(f"the metadata {path} lists no image: expected one JSON object per line")
    return records


def _parse_line(line: str, where: str) -> Record:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: no valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object with image_path, label, class_name and mask_path")
    for key in ("image_path", "class_name"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where}: {key} must be a text that is not empty, not {row.get(key)!r}")
    label = _parse_label(row.get("label"), where)
    mask_path = row.get("mask_path")
    if label and not (isinstance(mask_path, str) and mask_path.strip()):
        raise UserError(f"{where}: an anomalous image (label 1) needs a mask_path")
    # A normal image's mask is empty by definition, so what some files name there is not read.
    return Record(_slashed(row["image_path"]), label, row["class_name"], _slashed(mask_path) if label else None)


def _parse_label(value: object, where: str) -> int:
    key = value.strip().lower() if isinstance(value, str) else value
    # True and 1.0 are found under 1; lists and objects cannot be looked up.
    if not isinstance(key, str | int | float) or key not in _LABELS:
        raise UserError(f"{where}: label must be 0 (normal) or 1 (anomalous), not {value!r}")
    return _LABELS[key]


def _check_up_to_date(records: Sequence[Record], kept: Path) -> None:
    gone = [record.image_path for record in records if not (kept.parent / record.image_path).is_file()]
    if gone:
        raise UserError(
            f"{kept} names {len(gone)} image(s) that are not there any more, such as {gone[0]}: "
            "delete that file to have it built again"
        )
