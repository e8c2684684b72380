"""Lists of images: JSON lines, a JSON list, a `meta.json` of splits and classes, Real-IAD's lists, and CSV."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dataset.conventions import is_anomalous_name, is_normal_name, same_name
from dataset.convert.arguments import ConversionArguments
from dataset.convert.items import ANOMALOUS, Item, existing_file
from dataset.records import parse_label
from utils.errors import UserError
from utils.reading import read_json_lines, short_repr
from utils.text import list_names

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
    """The rows of a JSON file: a list, {"train": {CLASS: [...]}, "test": ...}, or without classes; None: JSON lines."""
    parts = content.values() if isinstance(content, dict) else ()
    if isinstance(content, list) or (parts and all(isinstance(part, list | dict) for part in parts)):
        return _nested_rows(content, str(source), ("split", "class_name"), {})
    rows = read_json_lines(source, name="the list")
    # Without the first line of this project's own lists (`dataset.metadata`).
    return (row for row in rows if not (isinstance(row[1], dict) and {"schema", "dataset"} <= row[1].keys()))


def _nested_rows(content: Any, place: str, keys: Sequence[str], values: Mapping[str, str]) -> Iterator[Row]:
    if isinstance(content, list):
        for number, row in enumerate(content, start=1):
            yield f"{place}: image {number}", {**values, **row} if isinstance(row, dict) else row
    elif isinstance(content, dict) and keys:
        for name, part in content.items():
            yield from _nested_rows(part, f"{place}: {name}", keys[1:], {**values, keys[0]: name})
    else:
        raise UserError(f"{place} must be a list of images, not {short_repr(content)}")


def read_json_list(content: Any, root: Path, arguments: ConversionArguments) -> list[Item]:
    """The images of the content of a JSON file; Real-IAD's paths begin with a folder that its first entry names."""
    if isinstance(content, dict) and isinstance(content.get("meta"), dict):
        root /= str(content.pop("meta").get("prefix", ""))
    return read_list(rows_of(content, arguments.source), root, arguments)


def read_list(rows: Iterable[Row], root: Path, arguments: ConversionArguments) -> list[Item]:
    """The images of the rows of a list; paths are relative to `root`."""
    pairs = [_item(row, source, root, arguments) for source, row in rows]
    words = list(dict.fromkeys(word for _, word in pairs if word))
    if words and not arguments.normal and all(item.label for item, _ in pairs):
        raise UserError(
            f"{arguments.source}: no image is normal: the labels are {list_names(words)}; set the one of normal images "
            "with --normal LABEL"
        )
    return [item for item, _ in pairs]


def _item(row: Any, source: str, root: Path, arguments: ConversionArguments) -> tuple[Item, str]:
    """The image of a row, and its label if that is the name of a defect."""
    if not isinstance(row, dict):
        raise UserError(f"{source}: expected a JSON object with image_path, label, class_name and mask_path")
    row = {"".join(c for c in str(key).casefold() if c.isalnum()): value for key, value in row.items()}
    values = {name: row[key] for name, keys in _KEYS.items() for key in reversed(keys) if key in row}
    column = next((name for name in ("label", "kind", "category") if name in values), "")
    if "image" not in values or not column:
        raise UserError(f"{source}: expected image_path and label, or similar, among {list_names(list(row))}")
    image = existing_file(values["image"], source, "image_path", root)
    label, word = _label(values[column], source, arguments.normal)
    name = values.get("class", arguments.class_name or "object")
    if column != "category" and "class" not in values:
        name = values.get("category", name)
    name = arguments.class_name if name is None else name
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{source}: class_name must be non-empty text, not {short_repr(name)} (or --class_name)")
    mask = None
    if label and values.get("mask") not in (None, ""):
        mask = existing_file(values["mask"], source, "mask_path", root)
    split = "train" if str(values.get("split")).lower() == "train" else "test"
    kind = values.get("kind") or word
    # The kind of defect in a path of MVTec's layout.
    *_, test, folder, _ = ("", "", *PurePosixPath(str(values["image"]).replace("\\", "/")).parts)
    if not kind or not isinstance(kind, str):
        kind = folder if test.lower() == "test" else ANOMALOUS
    return Item(image, label, name, kind, mask, split), word


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
