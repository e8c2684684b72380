"""The list of a dataset's test images, in JSON lines (docs/datasets.md).

The first line of a list that this program wrote names its dataset (`ListHeader`). Each further line is an image:
`image_path`, `label` (0 normal, 1 anomalous), `class_name`, and `mask_path` if it is anomalous. Paths are relative to
the dataset's folder. Lists of other origin have no header.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dataset.catalog import CATALOG
from dataset.folders import describe_folder
from dataset.layouts import LAYOUTS, missing_mask
from dataset.locate import LocatedDataset
from dataset.prompts import MAX_NAME_LENGTH
from dataset.records import Record, natural_key, path_within
from utils.errors import UserError
from utils.files import write_text
from utils.paths import is_file, safe_name
from utils.reading import read_json_lines, short_repr

logger = logging.getLogger(__name__)

SCHEMA = 1
_LABELS = {0: 0, 1: 1, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


@dataclass(frozen=True)
class ListHeader:
    """The dataset of a list, its layout (`dataset.layouts`), and the classes that were in its folder."""

    dataset: str
    layout: str
    classes: list[str]
    schema: int = SCHEMA


def list_file(located: LocatedDataset) -> Path:
    """The saved list of a dataset, in its folder."""
    return located.root / f"metadata_test_{safe_name(located.spec.name)}.jsonl"


def load_records(located: LocatedDataset, metadata_file: Path | None = None) -> list[Record]:
    """List the images of a dataset's test split.

    Without `metadata_file` the list in the dataset's folder is read. It is built and saved if there is none, if classes
    were added or removed, or if it is another dataset's. It is not saved if masks are missing, which may be added, or
    if the folder cannot be written to. A warning names the classes of the catalog without images.

    Args:
        located: The dataset.
        metadata_file: A list to read instead.

    Returns:
        The images, in the order of the list.

    Raises:
        UserError: A line of a list is invalid, `metadata_file` is another dataset's, or images of the saved list do not
            exist.
    """
    spec = located.spec
    if metadata_file is not None:
        header, records = read_list(metadata_file)
        if header is not None and header.dataset != spec.name:
            raise UserError(
                f"the metadata {metadata_file} lists images of {short_repr(header.dataset)}, not of {spec.name}"
            )
        return records
    header, file = ListHeader(spec.name, *located.layout()), list_file(located)
    saved = _saved_records(file, located, header) if is_file(file) else None
    if saved is not None:
        logger.info("%s listed in %s (delete it to list them again)", _counts(saved), file)
    records = _list_and_save(file, located, header) if saved is None else saved
    present = {record.class_name for record in records}
    if missing := [class_name for class_name in spec.class_names if class_name not in present]:
        logger.warning("%s: no images of %s in %s", spec.name, ", ".join(missing), located.root)
    return records


def _list_and_save(file: Path, located: LocatedDataset, header: ListHeader) -> list[Record]:
    records = build_metadata(located)
    if any(record.lacks_mask for record in records):
        logger.info("%s found; the list is not saved, since masks are missing", _counts(records))
        return records
    rows = [{name: value for name, value in asdict(record).items() if value is not None} for record in records]
    try:
        write_text(file, "".join(json.dumps(row) + "\n" for row in (asdict(header), *rows)))
        logger.info("%s found; the list is saved in %s", _counts(records), file)
    except OSError as error:
        logger.info("%s found; the list cannot be saved in %s (%s)", _counts(records), file, error)
    return records


def build_metadata(located: LocatedDataset) -> list[Record]:
    """List the test split from the dataset's folders: class by class, each class in natural order of its paths.

    Anomalous images may lack a mask if the dataset is not in the catalog.

    Raises:
        UserError: No image or not every mask was found; the message says what was found and what is expected.
    """
    spec, root = located.spec, located.root
    layout = LAYOUTS[located.layout()[0]]
    expected = ", or ".join(LAYOUTS[name].expected for name in spec.layouts)
    help_line = f"expected {expected}; for any other layout list the images with --metadata FILE"
    try:
        records = layout.records(root, list(spec.class_names))
        unmasked = next((record for record in records if record.lacks_mask), None)
        if unmasked is not None and CATALOG.get(spec.name) is spec:
            raise UserError(missing_mask(root, unmasked))
    except UserError as error:
        raise UserError(f"{error} ({help_line})") from error
    if not records:
        raise UserError(
            f"no test images of {spec.name} in {root}, which holds {describe_folder(root)}: {help_line} "
            "(use the name of a dataset of the catalog, with --data_root)"
        )
    order = {class_name: i for i, class_name in enumerate(spec.class_names)}
    return sorted(records, key=lambda record: (order[record.class_name], natural_key(record.image_path)))


def read_list(path: Path) -> tuple[ListHeader | None, list[Record]]:
    """Read a list of images and its header, if it has one; `UserError` names file, line and key of what is invalid."""
    rows = list(read_json_lines(path, name="the metadata"))
    header = None
    if rows and isinstance(rows[0][1], dict) and "schema" in rows[0][1]:
        source, row = rows.pop(0)
        header = _parse_header(row, source)
    if not rows:
        raise UserError(f"the metadata {path} lists no image: expected one JSON object per line")
    return header, [_parse_row(row, source, header is None) for source, row in rows]


def _saved_records(file: Path, located: LocatedDataset, header: ListHeader) -> list[Record] | None:
    """The records of the saved list; None if a new list, with the header `header`, has to replace it."""
    name = located.spec.name
    try:
        saved, records = read_list(file)
        if saved is None:
            raise UserError(f"{file}: the first line is not that of a saved list; pass own lists with --metadata")
    except UserError as error:
        raise UserError(f"{error}; delete that file to list the images again") from error
    if (saved.dataset, saved.layout) != (header.dataset, header.layout):
        logger.info("%s is replaced: it does not list %s in this layout", file, name)
        return None
    added = [class_name for class_name in header.classes if class_name not in saved.classes]
    removed = [class_name for class_name in saved.classes if class_name not in header.classes]
    if added or removed:
        changes = [f"{word} {', '.join(names)}" for word, names in (("with", added), ("without", removed)) if names]
        logger.warning("%s is now %s: its images are listed again", name, " and ".join(changes))
        return None
    gone = [record.image_path for record in records if not is_file(located.root / record.image_path)]
    if gone:
        raise UserError(
            f"{file} names {len(gone)} image(s) that do not exist, such as {gone[0]}: "
            "delete that file to list the images again"
        )
    return records


def _counts(records: Sequence[Record]) -> str:
    anomalous = sum(record.label for record in records)
    return f"{len(records)} images ({len(records) - anomalous} normal, {anomalous} anomalous)"


def _parse_header(row: dict[str, Any], source: str) -> ListHeader:
    # Not by a schema, which rejects the names of folders that are not UTF-8.
    if row["schema"] != SCHEMA or isinstance(row["schema"], bool):
        raise UserError(f"{source}: schema must be {SCHEMA}, not {short_repr(row['schema'])}")
    classes = row.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{source}: classes must be a list of names, not {short_repr(classes)}")
    return ListHeader(_text(row, "dataset", source), _text(row, "layout", source), classes)


def _parse_row(row: Any, source: str, clean_paths: bool) -> Record:
    """The record of a line; `clean_paths` accepts backslashes, "." and surrounding blanks, as other programs write."""
    if not isinstance(row, dict):
        raise UserError(f"{source}: expected a JSON object with image_path, label, class_name and mask_path")
    class_name = _text(row, "class_name", source)
    if len(class_name) > MAX_NAME_LENGTH:
        raise UserError(f"{source}: class_name has {len(class_name)} characters; the limit is {MAX_NAME_LENGTH}")
    label = parse_label(row.get("label"), source)
    # A normal image has no anomalous pixels, so that its mask is not read.
    paths = {key: _text(row, key, source) for key in ("image_path", "mask_path")[: 1 + label]}
    if clean_paths:
        paths = {key: str(PurePosixPath(path.strip().replace("\\", "/"))) for key, path in paths.items()}
    for key, path in paths.items():
        path_within(path, source, key)
    return Record(paths["image_path"], label, class_name, paths.get("mask_path"))


def _text(row: dict[str, Any], key: str, source: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{source}: {key} must be a non-empty text, not {short_repr(value)}")
    return value


def parse_label(value: object, source: str) -> int:
    """A label as lists have it, 0 (normal) or 1 (anomalous); otherwise `UserError`, which begins with `source`."""
    key = value.strip().lower() if isinstance(value, str) else value
    # True and 1.0 equal 1; lists and objects cannot be looked up.
    if not isinstance(key, str | int | float) or key not in _LABELS:
        raise UserError(f"{source}: label must be 0 (normal) or 1 (anomalous), not {short_repr(value)}")
    return _LABELS[key]
