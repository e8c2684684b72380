"""What the processes of one launch do together, beyond the steps of training (docs/scaling.md)."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from engine.runtime.device import PATIENCE, check_device
from utils.errors import Interrupted
from utils.processes import another_ended, is_main_process, process_count

Item = TypeVar("Item")
Value = TypeVar("Value")


def join_launch(device: str, precision: str, tf32: str) -> str:
    """The device of this process, as `check_device` finds it, once it has met the other processes of its launch."""
    device = check_device(device, precision, tf32)
    if process_count() == 1:
        return device
    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    atexit.register(state.destroy_process_group)
    return str(state.device)


def together() -> bool:
    """Whether several processes have met: what follows then needs all of them."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def place() -> tuple[int, int]:
    """Which of how many processes that have met this one is."""
    return (dist.get_rank(), dist.get_world_size()) if together() else (0, 1)


@contextmanager
def stopping_with_others() -> Iterator[None]:
    """A block that is interrupted where another process has ended, in place of what libraries say of that."""
    try:
        yield
    except RuntimeError as error:
        if not another_ended():
            raise
        raise Interrupted(signal.SIGTERM) from error


def main_first() -> AbstractContextManager[None]:
    """A block that the first process is through with before the others begin: it writes what all of them read."""
    return PartialState().main_process_first() if together() else nullcontext()


def from_first(make: Callable[[], Value]) -> Value:
    """What the first process makes, in all of them; what it sends must be picklable."""
    if not together():
        return make()
    made = [make() if is_main_process() else None]
    broadcast_object_list(made)
    return made[0]


def in_turn(own: Iterator[Item], count: int) -> Iterator[Item]:
    """In the first process, the `count` items that processes make in turn, in their order; none in the others.

    own: this process's items, every n-th of them; they must be picklable where there are several processes.
    """
    if not together():
        yield from own
        return
    processes = dist.get_world_size()
    for _ in range(0, count, processes):
        made = [None] * processes if is_main_process() else None
        # A process that none are left for sends nothing.
        dist.gather_object(next(own, None), made)
        yield from (item for item in made or () if item is not None)
