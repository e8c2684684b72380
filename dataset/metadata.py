"""The list of a dataset's test images, in JSON lines (docs/datasets.md).

The first line of a list that this program wrote names its dataset (`ListHeader`). Each further line is an image:
`image_path`, `label` (0 normal, 1 anomalous), `class_name`, and `mask_path` if it is anomalous. Paths are relative to
the dataset's folder. Lists of other origin have no header.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any

from dataset.catalog import CATALOG, IMAGE_METRICS
from dataset.folders import describe_folder, existing_path
from dataset.images import without_black_masks
from dataset.layouts import LAYOUTS, missing_mask
from dataset.locate import LocatedDataset, check_lookalikes
from dataset.prompts import MAX_NAME_LENGTH
from dataset.records import Record, natural_key, parse_label, path_within
from utils.errors import UserError
from utils.files import write_text
from utils.paths import is_file, safe_name
from utils.reading import read_json_lines, short_repr

logger = logging.getLogger(__name__)

SCHEMA = 1


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

    Without `metadata_file` the dataset's folder is listed. For a dataset of the catalog the list is saved there, and a
    warning says how many images were added or removed since it was saved last. A warning names the classes of the
    catalog without images, and masks without an anomalous pixel, which count as missing.

    Args:
        located: The dataset.
        metadata_file: A list to read instead.

    Returns:
        The images, in the order of the list.

    Raises:
        UserError: There are no images, a line of `metadata_file` is invalid, or it is another dataset's list.
    """
    spec = located.spec
    is_own = CATALOG.get(spec.name) is not spec
    if metadata_file is not None:
        header, records = read_list(metadata_file)
        if header is not None and header.dataset != spec.name:
            raise UserError(
                f"the metadata {metadata_file} lists images of {short_repr(header.dataset)}, not of {spec.name}"
            )
        records = [_with_existing_paths(record, located.root) for record in records]
    else:
        records = build_metadata(located)
        anomalous = sum(record.label for record in records)
        normal = len(records) - anomalous
        papers = "; papers count {} and {}".format(*spec.size) if spec.size not in (None, [normal, anomalous]) else ""
        counts = (len(records), normal, anomalous)
        logger.info("%s: %d images (%d normal, %d anomalous)%s", spec.name, *counts, papers)
        present = {record.class_name for record in records}
        if missing := [class_name for class_name in spec.class_names if class_name not in present]:
            logger.warning("%s: no images of %s in %s", spec.name, ", ".join(missing), located.root)
        if not is_own:
            _save_list(located, records)
    return without_black_masks(located.root, records) if is_own else records


def _save_list(located: LocatedDataset, records: Sequence[Record]) -> None:
    """Save the list of a dataset in its folder, unless it is there already; log what has changed since the last one."""
    file = list_file(located)
    header = ListHeader(located.spec.name, *located.layout())
    if is_file(file):
        try:
            saved_header, saved = read_list(file)
        except UserError as error:
            logger.warning("%s; delete that file to save the list of images", error)
            return
        if (saved_header, saved) == (header, records):
            return
        if saved_header is None:
            logger.warning("%s is not a list that was saved here and is not replaced: pass it with --metadata", file)
            return
        new, old = ({record.image_path for record in each} for each in (records, saved))
        changes = [f"{len(paths)} {word}" for word, paths in (("added", new - old), ("removed", old - new)) if paths]
        if changes:
            text, example = " and ".join(changes), min(new - old or old - new)
            logger.warning("%s: images were %s since %s, such as %s", header.dataset, text, file, example)
    rows = [{name: value for name, value in asdict(record).items() if value is not None} for record in records]
    try:
        write_text(file, "".join(json.dumps(row) + "\n" for row in (asdict(header), *rows)))
        logger.info("the list of images is saved in %s", file)
    except OSError as error:
        logger.info("the list of images cannot be saved in %s (%s)", file, error)


def build_metadata(located: LocatedDataset) -> list[Record]:
    """List the test split from the dataset's folders: class by class, each class in natural order of its paths.

    Anomalous images may lack a mask if the dataset is not in the catalog, or has no masks there.

    Raises:
        UserError: No image or not every mask was found; the message says what was found and what is expected.
    """
    spec, root = located.spec, located.root
    check_lookalikes(spec, root)
    layout = LAYOUTS[located.layout()[0]]
    expected = f"expected {', or '.join(LAYOUTS[name].expected for name in spec.layouts)}"
    try:
        records = layout.records(root, list(spec.class_names))
        if spec.metrics == IMAGE_METRICS:
            records = [replace(record, mask_path=None) for record in records]
        elif CATALOG.get(spec.name) is spec and (unmasked := next(filter(attrgetter("lacks_mask"), records), None)):
            raise UserError(missing_mask(root, unmasked))
    except UserError as error:
        raise UserError(f"{error} ({expected}; for any other layout list the images with --metadata FILE)") from error
    if not records:
        raise UserError(
            f"no test images of {spec.name} in {root}, which holds {describe_folder(root)}: {expected}; or list the "
            "images with --metadata FILE, score images without labels with --image, or name a dataset of the catalog "
            f"and --data_root. {_conversion_note(root)}"
        )
    order = {class_name: i for i, class_name in enumerate(spec.class_names)}
    return sorted(records, key=lambda record: (order[record.class_name], natural_key(record.image_path)))


def _conversion_note(root: Path) -> str:
    """Whether `dataset.convert` reads a folder."""
    from dataset.convert.arguments import ConversionArguments
    from dataset.convert.sources import read_source

    try:
        read_source(ConversionArguments(source=root, target=root / "NEW_FOLDER"))
    except UserError as error:
        return f"Conversion: {error}"
    return f"Conversion to this layout: python -m dataset.convert {root} NEW_FOLDER"


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


def _with_existing_paths(record: Record, root: Path) -> Record:
    """A record whose paths have the Unicode form of the files, since lists are often made on another system."""
    mask_path = None if record.mask_path is None else existing_path(root, record.mask_path)
    return replace(record, image_path=existing_path(root, record.image_path), mask_path=mask_path)


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
        raise UserError(f"{source}: {key} must be non-empty text, not {short_repr(value)}")
    return value
