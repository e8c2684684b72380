"""Data parallel processes of one launch: accelerate's Accelerator and collective operations (docs/scaling.md)."""

import atexit
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list

from engine.runtime.device import check_device, choose_precision
from utils.errors import Interrupted, UserError
from utils.processes import another_process_ended, env_rank, env_world_size, is_main_process
from utils.text import list_names

Item = TypeVar("Item")
Value = TypeVar("Value")

# The others wait while the main process draws toy datasets, or reads all images for --skip_bad_images. The launcher
# notices ended processes, so nothing is lost by waiting.
TIMEOUT = timedelta(hours=6)
# Seconds between messages of a process that waits for others, and between its attempts.
REPORT_INTERVAL, POLL_INTERVAL = 30.0, 0.1
# Within it, a computer that can be reached answers.
CONNECTION_TIMEOUT = timedelta(seconds=10)
# Seconds within which a store that accepted a connection answers; other programs may never do so.
ANSWER_TIMEOUT = 60.0


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
    connect_processes(device == "cpu")
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=None if tracker == "none" else tracker,
        project_dir=str(save_path),
        # Batches are in pinned memory then, and their copies need not be waited for.
        dataloader_config=DataLoaderConfiguration(non_blocking=device.startswith("cuda")),
    )
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    return accelerator, precision


def join_launch(device: str, precision: str, tf32: str) -> str:
    """Connect this process with the others of its launch; returns its device, as `check_device` does."""
    device = check_device(device, precision, tf32)
    if env_world_size() == 1:
        return device
    connect_processes(device == "cpu")
    state = PartialState()
    atexit.register(state.destroy_process_group)
    return str(state.device)


def connect_processes(on_cpu: bool) -> None:
    """Connect this process with the others of its launch, if any, once."""
    if env_world_size() > 1 and not dist.is_initialized():
        rank, world_size = env_rank(), env_world_size()
        PartialState(cpu=on_cpu, timeout=TIMEOUT, store=_meet(rank, world_size), rank=rank, world_size=world_size)


def _meet(rank: int, world_size: int) -> dist.Store:
    """Wait for all processes of the launch, as torch does, but with messages, and so that signals end it.

    Raises `UserError` if the address cannot be used.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torch's launcher runs the server itself, for all its attempts.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def unreachable() -> str:
        try:
            socket.create_connection((address, port), CONNECTION_TIMEOUT.total_seconds()).close()
        except OSError as error:
            return f"rank 0 ({error.strerror or error})"
        return ""

    tcp: futures.Future[dist.TCPStore] = futures.Future()

    def connect() -> None:
        try:
            tcp.set_result(dist.TCPStore(address, port, world_size, serves, CONNECTION_TIMEOUT, wait_for_workers=False))
        except (RuntimeError, ValueError) as error:
            tcp.set_exception(error)

    place = f"{address}:{port}, {world_size} processes in all"
    try:
        if serves:
            connect()
        else:
            _wait(unreachable, place)
            # torch waits for the answer in native code, without a timeout, and no signal ends it.
            Thread(target=connect, daemon=True).start()
            _wait(lambda: "" if tcp.done() else "the answer of rank 0", place, ANSWER_TIMEOUT)
        tcp.result(timeout=0).set_timeout(TIMEOUT)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", tcp.result())
        store.set(f"rank {rank}", "")
        ranks = [f"rank {other}" for other in range(world_size)]

        def missing() -> str:
            return "" if store.check(ranks) else list_names([name for name in ranks if not store.check([name])], 8)

        _wait(missing, place)
    except (RuntimeError, ValueError, futures.TimeoutError) as error:
        reason = str(error).partition("\n")[0] or "another program listens there: give a free port"
        raise UserError(f"MASTER_ADDR={address}, MASTER_PORT={port}: cannot meet there ({reason})") from error
    return store


def _wait(missing: Callable[[], str], place: str, longest: float = math.inf) -> None:
    """Wait until `missing` names nobody, at most `longest` seconds."""
    start = time.monotonic()
    report = start + REPORT_INTERVAL
    while (names := missing()) and time.monotonic() < start + longest:
        if time.monotonic() > report:
            # Not logged: only the first process logs.
            sys.stderr.write(f"Rank {env_rank()} is waiting for {names} at {place}. Ctrl-C ends it\n")
            report += REPORT_INTERVAL
        time.sleep(POLL_INTERVAL)


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
