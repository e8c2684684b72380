"""Which images a dataset's test split has: read from its folders once, then kept as JSON lines.

The first line says whose list it is (`Tie`). Then comes one line per image: `image_path`, `label` (0 normal, 1
anomalous), `class_name`, and `mask_path` for anomalous ones, with paths relative to the dataset's folder and forward
slashes. Lists made elsewhere have no first line of that kind.
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
from dataset.prompts import LONGEST_NAME
from dataset.records import Record, natural_key, path_within
from utils.errors import UserError
from utils.files import write_text
from utils.paths import is_file, safe_name
from utils.reading import read_json_lines, short_repr

logger = logging.getLogger(__name__)

# Kept by earlier versions, without a tie; two datasets in one folder would share it.
UNTIED_FILE = "metadata_test.jsonl"
SCHEMA = 1

_LABELS = {0: 0, 1: 1, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


@dataclass(frozen=True)
class Tie:
    """Whose a kept list is: the dataset's name, its layout (`dataset.layouts`), and the classes that were there."""

    dataset: str
    layout: str
    classes: tuple[str, ...]
    schema: int = SCHEMA


def kept_file(located: LocatedDataset) -> Path:
    """Where the list of a dataset is kept: in its folder, under its name."""
    return located.root / f"metadata_test_{safe_name(located.spec.name)}.jsonl"


def load_records(located: LocatedDataset, metadata_file: Path | None = None) -> list[Record]:
    """The images of a dataset's test split: from `metadata_file`, from the kept list, or built and then kept.

    A kept list is made anew where it is another dataset's, and where classes were added or left out since. Where the
    folder cannot be written the records stay in memory; so they do where masks are missing, which may be added. Classes
    of the catalog that are not there are named in a warning, each time. Raises UserError for a bad line (file, number
    and key), for a `metadata_file` that says it is another dataset's, and for a kept list that names images which are
    gone.
    """
    if metadata_file is not None:
        tie, records = read_list(Path(metadata_file))
        if tie is not None and tie.dataset != located.spec.name:
            raise UserError(
                f"the metadata {metadata_file} lists images of {short_repr(tie.dataset)}, not of {located.spec.name}"
            )
        return records
    layout, classes = located.layout()
    tie, kept = Tie(located.spec.name, layout, tuple(classes)), kept_file(located)
    for file in (kept, located.root / UNTIED_FILE):
        records = _kept_records(file, located, tie) if is_file(file) else None
        if records is not None:
            logger.info("%s listed in %s (delete it to have it built again)", _counted(records), file)
            break
    else:
        records = build_metadata(located)
        if any(record.lacks_mask for record in records):
            logger.info("%s found; their list is not kept, since masks are missing", _counted(records))
            return records
        try:
            write_text(kept, "".join(json.dumps(row) + "\n" for row in (asdict(tie), *map(_row, records))))
            logger.info("%s found, their list is kept in %s", _counted(records), kept)
        except OSError as error:
            logger.info("%s found; their list is not kept, %s cannot be written (%s)", _counted(records), kept, error)
    found = {record.class_name for record in records}
    missing = [class_name for class_name in located.spec.class_names if class_name not in found]
    if missing:
        logger.warning("%s: no images of %s in %s", located.spec.name, ", ".join(missing), located.root)
    return records


def build_metadata(located: LocatedDataset) -> list[Record]:
    """List the test split from the dataset's folders: class by class, each class in natural order of its paths.

    Anomalous images of own folders may lack a mask. Raises UserError, with what was found and what is expected, where
    no image is found or one lacks what it needs.
    """
    spec, root = located.spec, located.root
    layout = LAYOUTS[located.layout()[0]]
    expected = ", or ".join(LAYOUTS[name].expected for name in spec.layouts)
    help_line = f"expected {expected}; --metadata FILE takes a list of the images in any other layout"
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
            "(a dataset of the catalog is given by its name, with --data_root)"
        )
    order = {class_name: i for i, class_name in enumerate(spec.class_names)}
    return sorted(records, key=lambda record: (order[record.class_name], natural_key(record.image_path)))


def read_list(path: Path) -> tuple[Tie | None, list[Record]]:
    """A list of images, and whose it is where it says so; UserError for a bad line, with file, number and key."""
    rows = list(read_json_lines(path, name="the metadata"))
    tie = None
    if rows and isinstance(rows[0][1], dict) and "schema" in rows[0][1]:
        tie = _parse_tie(rows[0][1], rows[0][0])
    records = [_parse_row(row, where, tie is not None) for where, row in rows[tie is not None :]]
    if not records:
        raise UserError(f"the metadata {path} lists no image: expected one JSON object per line")
    return tie, records


def _kept_records(kept: Path, located: LocatedDataset, now: Tie) -> list[Record] | None:
    """The records of a kept list, None where it must be made anew; `now` is what a list made now would be tied to."""
    try:
        tie, records = read_list(kept)
    except UserError as error:
        raise UserError(f"{error}; delete that file to have it built again") from error
    gone = [record.image_path for record in records if not is_file(located.root / record.image_path)]
    listed = tuple(dict.fromkeys(record.class_name for record in records)) if tie is None else tie.classes
    if tie is None:
        own = set(listed) <= set(located.spec.class_names) and len(gone) < len(records)
    else:
        own = (tie.dataset, tie.layout) == (now.dataset, now.layout)
    if not own:
        logger.info("%s is not read: it does not list %s in this layout", kept, located.spec.name)
        return None
    added = [name for name in now.classes if name not in listed]
    left_out = [name for name in listed if name not in now.classes]
    if added or left_out:
        changes = [f"{what} {', '.join(names)}" for what, names in (("with", added), ("without", left_out)) if names]
        logger.warning("%s is now %s: its images are listed again", located.spec.name, " and ".join(changes))
        return None
    if gone:
        raise UserError(
            f"{kept} names {len(gone)} image(s) that are not there any more, such as {gone[0]}: "
            "delete that file to have it built again"
        )
    return records


def _counted(records: Sequence[Record]) -> str:
    anomalous = sum(record.label for record in records)
    return f"{len(records)} images ({len(records) - anomalous} normal, {anomalous} anomalous)"


def _row(record: Record) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if value is not None}


def _parse_tie(row: dict[str, Any], where: str) -> Tie:
    if row["schema"] != SCHEMA or isinstance(row["schema"], bool):
        raise UserError(f"{where}: schema must be {SCHEMA}, not {short_repr(row['schema'])}")
    classes = row.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{where}: classes must be a list of names, not {short_repr(classes)}")
    return Tie(_text(row, "dataset", where), _text(row, "layout", where), tuple(classes))


def _parse_row(row: Any, where: str, as_written: bool) -> Record:
    """A line of a list; `as_written`: written by this program, so that its paths need no mending."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object with image_path, label, class_name and mask_path")
    class_name = _text(row, "class_name", where)
    if len(class_name) > LONGEST_NAME:
        raise UserError(f"{where}: class_name must have at most {LONGEST_NAME} characters, not {len(class_name)}")
    label = parse_label(row.get("label"), where)
    paths = {"image_path": _text(row, "image_path", where)}
    # A normal image's mask is empty by definition, so what some files name there is not read.
    if label:
        paths["mask_path"] = _text(row, "mask_path", where)
    if not as_written:
        paths = {key: str(PurePosixPath(path.strip().replace("\\", "/"))) for key, path in paths.items()}
    checked = {key: path_within(path, where, key) for key, path in paths.items()}
    return Record(label=label, class_name=class_name, **checked)


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} must be a non-empty text, not {short_repr(value)}")
    return value


def parse_label(value: object, where: str) -> int:
    """A label as lists have it, 0 (normal) or 1 (anomalous); UserError, which begins with `where`, for none."""
    key = value.strip().lower() if isinstance(value, str) else value
    # True and 1.0 are found under 1; lists and objects cannot be looked up.
    if not isinstance(key, str | int | float) or key not in _LABELS:
        raise UserError(f"{where}: label must be 0 (normal) or 1 (anomalous), not {short_repr(value)}")
    return _LABELS[key]
