"""The images and class names of a run; a module without torch, since scripts check their data before they import it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset.catalog import mvtec_spec
from dataset.class_names import class_display_names
from dataset.few_shot import few_shot, split_shot
from dataset.folders import find_images
from dataset.images import drop_bad_images
from dataset.locate import LocatedDataset, locate_dataset
from dataset.metadata import load_records
from dataset.prompts import NAMES, build_prompts, readable_name
from dataset.records import HALF, Record, metadata_digest, natural_key
from utils.errors import UserError
from utils.paths import common_folder
from utils.text import list_names

if TYPE_CHECKING:
    from model.clip import FrozenCLIP
    from model.text import Prompts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """The images of a run and the names of their classes.

    Args:
        located: The dataset and its folder.
        records: The images.
        names: The name of each class in prompts, in class order.
        digest: Of all records of the dataset (`dataset.records.metadata_digest`).
        mask_threshold: As for `dataset.images.read_mask`.
    """

    located: LocatedDataset
    records: list[Record]
    names: dict[str, str]
    digest: str
    mask_threshold: str | float = HALF

    @property
    def classes(self) -> list[str]:
        return list(self.names)

    @property
    def anomalous(self) -> int:
        """The number of anomalous images."""
        return sum(record.label for record in self.records)

    def of_class(self, class_name: str) -> list[Record]:
        """The records of a class, in their order."""
        return [record for record in self.records if record.class_name == class_name]

    def lacking_masks(self, class_name: str | None = None) -> list[Record]:
        """The anomalous images without a mask, of one class or of all."""
        return [r for r in self.records if r.lacks_mask and class_name in (None, r.class_name)]

    def prompts(self, clip: FrozenCLIP) -> Prompts:
        """The prompts of all classes, in class order."""
        from model.text import Prompts  # torch is slow to import; whoever has a CLIP has imported it

        return Prompts.from_texts(clip, [build_prompts(name) for name in self.names.values()])


def load_task(
    dataset: str,
    data_root: Path | None = None,
    metadata: Path | None = None,
    class_names: str | Path | None = None,
    skip_bad_images: bool = False,
    mask_threshold: str | float | None = None,
    run: Mapping[str, Any] | None = None,
) -> TaskData:
    """Load the test split of a dataset.

    The arguments of a run replace missing ones: its data root if it contains the dataset, its metadata and file of
    class names for its own dataset, and `--class_names published` and its mask threshold for every dataset. Paths that
    no longer exist are ignored with a message.

    Args:
        dataset: A name in the catalog, or a folder in MVTec's layout (`dataset.locate.locate_dataset`).
        data_root: The folder of the datasets.
        metadata: A list of the images, instead of the one made from the folders.
        class_names: The source of the names in prompts (`dataset.class_names.class_display_names`).
        skip_bad_images: Leave out images that cannot be read.
        mask_threshold: As for `dataset.images.read_mask`. Default: the run's, else half of the largest value.
        run: Arguments of a run.

    Raises:
        UserError: The dataset, the list or the names cannot be found or read.
    """
    run = run or {}
    if data_root is None and (recorded := _existing(run, "data_root")):
        try:
            locate_dataset(dataset, recorded)
            data_root = recorded
        except UserError:
            logger.info("%s is not under the run's data root %s, which is ignored", dataset, recorded)
    if class_names is None and run.get("class_names") in NAMES:
        class_names = run["class_names"]
        logger.info("--class_names is that of the run: %s", class_names)
    if mask_threshold is None:
        mask_threshold = run.get("mask_threshold", HALF)
        if mask_threshold != HALF:
            logger.info("--mask_threshold is that of the run: %s", mask_threshold)
    if str(run.get("dataset")).lower() == dataset.lower():
        metadata = metadata or _existing(run, "metadata")
        class_names = class_names or _existing(run, "class_names")
    located = locate_dataset(dataset, data_root)
    return _make_task(located, load_records(located, metadata), class_names, skip_bad_images, mask_threshold)


def _existing(run: Mapping[str, Any], name: str) -> Path | None:
    """A path among a run's arguments, if it still exists."""
    if not run.get(name):
        return None
    path = Path(run[name])
    exists = path.exists()
    logger.info("--%s of the run: %s%s", name, path, "" if exists else " no longer exists and is ignored")
    return path if exists else None


def load_two_folders(
    normal: Path, anomalous: Path, class_name: str, domain: str = "industrial", skip_bad_images: bool = False
) -> TaskData:
    """Load the images in two folders and below as one class without masks; `UserError` if the folders share images."""
    # Not resolved: messages should show the names of links.
    folders = [Path(os.path.abspath(folder)) for folder in (normal, anomalous)]  # noqa: PTH100
    contents = [find_images(path, flag) for path, flag in zip(folders, ("--normal", "--anomalous"), strict=True)]
    good, bad = ({os.path.realpath(path): path for path in content.images} for content in contents)
    if both := good.keys() & bad.keys():
        raise UserError(f"--normal and --anomalous share {len(both)} images, such as {good[min(both)]}")
    root = common_folder(folders)
    spec = mvtec_spec(f"{folders[0].name}_and_{folders[1].name}", {class_name: readable_name(class_name)}, domain)
    records = [
        Record((path.relative_to(root) if path.is_relative_to(root) else path).as_posix(), label, class_name)
        for label, content in enumerate(contents)
        for path in content.images
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
    digest, name = metadata_digest(records), located.spec.name
    if skip_bad_images:
        readable = drop_bad_images(located.root, records)
        logger.info("%s: %d images cannot be read and are left out", name, len(records) - len(readable))
        if not readable:
            raise UserError(f"{name}: none of its {len(records)} images in {located.root} can be read")
        records = readable
    present = dict.fromkeys(record.class_name for record in records)
    display = class_display_names(located.spec, class_names, present)
    names = {class_name: text for class_name, text in display.items() if class_name in present}
    return TaskData(located, records, names, digest, mask_threshold)


def mask_notes(data: TaskData) -> list[str]:
    """A sentence about undefined pixel metrics if masks are missing."""
    lacking = data.lacking_masks()
    if not lacking:
        return []
    if len(lacking) == data.anomalous:
        return [f"Pixel metrics are n/a: none of the {data.anomalous} anomalous images has a mask"]
    classes = list(dict.fromkeys(record.class_name for record in lacking))
    of_classes = sum(record.label for record in data.records if record.class_name in classes)
    return [
        f"Pixel metrics are n/a for {list_names(classes)}: {len(lacking)} of {of_classes} anomalous images have no "
        f"mask, such as {lacking[0].image_path}"
    ]


def check_masks(data: TaskData, reason: str) -> None:
    """Raise `UserError`, with the reason why masks are required, if an anomalous image has none."""
    if lacking := data.lacking_masks():
        raise UserError(
            f"{data.located.spec.name}: {len(lacking)} of {data.anomalous} anomalous images have no mask, such as "
            f"{lacking[0].image_path}; {reason}"
        )


def choose_training_images(data: TaskData, training_mode: str, shot: int, seed: int) -> TaskData:
    """The images to train on: all, or with `training_mode` "few_shot" `shot` of each class."""
    if training_mode == "few_shot":
        data = replace(data, records=few_shot(data.records, shot, seed))
        logger.info("--shot %d: %d anomalous and %d normal images of each class", shot, *split_shot(shot))
    logger.info(
        "Training on %s: %d images of %d classes, %d normal and %d anomalous",
        data.located.spec.name,
        len(data.records),
        len(data.names),
        len(data.records) - data.anomalous,
        data.anomalous,
    )
    return data
