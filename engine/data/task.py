"""From a dataset's name to the records and prompts of a run; without a model, so before torch is imported."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dataset.catalog import mvtec_spec, readable_name
from dataset.class_names import class_display_names
from dataset.few_shot import few_shot, split_shot
from dataset.folders import find_images
from dataset.images import drop_bad_images
from dataset.locate import LocatedDataset, locate_dataset
from dataset.metadata import load_records
from dataset.options import HALF
from dataset.prompts import build_prompts
from dataset.records import Record, metadata_digest, natural_key
from utils.errors import UserError
from utils.text import list_names

if TYPE_CHECKING:
    from model.clip import FrozenCLIP
    from model.text import Prompts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """The images of a task: where they are, their records, and each class's name in the prompts, in class order.

    mask_threshold: which pixels of a mask are anomalous (`dataset.images.read_mask`).
    """

    located: LocatedDataset
    records: list[Record]
    names: dict[str, str]
    digest: str
    mask_threshold: str | float = HALF

    @property
    def classes(self) -> list[str]:
        return list(self.names)

    def of_class(self, class_name: str) -> list[Record]:
        """The records of a class, in their order."""
        return [record for record in self.records if record.class_name == class_name]

    def lacking_masks(self, class_name: str | None = None) -> list[Record]:
        """The anomalous images without a mask, of one class or of all."""
        return [r for r in self.records if r.lacks_mask and class_name in (None, r.class_name)]

    def prompts(self, clip: FrozenCLIP) -> Prompts:
        """The prompts of all classes, in class order."""
        from model.text import Prompts  # torch takes seconds, and what has a CLIP has imported it

        return Prompts.from_texts(clip, [build_prompts(name) for name in self.names.values()])


def load_task(
    dataset: str,
    data_root: Path | None = None,
    metadata: Path | None = None,
    class_names: str | Path | None = None,
    skip_bad_images: bool = False,
    mask_threshold: str | float = HALF,
) -> TaskData:
    """All records of a dataset's test split; raises `UserError` for whatever is missing (see `dataset`)."""
    located = locate_dataset(dataset, data_root)
    return _make_task(located, load_records(located, metadata), class_names, skip_bad_images, mask_threshold)


def load_two_folders(
    normal: Path, anomalous: Path, class_name: str, domain: str = "industrial", skip_bad_images: bool = False
) -> TaskData:
    """The images of two folders and of those in them, one class without masks; `UserError` where they share images."""
    # Not resolved: a link's own name is the one that was given.
    folders = [Path(os.path.abspath(folder)) for folder in (normal, anomalous)]  # noqa: PTH100
    found = [find_images(path, flag) for path, flag in zip(folders, ("--normal", "--anomalous"), strict=True)]
    for line in [line for each in found for line in each.problems]:
        logger.warning("left out: %s", line)
    good, bad = ({os.path.realpath(path): path for path in each.images} for each in found)
    if both := good.keys() & bad.keys():
        raise UserError(f"--normal and --anomalous share {len(both)} images, such as {good[min(both)]}")
    try:
        root = Path(os.path.commonpath(folders))
    except ValueError:  # on two drives of Windows
        root = Path(folders[0].anchor)
    name = f"{folders[0].name}_and_{folders[1].name}"
    spec = mvtec_spec(name, {class_name: readable_name(class_name)}, domain)
    records = [
        Record((path.relative_to(root) if path.is_relative_to(root) else path).as_posix(), label, class_name)
        for label, each in enumerate(found)
        for path in each.images
    ]
    records.sort(key=lambda record: natural_key(record.image_path))
    return _make_task(LocatedDataset(spec, root), records, None, skip_bad_images)


def _make_task(
    located: LocatedDataset,
    records: list[Record],
    class_names: str | Path | None,
    skip_bad_images: bool,
    mask_threshold: str | float = HALF,
) -> TaskData:
    digest = metadata_digest(records)
    if skip_bad_images:
        readable = drop_bad_images(located.root, records)
        logger.info("%s: %d images cannot be read and are left out", located.spec.name, len(records) - len(readable))
        if not readable:
            raise UserError(f"{located.spec.name}: none of its {len(records)} images in {located.root} can be read")
        records = readable
    present = {record.class_name for record in records}
    display = class_display_names(located.spec, class_names, dict.fromkeys(record.class_name for record in records))
    names = {name: text for name, text in display.items() if name in present}
    return TaskData(located, records, names, digest, mask_threshold)


def mask_notes(data: TaskData) -> list[str]:
    """Why pixel metrics are undefined, in a sentence, where anomalous images have no mask."""
    lacking = data.lacking_masks()
    if not lacking:
        return []
    anomalous = sum(record.label for record in data.records)
    if len(lacking) == anomalous:
        return [f"Pixel metrics are n/a: none of the {anomalous} anomalous images has a mask"]
    classes = dict.fromkeys(record.class_name for record in lacking)
    of_classes = sum(record.label for record in data.records if record.class_name in classes)
    return [
        f"Pixel metrics are n/a for {list_names(list(classes))}: {len(lacking)} of {of_classes} anomalous images "
        f"have no mask, such as {lacking[0].image_path}"
    ]


def check_masks(data: TaskData, needed_for: str) -> None:
    """Raise `UserError`, with what needs masks, where an anomalous image has none."""
    if lacking := data.lacking_masks():
        raise UserError(
            f"{data.located.spec.name}: {len(lacking)} of {sum(record.label for record in data.records)} anomalous "
            f"images have no mask, such as {lacking[0].image_path}; {needed_for}"
        )


def choose_training_images(data: TaskData, training_mode: str, shot: int, seed: int) -> TaskData:
    """The images that training sees: all, or `shot` of each class."""
    records = list(data.records)
    if training_mode == "few_shot":
        records = few_shot(data.records, shot, seed)
        logger.info("--shot %d: %d anomalous and %d normal images of each class", shot, *split_shot(shot))
    anomalous = sum(record.label for record in records)
    logger.info(
        "Training on %s: %d images of %d classes, %d normal and %d anomalous",
        data.located.spec.name,
        len(records),
        len(data.names),
        len(records) - anomalous,
        anomalous,
    )
    return replace(data, records=records)
