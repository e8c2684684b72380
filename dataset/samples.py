"""From a record to tensors, in an order that depends on nothing but the run's position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import BatchSampler, Dataset, Sampler
from torchvision.transforms.v2 import functional as F

from dataset.augmentation import Augmentation, change_colours, draw_augmentation, move_pair
from dataset.image_cache import ImageCache, empty_mask, square_pair
from dataset.images import read_pair
from dataset.options import AS_USUAL, HALF, AugmentationConfig
from dataset.records import Record
from utils.processes import Share
from utils.seeding import derive_seed

AUGMENTATIONS = ("none", "geometric", "full")


def image_tensor(image: Image.Image, img_size: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """An RGB image as a model takes it: square (bicubic), normalised, float32 (3, S, S)."""
    return _normalised(_square(image, img_size), _per_channel(mean), _per_channel(std))


def _square(image: Image.Image, img_size: int) -> Image.Image:
    return image.resize((img_size, img_size), Image.Resampling.BICUBIC)


def _per_channel(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)


def _normalised(image: Image.Image, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    return (F.pil_to_tensor(image).float() / 255 - mean) / std


@dataclass(frozen=True)
class SampleKey:
    """Which record to load, and the seed of its augmentation."""

    index: int
    seed: int


class AnomalyDataset(Dataset):
    """Records as samples: a dict with

    - `image`: float32 (3, S, S), resized to a square (bicubic) and normalised with `mean` and `std`;
    - `mask`: float32 (1, S, S), 1 where anomalous (nearest neighbour), all 0 for normal images; `mask_threshold` says
      which pixels of a file are (`dataset.images.read_mask`);
    - `label`: 0 normal, 1 anomalous; `class_name`; `image_path`; `index`: the record's position.

    `augment`: "geometric" turns, shifts and flips image and mask together, "full" also changes brightness,
    contrast and saturation. The parameters come from `SampleKey.seed` alone; a plain index is for `augment="none"`,
    with anything else it raises ValueError; `choices` says how. An anomaly that was moved out of the image entirely
    leaves a normal image, label 0, but under `keep_label`; an anomalous image whose mask is empty from the start keeps
    its label.

    `kept`: squares of images and masks that were decoded before, and a place for others; samples are the same with it
    and without. It is of no use to colours that change before the resize (`jitter_first`).

    Raises UserError for a file that cannot be read and for a mask of another size than its image.
    """

    def __init__(
        self,
        root: Path,
        records: Sequence[Record],
        img_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: str = "none",
        choices: AugmentationConfig = AS_USUAL,
        mask_threshold: float | str = HALF,
        kept: ImageCache | None = None,
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, not {augment!r}")
        self.root = Path(root)
        self.records = list(records)
        self.img_size = img_size
        self.augment = augment
        self.choices = choices
        self.mask_threshold = mask_threshold
        self.kept = kept
        self.mean, self.std = _per_channel(mean), _per_channel(std)
        uncovered = torch.zeros(3, 1, 1) + (self.mean if choices.augment_fill == "mean" else 0)
        # In the values of what is moved: the normalised image, or 8-bit RGB.
        separate = choices.augment_moves == "separate"
        fill = (uncovered - self.mean) / self.std if separate else (255 * uncovered).round().int()
        self.fill = fill.flatten().tolist()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        index = key.index if isinstance(key, SampleKey) else key
        record = self.records[index]
        label = record.label
        if self.augment == "none":
            pixels, marks = self._tensors(*self._squares(record))
        elif isinstance(key, SampleKey):
            pixels, marks, gone = self._augmented(record, draw_augmentation(key.seed))
            label = 0 if gone and not self.choices.keep_label else label
        else:
            raise ValueError("augmentation needs a SampleKey: give the loader a SeededSampler")
        return {
            "image": pixels,
            "mask": (marks > 0).float(),
            "label": label,
            "class_name": record.class_name,
            "image_path": record.image_path,
            "index": index,
        }

    def _squares(self, record: Record) -> tuple[Image.Image, Image.Image]:
        return square_pair(self.root, record, self.img_size, self.mask_threshold, self.kept)

    def _tensors(self, image: Image.Image, mask: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        return _normalised(image, self.mean, self.std), F.pil_to_tensor(mask)

    def _augmented(self, record: Record, parameters: Augmentation) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """A record's image and mask, moved and recoloured, as tensors; and whether the anomaly was moved out."""
        choices, size = self.choices, self.img_size
        if self.augment == "full" and choices.jitter_first:
            image, mask = read_pair(self.root, record, self.mask_threshold)
            image = _square(change_colours(image, parameters), size)
            mask = empty_mask(size) if mask is None else mask.resize((size, size), Image.Resampling.NEAREST)
        else:
            image, mask = self._squares(record)
            image = change_colours(image, parameters) if self.augment == "full" else image
        if choices.augment_moves == "separate":
            return move_pair(*self._tensors(image, mask), parameters, choices, self.fill)
        image, mask, gone = move_pair(image, mask, parameters, choices, self.fill)
        return *self._tensors(image, mask), gone


class SeededSampler(Sampler[SampleKey]):
    """Every index once, as SampleKeys, in an order and with seeds that follow from (seed, stage, loop, epoch).

    `set_position` before each epoch; iterating twice at one position gives the same keys.
    """

    def __init__(self, length: int, seed: int, stage: int, shuffle: bool = True) -> None:
        self.length = length
        self.seed = seed
        self.stage = stage
        self.shuffle = shuffle
        self.set_position(loop=1, epoch=1)

    def set_position(self, loop: int, epoch: int) -> None:
        self.position = (self.seed, self.stage, loop, epoch)

    def __iter__(self) -> Iterator[SampleKey]:
        order = range(self.length)
        if self.shuffle:
            order = np.random.default_rng(derive_seed(*self.position)).permutation(self.length).tolist()
        for index in order:
            yield SampleKey(index, derive_seed(*self.position, index))

    def __len__(self) -> int:
        return self.length


class SharedBatches(BatchSampler):
    """Batches of `batch_size` keys, and the last of what is left, of which each process loads its share.

    A process that none are left for loads the first one, so that all take the same steps.
    """

    def __init__(self, sampler: SeededSampler, batch_size: int, process: int = 0, processes: int = 1) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self.process = process
        self.processes = processes

    def shares(self) -> list[Share]:
        """This process's share of each batch."""
        left = range(len(self.sampler), 0, -self.batch_size)
        return [Share.of(min(count, self.batch_size), self.process, self.processes) for count in left]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for keys, share in zip(super().__iter__(), self.shares(), strict=True):
            yield keys[share.first :][: max(1, share.count)]
