"""The processes of one launch (docs/scaling.md), from what launchers leave in the environment; imports no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Seconds within which a launcher ends the other processes after one has ended.
LAUNCHER_DELAY = 10.0


class Share(NamedTuple):
    """A process's share of a step's images: `size` of `total`, from position `first` on.

    A process without a share has size 0 and computes the first image, whose loss has weight 0.
    """

    first: int
    size: int
    total: int
    processes: int

    @classmethod
    def of(cls, total: int, rank: int = 0, world_size: int = 1) -> Share:
        """The share of a process in `total` images; shares differ by at most one image."""
        least, more = divmod(total, world_size)
        size = least + (rank < more)
        return cls(rank * least + min(rank, more) if size else 0, size, total, world_size)

    @property
    def weight(self) -> float:
        """The factor with which the mean over processes of this share's mean is the mean over the step's images."""
        return self.size * self.processes / self.total

    def step_mean(self, own: Tensor) -> Tensor:
        """The mean over all images of the step, from the mean `own` over this share; its gradient is that of `own`."""
        if self.processes == 1:
            return own
        import torch.distributed

        total = self.weight * own.detach()
        torch.distributed.all_reduce(total)
        return total / self.processes + (own - own.detach())


# One process has all images.
WHOLE_STEP = Share.of(1)


def env_world_size() -> int:
    """The number of processes of the launch, on all its machines."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def env_rank() -> int:
    return int(os.environ.get("RANK") or 0)


def is_main_process() -> bool:
    """Whether this is the launch's first process, which logs and writes files."""
    return env_rank() == 0


def check_single_process(what: str) -> None:
    """Raise `UserError` if several processes would do the same work."""
    if env_world_size() > 1:
        raise UserError(f"{what} works in one process: leave accelerate launch out")


def claim_message() -> bool:
    """Whether this process is the launch's first on this machine to end, and so prints the final message."""
    file = _marker_file()
    if file is None:
        return True
    try:
        file.open("x").close()
    except FileExistsError:
        return False
    except OSError:
        pass  # better twice than not at all
    return True


def another_process_ended(is_stopping: Callable[[], bool] = lambda: False) -> bool:
    """Whether another process of the launch has ended, which may be the cause of this one's error.

    Waits until that process has printed its final message, or the launcher's signal has arrived (`is_stopping`).
    """
    if env_world_size() == 1:
        return False
    deadline = time.monotonic() + LAUNCHER_DELAY
    while time.monotonic() < deadline:
        file = _marker_file()
        if is_stopping() or (file is not None and file.exists()):
            return True
        time.sleep(0.05)
    return False


def _marker_file() -> Path | None:
    """A file that exists once a process of this launch on this machine has claimed the final message.

    torch's launcher gives each process a file for errors, in a folder of the launch's attempt.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent.parent / "said" if error_file and env_world_size() > 1 else None
