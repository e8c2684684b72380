"""The processes of one launch (docs/scaling.md), told by what launchers leave in the environment; no torch here.

Each process computes its share of a step's images, and one line of all of them says how the launch ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError

# Seconds in which a launcher notices that a process has ended, and ends the others.
NOTICED_AFTER = 10.0


class Share(NamedTuple):
    """Which images of a step a process computes: `count` of `total`, from position `first` on.

    A process that none are left for has count 0, and computes the first image for nothing.
    """

    first: int
    count: int
    total: int
    processes: int

    @classmethod
    def of(cls, total: int, process: int = 0, processes: int = 1) -> Share:
        """The share of a process in `total` images; shares differ by one image at most."""
        least, more = divmod(total, processes)
        count = least + (process < more)
        return cls(process * least + min(process, more) if count else 0, count, total, processes)

    @property
    def weight(self) -> float:
        """What a mean over these images counts, so that the mean over processes is the one over the step's images."""
        return self.count * self.processes / self.total


def process_count() -> int:
    """How many processes the launch has, on all its machines."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def process_index() -> int:
    """Which of the launch's processes this is, from 0."""
    return int(os.environ.get("RANK") or 0)


def is_main_process() -> bool:
    """Whether this process is the one that talks: of several that a launcher started, the first."""
    return process_index() == 0


def is_lonely() -> bool:
    """Whether a launch that was to have several processes has one, as `accelerate launch --cpu` starts it."""
    return "MASTER_ADDR" in os.environ and "ACCELERATE_USE_CPU" in os.environ and "RANK" not in os.environ


def check_alone(what: str) -> None:
    """Raise `UserError` where several processes would do what one does."""
    if process_count() > 1:
        raise UserError(f"{what} works in one process: leave accelerate launch out")


def speaks_first() -> bool:
    """Whether this process is the first of the launch's on this machine to say how it ends: the others need not."""
    file = _said_file()
    if file is None:
        return True
    try:
        file.open("x").close()
    except FileExistsError:
        return False
    except OSError:  # better twice than not at all
        return True
    return True


def another_ended(is_told: Callable[[], bool] = lambda: False) -> bool:
    """Whether another process of the launch has ended, which may be why this one cannot go on.

    It has where it has said why, or where the launcher then ends this one too, which `is_told` may see. Waits for that.
    """
    if process_count() == 1:
        return False
    deadline = time.monotonic() + NOTICED_AFTER
    while time.monotonic() < deadline:
        file = _said_file()
        if is_told() or (file is not None and file.exists()):
            return True
        time.sleep(0.05)
    return False


def _said_file() -> Path | None:
    """A file that is there once a process of this launch on this machine has said how it ends; None where it is alone.

    torch's launcher gives each process a file for errors, in a folder of the launch's attempt.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent.parent / "said" if error_file and process_count() > 1 else None
