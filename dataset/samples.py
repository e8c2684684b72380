"""Records as tensors, in an order that depends on the seed and the position in the run alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms.v2 import functional as F

from dataset.augmentation import Augmentation, change_colours, draw_augmentation, move_pair
from dataset.images import normalised, per_channel, read_pair, resize_image, resize_mask
from dataset.options import DEFAULT_AUGMENTATION, AugmentationConfig
from dataset.records import HALF, Record
from utils.processes import Share
from utils.seeding import derive_seed

AUGMENTATIONS = ("none", "geometric", "full")


@dataclass(frozen=True)
class SampleKey:
    """Which record to load, and the seed of its augmentation."""

    index: int
    seed: int


class AnomalyDataset(Dataset[dict[str, Any]]):
    """Records as samples.

    A sample is a dict with `image` (float32 (3, S, S), normalised), `mask` (float32 (1, S, S), 1 where anomalous),
    `label` (0 normal, 1 anomalous), `class_name`, `image_path` and `index` (the record's position).

    With augmentation, samples are taken by `SampleKey`, whose seed alone decides the parameters; a plain index raises
    ValueError. An anomaly that was moved out of the image leaves a normal image, label 0, unless `choices.keep_label`.

    Args:
        root: The dataset's folder.
        records: The images.
        img_size: Side S of the square images, pixels; images are resized bicubic, masks to the nearest pixel.
        mean: Of each channel, for the normalisation.
        std: Of each channel.
        augment: "none"; "geometric" rotates, shifts and flips image and mask together; "full" also changes brightness,
            contrast and saturation.
        choices: Details of the augmentation.
        mask_threshold: As for `dataset.images.read_mask`.

    Raises:
        UserError: From taking a sample, if a file cannot be read or a mask's size is not that of its image.
    """

    def __init__(
        self,
        root: Path,
        records: Sequence[Record],
        img_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: str = "none",
        choices: AugmentationConfig = DEFAULT_AUGMENTATION,
        mask_threshold: float | str = HALF,
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, not {augment!r}")
        self.root = Path(root)
        self.records = list(records)
        self.img_size = img_size
        self.augment = augment
        self.choices = choices
        self.mask_threshold = mask_threshold
        self.mean, self.std = per_channel(mean), per_channel(std)
        colour = torch.zeros(3, 1, 1) + (self.mean if choices.augment_fill == "mean" else 0)
        # In the values of what is moved: the normalised image, or 8-bit RGB.
        separate = choices.augment_moves == "separate"
        fill = (colour - self.mean) / self.std if separate else (255 * colour).round().int()
        self.fill = fill.flatten().tolist()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        index = key.index if isinstance(key, SampleKey) else key
        record = self.records[index]
        label = record.label
        if self.augment == "none":
            pixels, mask = self._tensors(*self._resized(*self._read(record)))
        elif isinstance(key, SampleKey):
            pixels, mask, lost = self._augmented(record, draw_augmentation(key.seed))
            label = 0 if lost and not self.choices.keep_label else label
        else:
            raise ValueError("augmentation needs a SampleKey: give the loader a SeededSampler")
        return {
            "image": pixels,
            "mask": (mask > 0).float(),
            "label": label,
            "class_name": record.class_name,
            "image_path": record.image_path,
            "index": index,
        }

    def _read(self, record: Record) -> tuple[Image.Image, Image.Image]:
        return read_pair(self.root, record, self.mask_threshold)

    def _resized(self, image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
        size = (self.img_size, self.img_size)
        return resize_image(image, size), resize_mask(mask, size)

    def _tensors(self, image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
        return normalised(image, self.mean, self.std), F.pil_to_tensor(mask)

    def _augmented(self, record: Record, parameters: Augmentation) -> tuple[Tensor, Tensor, bool]:
        """Image and mask of a record after augmentation, and whether its anomaly was moved out of the image."""
        image, mask = self._read(record)
        recolour = self.augment == "full"
        if recolour and self.choices.jitter_first:
            image = change_colours(image, parameters)
        image, mask = self._resized(image, mask)
        if recolour and not self.choices.jitter_first:
            image = change_colours(image, parameters)
        if self.choices.augment_moves == "separate":
            return move_pair(*self._tensors(image, mask), parameters, self.choices, self.fill)
        image, mask, lost = move_pair(image, mask, parameters, self.choices, self.fill)
        return *self._tensors(image, mask), lost


class SeededSampler(Sampler[SampleKey]):
    """Every index once, in an order and with seeds that follow from (seed, stage, loop, epoch) alone.

    Call `set_position` before each epoch; iterating twice at one position gives the same keys.

    Args:
        length: How many indices there are.
        seed: The run's seed.
        stage: The number of the training stage.
    """

    def __init__(self, length: int, seed: int, stage: int) -> None:
        self.length = length
        self.seed = seed
        self.stage = stage
        self.set_position(loop=1, epoch=1)

    def set_position(self, loop: int, epoch: int) -> None:
        self.position = (self.seed, self.stage, loop, epoch)

    def __iter__(self) -> Iterator[SampleKey]:
        for index in np.random.default_rng(derive_seed(*self.position)).permutation(self.length).tolist():
            yield SampleKey(index, derive_seed(*self.position, index))

    def __len__(self) -> int:
        return self.length


class SharedBatches(Sampler[list[SampleKey]]):
    """Batches of keys, of which each process of a data-parallel run loads its share; the last batch may be smaller.

    A process without a share of a batch loads the first key, so that all processes take the same steps.
    """

    def __init__(self, sampler: SeededSampler, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def set_position(self, loop: int, epoch: int) -> None:
        self.sampler.set_position(loop, epoch)

    def shares(self) -> list[Share]:
        """The share of this process in each batch."""
        remaining = range(len(self.sampler), 0, -self.batch_size)
        return [Share.of(min(count, self.batch_size), self.rank, self.world_size) for count in remaining]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        keys = list(self.sampler)
        for number, share in enumerate(self.shares()):
            first = number * self.batch_size + share.first
            yield keys[first : first + max(1, share.size)]

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)
