"""Data parallel processes of one launch: accelerate's Accelerator and collective operations (docs/scaling.md)."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, broadcast_object_list

from engine.runtime.device import check_device, choose_precision
from utils.errors import Interrupted, UserError
from utils.processes import another_process_ended, env_world_size, is_main_process

Item = TypeVar("Item")
Value = TypeVar("Value")

# The others wait while the main process draws toy datasets, or reads all images for --skip_bad_images. The launcher
# notices ended processes, so nothing is lost by waiting.
TIMEOUT = timedelta(hours=6)


def make_accelerator(device: str, precision: str, tf32: str, tracker: str, save_path: Path) -> tuple[Accelerator, str]:
    """accelerate's Accelerator for the arguments of a run, and the precision chosen by `auto`.

    Raises `UserError` for a device or tracker that is not available.
    """
    device = check_device(device, precision, tf32)
    precision = choose_precision(device, precision)
    if tracker == "wandb" and find_spec("wandb") is None:
        raise UserError("--tracker wandb: wandb is not installed; pip install wandb, or take tensorboard")
    if device.startswith("cuda:"):
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=None if tracker == "none" else tracker,
        project_dir=str(save_path),
        # Batches are in pinned memory then, and their copies need not be waited for.
        dataloader_config=DataLoaderConfiguration(non_blocking=device.startswith("cuda")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
    return accelerator, precision


def join_launch(device: str, precision: str, tf32: str) -> str:
    """Connect this process with the others of its launch; returns its device, as `check_device` does."""
    device = check_device(device, precision, tf32)
    if env_world_size() == 1:
        return device
    state = PartialState(cpu=device == "cpu", timeout=TIMEOUT)
    atexit.register(state.destroy_process_group)
    return str(state.device)


def is_distributed() -> bool:
    """Whether several processes are connected: collective operations then need all of them."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


@contextmanager
def interrupted_by_others() -> Iterator[None]:
    """Turn a library's error in the block into an interruption if another process has ended."""
    try:
        yield
    except RuntimeError as error:
        if not another_process_ended():
            raise
        raise Interrupted(signal.SIGTERM) from error


def main_process_first() -> AbstractContextManager[None]:
    """The main process completes the block before the others enter it: it writes files that all of them read."""
    return PartialState().main_process_first() if is_distributed() else nullcontext()


def from_main_process(make: Callable[[], Value]) -> Value:
    """The main process's result in all processes; it must be picklable."""
    if not is_distributed():
        return make()
    results: list[Any] = [make() if is_main_process() else None]
    broadcast_object_list(results)
    return results[0]


def gather_in_order(own: Iterator[Item], count: int) -> Iterator[Item]:
    """In the main process, the `count` items of all processes in order; none in the others.

    own: this process's items, every n-th of them, picklable.
    """
    if not is_distributed():
        yield from own
        return
    world_size = dist.get_world_size()
    for _ in range(0, count, world_size):
        items: list[Any] | None = [None] * world_size if is_main_process() else None
        # A process without further items sends None.
        dist.gather_object(next(own, None), items)
        yield from (item for item in items or () if item is not None)
