"""From a dataset's name to the records, prompts and loaders of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from dataset.catalog import DatasetSpec, readable_name
from dataset.class_names import class_display_names
from dataset.few_shot import few_shot, split_shot
from dataset.folders import find_images
from dataset.images import drop_bad_images, find_bad_images
from dataset.locate import LocatedDataset, locate_dataset
from dataset.metadata import load_records
from dataset.options import AS_USUAL, HALF, AugmentationConfig
from dataset.prompts import build_prompts
from dataset.records import Record, metadata_digest, natural_key
from dataset.samples import AnomalyDataset, SeededSampler
from model.clip import FrozenCLIP
from model.text import Prompts
from utils.errors import UserError
from utils.seeding import derive_seed

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
    spec = DatasetSpec(name, domain, ("mvtec",), name, {class_name: readable_name(class_name)})
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
        records, dropped = drop_bad_images(located.root, records)
        logger.info("%s: %d images that cannot be read are left out", located.spec.name, dropped)
        if not records:
            raise UserError(f"{located.spec.name}: none of its {dropped} images in {located.root} can be read")
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
        f"Pixel metrics are n/a for {_some(list(classes))}: {len(lacking)} of {of_classes} anomalous images have no "
        f"mask, such as {lacking[0].image_path}"
    ]


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more classes" if len(names) > most else "")


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


def make_dataset(
    data: TaskData, clip: FrozenCLIP, augment: str = "none", choices: AugmentationConfig = AS_USUAL
) -> AnomalyDataset:
    """Samples at the CLIP model's size and normalisation, in class order."""
    order = {name: row for row, name in enumerate(data.classes)}
    records = sorted(data.records, key=lambda record: order[record.class_name])
    return AnomalyDataset(
        data.located.root, records, clip.img_size, clip.mean, clip.std, augment, choices, data.mask_threshold
    )


def training_loader(
    data: TaskData,
    clip: FrozenCLIP,
    augment: str,
    batch_size: int,
    stage: int,
    seed: int,
    num_workers: int,
    choices: AugmentationConfig = AS_USUAL,
) -> tuple[DataLoader, SeededSampler]:
    """Augmented batches in an order and with augmentations that follow from (seed, stage, loop, epoch, index) alone."""
    samples = make_dataset(data, clip, augment, choices)
    sampler = SeededSampler(len(samples), seed, stage)
    loader = DataLoader(
        samples,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    return loader, sampler


def evaluation_loader(samples: AnomalyDataset, batch_size: int, num_workers: int) -> DataLoader:
    """Batches in the records' order, none of which holds images of two classes."""
    batches = []
    for _, positions in groupby(range(len(samples)), key=lambda position: samples.records[position].class_name):
        chosen = list(positions)
        batches += [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    return DataLoader(samples, batch_sampler=batches, num_workers=num_workers, pin_memory=torch.cuda.is_available())


def hold_out(data: TaskData, fraction: float, seed: int) -> tuple[TaskData, TaskData]:
    """Split off a share of the images of each class and label: (to train on, held out).

    At least one image of each stays on both sides. The images held out are read once, since a bad one would stop the
    run only when epochs have been trained, and without it the split is another one. Raises `UserError` for a bad one,
    and where a class has a single image of a kind.
    """
    kept, held = [], []
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in data.records:
        groups.setdefault((record.class_name, record.label), []).append(record)
    for (class_name, label), records in groups.items():
        kind = "anomalous" if label else "normal"
        if len(records) < 2:
            raise UserError(f"--val_fraction: class {class_name!r} has a single {kind} image, none can be held out")
        generator = torch.Generator().manual_seed(derive_seed(seed, len(held)))
        order = torch.randperm(len(records), generator=generator).tolist()
        count = min(max(1, round(fraction * len(records))), len(records) - 1)
        held += [records[index] for index in order[:count]]
        kept += [records[index] for index in sorted(order[count:])]
    for _, problem in find_bad_images(data.located.root, held)[:1]:
        raise UserError(f"{problem} (held out by --val_fraction; --skip_bad_images goes on without it)")
    logger.info("Held out for validation: %d of %d images", len(held), len(data.records))
    return replace(data, records=kept), replace(data, records=held)
