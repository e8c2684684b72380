"""Samples and loaders of a task."""

import logging
import os
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from dataset.images import find_bad_images
from dataset.options import DEFAULT_AUGMENTATION, AugmentationConfig
from dataset.records import Record
from dataset.samples import AnomalyDataset, SeededSampler, SharedBatches
from engine.data.task import TaskData
from model.clip import FrozenCLIP
from utils.errors import UserError
from utils.seeding import derive_seed

logger = logging.getLogger(__name__)

# Through which workers pass batches, on Linux.
SHARED_MEMORY = Path("/dev/shm")


def make_dataset(
    data: TaskData, clip: FrozenCLIP, augment: str = "none", choices: AugmentationConfig = DEFAULT_AUGMENTATION
) -> AnomalyDataset:
    """Samples at the CLIP model's size and normalisation, in class order."""
    order = {name: row for row, name in enumerate(data.classes)}
    records = sorted(data.records, key=lambda record: order[record.class_name])
    return AnomalyDataset(
        data.located.root, records, clip.img_size, clip.mean, clip.std, augment, choices, data.mask_threshold
    )


def training_loader(
    samples: AnomalyDataset,
    batch_size: int,
    stage: int,
    seed: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Batches whose order and augmentation follow from (seed, stage, loop, epoch, index) alone.

    Each of the `world_size` processes loads its share of every batch.
    """
    num_workers = usable_workers(samples, batch_size, num_workers)
    return DataLoader(
        samples,
        batch_sampler=SharedBatches(SeededSampler(len(samples), seed, stage), batch_size, rank, world_size),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )


def evaluation_loader(
    samples: AnomalyDataset,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Batches of one class each, in the records' order; each of the `world_size` processes loads every n-th batch."""
    num_workers = usable_workers(samples, batch_size * world_size, num_workers)
    batches = batches_of_classes(samples, batch_size)[rank::world_size]
    return DataLoader(samples, batch_sampler=batches, num_workers=num_workers, pin_memory=pin_memory)


def usable_workers(samples: AnomalyDataset, batch_size: int, num_workers: int) -> int:
    """`num_workers`; 0, with a warning, if their batches do not fit into shared memory, as in many containers.

    batch_size: of all processes.
    """
    if not num_workers or not SHARED_MEMORY.is_dir():
        return num_workers
    # Each worker loads two batches ahead; two more are passed on and in use.
    batches = min(2 * num_workers + 2, -(-len(samples) // batch_size))
    # Three channels and a mask of float32.
    needed = batches * batch_size * 4 * 4 * samples.img_size**2
    state = os.statvfs(SHARED_MEMORY)
    free = state.f_bavail * state.f_frsize
    if needed <= free:
        return num_workers
    logger.warning(
        "%s has %d MB of free memory, but %d workers need about %d MB: images are loaded without workers, which is "
        "slower. In a container, enlarge it (docker run --shm-size 2g); --num_workers 0 avoids this warning",
        SHARED_MEMORY,
        free / 2**20,
        num_workers,
        needed / 2**20,
    )
    return 0


def batches_of_classes(samples: AnomalyDataset, batch_size: int) -> list[list[int]]:
    """Positions of the samples, in order, in batches of one class each."""
    batches = []
    for _, positions in groupby(range(len(samples)), key=lambda position: samples.records[position].class_name):
        chosen = list(positions)
        batches += [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    return batches


def hold_out(data: TaskData, fraction: float, seed: int) -> tuple[TaskData, TaskData]:
    """Split off a share of the images of each class and label, but at least one and not all.

    Args:
        data: The images.
        fraction: The share to hold out, 0 to 1.
        seed: Decides which images are held out.

    Returns:
        The images to train on, and those held out.

    Raises:
        UserError: A class has a single image of a label, or a held-out image cannot be read.
    """
    training: list[Record] = []
    validation: list[Record] = []
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in data.records:
        groups.setdefault((record.class_name, record.label), []).append(record)
    for (class_name, label), records in groups.items():
        kind = "anomalous" if label else "normal"
        if len(records) < 2:
            raise UserError(
                f"--val_fraction: class {class_name!r} has a single {kind} image: add more, or omit the option"
            )
        generator = torch.Generator().manual_seed(derive_seed(seed, len(validation)))
        order = torch.randperm(len(records), generator=generator).tolist()
        count = min(max(1, round(fraction * len(records))), len(records) - 1)
        validation += [records[index] for index in order[:count]]
        training += [records[index] for index in sorted(order[count:])]
    # Read now: a bad image would stop the run after its first epochs, and restarting without it changes the split.
    for _, problem in find_bad_images(data.located.root, validation)[:1]:
        raise UserError(f"{problem} (held out by --val_fraction; --skip_bad_images leaves it out)")
    logger.info("Held out for validation: %d of %d images", len(validation), len(data.records))
    return replace(data, records=training), replace(data, records=validation)
