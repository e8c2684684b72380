"""A run as a list of phases, and where it stands in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader

from dataset.samples import SeededSampler
from engine.config.training import RunConfig
from engine.data.loaders import make_dataset, training_loader
from engine.data.task import TaskData
from engine.training.schedules import Factor
from engine.training.stages import Stage
from engine.training.turns import Turns
from model.clip import FrozenCLIP


@dataclass(frozen=True)
class Phase:
    """One stage in one loop: how often it goes over its images, at what rate, and what is written after each epoch.

    files: the names of the checkpoint after an epoch, none where there is none; parts: the components in it.
    rate: the first, by side where both are trained; factor: of the rate, by step; max_norm clips the gradient.
    grows: whether a stage that has begun may be given more epochs, which a schedule that ends with the stage forbids.
    fresh_optimizer: begin with its moments forgotten.
    """

    loop: int
    side: str
    epochs: int
    rate: float | Mapping[str, float]
    factor: Factor
    make_stage: Callable[[], Stage]
    loader: DataLoader | Turns
    sampler: SeededSampler | Turns
    files: Callable[[int], Sequence[str]]
    parts: Sequence[str]
    max_norm: float | None = None
    grows: bool = True
    fresh_optimizer: bool = False

    @property
    def rates(self) -> Mapping[str, float]:
        """The first rate of each side that is trained."""
        return self.rate if isinstance(self.rate, Mapping) else {self.side: self.rate}


@dataclass
class RunState:
    """Where a run stands.

    done, planned: epochs of each phase; history: a row of each epoch; schedule: of the phase under way; loops: what
    was found at the end of each loop that is finished.
    """

    done: list[int]
    planned: list[int]
    history: list[dict[str, Any]] = field(default_factory=list)
    schedule: dict[str, Any] | None = None
    loops: list[dict[str, Any]] = field(default_factory=list)


def loaders_of(
    config: RunConfig, data: TaskData, clip: FrozenCLIP, accelerator: Accelerator
) -> Callable[..., tuple[DataLoader, SeededSampler]]:
    """Makes the training loader of a stage from its augmentation, batch size and number."""

    def make(augment: str, batch_size: int, stage: int) -> tuple[DataLoader, SeededSampler]:
        return training_loader(
            make_dataset(data, clip, augment, config.augmentation()),
            batch_size,
            stage,
            config.seed,
            config.num_workers,
            accelerator.device.type == "cuda",
            accelerator.process_index,
            accelerator.num_processes,
        )

    return make
