"""From the records of a task to samples and loaders."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import groupby

import torch
from torch.utils.data import DataLoader

from dataset.image_cache import open_cache
from dataset.images import find_bad_images
from dataset.options import AS_USUAL, AugmentationConfig
from dataset.records import Record
from dataset.samples import AnomalyDataset, SeededSampler, SharedBatches
from engine.data.task import TaskData
from model.clip import FrozenCLIP
from utils.errors import UserError
from utils.seeding import derive_seed

logger = logging.getLogger(__name__)


def make_dataset(
    data: TaskData, clip: FrozenCLIP, augment: str = "none", choices: AugmentationConfig = AS_USUAL
) -> AnomalyDataset:
    """Samples at the CLIP model's size and normalisation, in class order."""
    order = {name: row for row, name in enumerate(data.classes)}
    records = sorted(data.records, key=lambda record: order[record.class_name])
    root, size = data.located.root, clip.img_size
    kept = open_cache(root, records, size, data.cache_gib)
    return AnomalyDataset(root, records, size, clip.mean, clip.std, augment, choices, data.mask_threshold, kept)


def training_loader(
    data: TaskData,
    clip: FrozenCLIP,
    augment: str,
    batch_size: int,
    stage: int,
    seed: int,
    num_workers: int,
    choices: AugmentationConfig = AS_USUAL,
    process: int = 0,
    processes: int = 1,
) -> tuple[DataLoader, SeededSampler]:
    """Augmented batches in an order and with augmentations that follow from (seed, stage, loop, epoch, index) alone.

    process, processes: which of how many this is that share the images of each batch.
    """
    samples = make_dataset(data, clip, augment, choices)
    sampler = SeededSampler(len(samples), seed, stage)
    loader = DataLoader(
        samples,
        batch_sampler=SharedBatches(sampler, batch_size, process, processes),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=next(clip.parameters()).is_cuda,
    )
    return loader, sampler


def evaluation_loader(
    samples: AnomalyDataset,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
    process: int = 0,
    processes: int = 1,
) -> DataLoader:
    """Batches in the records' order, none of which holds images of two classes; pinned for copies to a GPU.

    process, processes: which of how many this is that take the batches in turn.
    """
    batches = batches_of_classes(samples, batch_size)[process::processes]
    return DataLoader(samples, batch_sampler=batches, num_workers=num_workers, pin_memory=pin_memory)


def batches_of_classes(samples: AnomalyDataset, batch_size: int) -> list[list[int]]:
    """The samples' positions in their order, in batches of one class each."""
    batches = []
    for _, positions in groupby(range(len(samples)), key=lambda position: samples.records[position].class_name):
        chosen = list(positions)
        batches += [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    return batches


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
