"""A run as a list of phases, and its progress through them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from accelerate import Accelerator
from torch.utils.data import DataLoader

from dataset.samples import SharedBatches
from engine.config.training import RunConfig
from engine.data.loaders import make_dataset, training_loader
from engine.data.task import TaskData
from engine.training.schedules import Factor
from engine.training.stages import Stage
from model.clip import FrozenCLIP


@dataclass(frozen=True)
class Phase:
    """One stage in one loop: its epochs, learning rates, and the files that it writes.

    stage: the name of what `make_stage` makes. rates: the first learning rate of each side that is trained; factor: of
    these rates, by step. files: the names of the checkpoint after an epoch, which may be none; parts: the components in
    it; loop_files: the names of the checkpoint of all components after a loop's last stage. max_norm: limit of the
    gradient norm. can_grow: whether a stage that has begun may be given more epochs, which a schedule that ends with
    the stage forbids. reset_optimizers: begin without moments.
    """

    loop: int
    stage: str
    epochs: int
    rates: Mapping[str, float]
    factor: Factor
    make_stage: Callable[[], Stage]
    loader: DataLoader
    files: Callable[[int], Sequence[str]]
    parts: Sequence[str]
    loop_files: Sequence[str] = ()
    max_norm: float | None = None
    can_grow: bool = True
    reset_optimizers: bool = False

    @property
    def sampler(self) -> SharedBatches:
        return cast(SharedBatches, self.loader.batch_sampler)


@dataclass
class RunState:
    """The progress of a run.

    done, planned: epochs of each phase; history: a row for each epoch; schedule_step: steps taken in the current phase;
    loops: the results of each finished loop.
    """

    done: list[int]
    planned: list[int]
    history: list[dict[str, Any]] = field(default_factory=list)
    schedule_step: int = 0
    loops: list[dict[str, Any]] = field(default_factory=list)


def loader_factory(
    config: RunConfig, data: TaskData, clip: FrozenCLIP, accelerator: Accelerator
) -> Callable[[str, int, int], DataLoader]:
    """Makes a run's training loaders from augmentation, batch size and stage number."""

    def make_loader(augment: str, batch_size: int, stage: int) -> DataLoader:
        samples = make_dataset(data, clip, augment, config.augmentation())
        shared = (accelerator.device.type == "cuda", accelerator.process_index, accelerator.num_processes)
        return training_loader(samples, batch_size, stage, config.seed, config.num_workers, *shared)

    return make_loader
