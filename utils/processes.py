"""The processes of one launch (docs/scaling.md), from what launchers leave in the environment; imports no torch."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# The variables of a launch, and their names in MPI launchers.
LAUNCH_NAMES = {
    "WORLD_SIZE": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "RANK": ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "LOCAL_RANK": ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
}
ADDRESS_NAMES = ("MASTER_ADDR", "MASTER_PORT")
# accelerate's variables that do not contradict an option, and values without effect.
KEPT = ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL", "ACCELERATE_CPU_AFFINITY")
NO_EFFECT = ("", "0", "1", "no", "none", "false", "default")
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


def use_cpu_variable() -> bool:
    """Whether `accelerate launch --cpu` started this process."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")


def check_launch() -> None:
    """Give the launcher's variables the names of torch's launcher; `UserError` if some are missing or invalid."""
    if os.environ.get("LOCAL_RANK") == "-1":  # no launch, in earlier versions of torch
        del os.environ["LOCAL_RANK"]
    present = [one for name, others in LAUNCH_NAMES.items() for one in (name, *others) if os.environ.get(one)]
    for name, others in LAUNCH_NAMES.items():
        for other in filter(os.environ.get, others):
            os.environ.setdefault(name, os.environ[other])
    values = {name: os.environ.get(name, "") for name in (*LAUNCH_NAMES, *ADDRESS_NAMES)}
    for name in (*LAUNCH_NAMES, "MASTER_PORT"):
        if values[name] and not values[name].isdecimal():
            raise UserError(f"environment variable {name}={values[name]}: must be a whole number")
    if not present:
        return
    if values["WORLD_SIZE"] == "1" and values["RANK"] in ("", "0"):
        os.environ.pop("LOCAL_RANK", None)  # accelerate would connect the process with itself
        return
    missing = [name for name, value in values.items() if not value and name != "LOCAL_RANK"]
    if missing:
        raise UserError(
            f"incomplete launch: the environment contains {', '.join(present)}, but not {', '.join(missing)}; start "
            "with accelerate launch, which sets all, or unset the former to run one process"
        )
    if env_rank() >= env_world_size():
        raise UserError(f"environment variable RANK={env_rank()}: must be below WORLD_SIZE={env_world_size()}")
    os.environ.setdefault("LOCAL_RANK", values["RANK"])


def ignore_accelerate_variables() -> None:
    """Remove accelerate's variables that would change a run despite its options, with a warning that names them."""
    names = [name for name in os.environ if name.startswith("ACCELERATE_") and name not in KEPT]
    removed = {name: os.environ.pop(name) for name in names}
    ignored = [f"{name}={value}" for name, value in removed.items() if value.lower() not in NO_EFFECT]
    if ignored:
        logger.warning(
            "Ignored environment variables: %s. Options decide: --device, --precision, --compile, --accumulate",
            ", ".join(ignored),
        )


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
    return Path(error_file).parent.parent / "final_message" if error_file and env_world_size() > 1 else None
