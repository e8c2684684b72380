"""Lists of images: JSON lines, a JSON list, a `meta.json` of splits and classes, Real-IAD's lists, and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dataset.conventions import is_anomalous_name, is_normal_name, same_name
from dataset.convert.arguments import ConversionArguments
from dataset.convert.items import ANOMALOUS, Item, existing_file
from dataset.records import parse_label
from utils.errors import UserError
from utils.reading import read_json_lines, read_text, short_repr
from utils.text import list_names

# The extensions of tables, with columns separated by commas, semicolons, tabs or bars.
TABLES = (".csv", ".tsv")
# The keys of a row in the lists of other projects, in small letters and without separators.
_KEYS = {
    "image": ("imagepath", "imgpath", "image", "filename", "path", "filepath", "file", "imageid", "imagename", "img"),
    "label": ("label", "anomaly", "isanomaly", "anomalous", "isanomalous", "defective", "isdefective"),
    "class": ("classname", "clsname", "object"),
    "mask": ("maskpath", "mask", "maskname"),
    "kind": ("speciename", "labelname", "defecttype", "defect", "anomalyclass"),
    "split": ("split", "phase"),
    # The class, or the label of lists without one.
    "category": ("class", "category"),
}
_NO, _YES = frozenset({"no", "none", "n"}), frozenset({"yes", "y"})
# A row, and its place in the file for messages.
Row = tuple[str, Any]


def rows_of(content: Any, source: Path) -> Iterator[Row]:
    """The rows of a JSON file; `content` is None for JSON lines."""
    if isinstance(content, list):
        yield from ((f"{source}: image {number}", row) for number, row in enumerate(content, start=1))
    elif isinstance(content, dict) and content and all(isinstance(part, (dict, list)) for part in content.values()):
        yield from _rows_of_splits(content, source)
    else:
        rows = read_json_lines(source, name="the list")
        # The first line of this project's own lists (`dataset.metadata`).
        yield from (row for row in rows if not (isinstance(row[1], dict) and {"schema", "dataset"} <= row[1].keys()))


def _rows_of_splits(content: Mapping[str, Any], source: Path) -> Iterator[Row]:
    """{"train": {CLASS: [...]}, "test": {CLASS: [...]}}, or without classes."""
    for split, part in content.items():
        for class_name, rows in part.items() if isinstance(part, dict) else [(None, part)]:
            if not isinstance(rows, list):
                raise UserError(f"{source}: {short_repr(split)}, {short_repr(class_name)} must be a list of images")
            more = {"split": split} if class_name is None else {"split": split, "class_name": class_name}
            for number, row in enumerate(rows, start=1):
                place = ", ".join(filter(None, (split, class_name, f"image {number}")))
                yield f"{source}: {place}", {**more, **row} if isinstance(row, dict) else row


def read_table(source: Path) -> Iterator[Row]:
    """The rows of a file of comma-separated values, or with semicolons, tabs or bars."""
    text = read_text(source, "the list")
    rows = csv.DictReader(io.StringIO(text), delimiter=max(",;\t|", key=text.partition("\n")[0].count), restval="")
    try:
        yield from ((f"{source}:{rows.line_num}", row) for row in rows)
    except csv.Error as error:
        raise UserError(f"{source} cannot be read: {error}") from error


def read_list(rows: Iterable[Row], root: Path, arguments: ConversionArguments) -> list[Item]:
    """The images of the rows of a list; paths are relative to `root`."""
    words: dict[str, None] = {}
    items = [_item(row, source, root, arguments, words) for source, row in rows]
    if words and not arguments.normal and all(item.label for item in items):
        raise UserError(
            f"{arguments.source}: no image is normal: the labels are {list_names(list(words))}; set the one of normal "
            "images with --normal LABEL"
        )
    return items


def _item(row: Any, source: str, root: Path, arguments: ConversionArguments, words: dict[str, None]) -> Item:
    """The image of a row; a label that is the name of a defect is added to `words`."""
    if not isinstance(row, dict):
        raise UserError(f"{source}: expected a JSON object with image_path, label, class_name and mask_path")
    row = {"".join(c for c in str(key).casefold() if c.isalnum()): value for key, value in row.items()}
    values = {name: row[key] for name, keys in _KEYS.items() for key in reversed(keys) if key in row}
    column = next((name for name in ("label", "kind", "category") if name in values), "")
    if "image" not in values or not column:
        raise UserError(f"{source}: expected image_path and label, or similar, among {list_names(list(row))}")
    image = existing_file(values["image"], source, "image_path", root)
    label, word = _label(values[column], source, arguments.normal)
    words.update({word: None} if word else {})
    if column != "category" and "category" in values:
        values.setdefault("class", values["category"])
    name = values.get("class", arguments.class_name or "object")
    name = arguments.class_name if name is None else name
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{source}: class_name must be non-empty text, not {short_repr(name)} (or --class_name)")
    mask = None
    if label and values.get("mask") not in (None, ""):
        mask = existing_file(values["mask"], source, "mask_path", root)
    split = "train" if str(values.get("split")).lower() == "train" else "test"
    kind = values.get("kind") or word
    kind = kind if kind and isinstance(kind, str) else _kind_of_path(str(values["image"]))
    return Item(image, label, name, kind, mask, split)


def _label(value: object, source: str, normal: str | None) -> tuple[int, str]:
    """0 or 1, and the kind of defect if the label is one; `normal` is the label of normal images (`--normal`)."""
    if normal is not None:
        is_normal = same_name(str(value), normal)
        return int(not is_normal), "" if is_normal else str(value)
    text = value.strip() if isinstance(value, str) else ""
    if is_normal_name(text) or text.casefold() in _NO:
        return 0, ""
    if is_anomalous_name(text) or text.casefold() in _YES:
        return 1, ""
    if any(sign.isalpha() for sign in text) and text.casefold() not in ("true", "false"):
        return 1, text
    return parse_label(value, source), ""


def _kind_of_path(path: str) -> str:
    """The kind of defect in a path of MVTec's layout."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return parts[-2] if len(parts) > 2 and parts[-3].lower() == "test" else ANOMALOUS
