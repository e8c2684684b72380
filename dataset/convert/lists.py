"""Lists of images in JSON lines, in a JSON list, or in a `meta.json` of splits and classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dataset.conventions import is_anomalous_name, is_normal_name
from dataset.convert.items import ANOMALOUS, Item, existing_file
from dataset.metadata import parse_label
from utils.errors import UserError
from utils.reading import read_json_lines, short_repr

# The keys of a row in the lists of other projects; the first is this project's own.
_KEYS = {
    "image": ("image_path", "img_path", "image", "filename", "file_name", "path"),
    "label": ("label", "anomaly", "is_anomaly", "anomalous"),
    "class": ("class_name", "cls_name", "clsname", "class", "category", "object"),
    "mask": ("mask_path", "mask", "maskname", "mask_name"),
    "kind": ("specie_name", "label_name", "defect_type", "defect"),
    "split": ("split", "phase"),
}


def read_list(content: Any, source: Path, root: Path, class_name: str | None) -> list[Item]:
    """The images of a list.

    Args:
        content: The parsed file; None for JSON lines.
        source: The file.
        root: The folder that its paths are relative to.
        class_name: The class of rows without one.
    """
    rows: Iterable[tuple[str, Any]]
    if isinstance(content, dict) and content and all(isinstance(part, dict) for part in content.values()):
        rows = _rows_of_meta(content, source)
    elif isinstance(content, list):
        rows = ((f"{source}: image {number}", row) for number, row in enumerate(content, start=1))
    else:
        rows = read_json_lines(source, name="the list")
    return [_item(row, where, root, class_name) for where, row in rows if not _is_header(row)]


def _is_header(row: Any) -> bool:
    """Whether a row is the first line of this project's own lists (`dataset.metadata`)."""
    return isinstance(row, dict) and "schema" in row and "dataset" in row


def _rows_of_meta(content: Mapping[str, Any], source: Path) -> Iterator[tuple[str, Any]]:
    """The images of a `meta.json`: {"train": {CLASS: [...]}, "test": {CLASS: [...]}}."""
    for split, classes in content.items():
        for class_name, rows in classes.items():
            if not isinstance(rows, list):
                raise UserError(f"{source}: {short_repr(split)}, {short_repr(class_name)} must be a list of images")
            for number, row in enumerate(rows, start=1):
                where = f"{source}: {split}, {class_name}, image {number}"
                yield where, {"split": split, "class_name": class_name, **row} if isinstance(row, dict) else row


def _item(row: Any, source: str, root: Path, class_name: str | None) -> Item:
    if not isinstance(row, dict):
        raise UserError(f"{source}: expected a JSON object with image_path, label, class_name and mask_path")
    values = {name: next((row[key] for key in keys if key in row), None) for name, keys in _KEYS.items()}
    image = existing_file(values["image"], source, "image_path", root)
    word = str(values["label"])
    label = 0 if is_normal_name(word) else 1 if is_anomalous_name(word) else parse_label(values["label"], source)
    name = values["class"] if values["class"] is not None else class_name
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{source}: class_name must be a non-empty text, not {short_repr(name)} (or --class_name)")
    mask = None
    if label and values["mask"] not in (None, ""):
        mask = existing_file(values["mask"], source, "mask_path", root)
    split = "train" if str(values["split"]).lower() == "train" else "test"
    kind = values["kind"] if isinstance(values["kind"], str) else _kind_of_path(str(values["image"]))
    return Item(image, label, name, kind, mask, split)


def _kind_of_path(path: str) -> str:
    """The kind of defect in a path of MVTec's layout."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return parts[-2] if len(parts) > 2 and parts[-3].lower() == "test" else ANOMALOUS
