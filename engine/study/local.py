"""Running a study's cells on this machine, several at a time, on its GPUs where it has some."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from engine.study.cell import Outcome, Running, run_cell
from engine.study.plan import Cell, Plan, Step
from utils.errors import Stopped, UserError
from utils.logging import progress_bar

logger = logging.getLogger(__name__)

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Devices:
    """The GPUs, handed out to cells: each to one at a time, or to as few as there must be for `jobs` at once."""

    def __init__(self, gpus: Sequence[str], jobs: int) -> None:
        self.users = dict.fromkeys(gpus, 0)
        self.most = -(-jobs // len(gpus)) if gpus else 0

    def take(self, count: int) -> list[str] | None:
        """The `count` GPUs with the fewest users; None while there are not as many free. Without GPUs, none."""
        if not self.users:
            return []
        free = sorted((gpu for gpu, users in self.users.items() if users < self.most), key=self.users.__getitem__)
        if len(free) < count:
            return None
        for gpu in free[:count]:
            self.users[gpu] += 1
        return free[:count]

    def give_back(self, gpus: Sequence[str]) -> None:
        for gpu in gpus:
            self.users[gpu] -= 1


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get(GPU_VARIABLE)
    if named is not None:
        found = [name.strip() for name in named.split(",")]
        # As CUDA reads it, the first that is none ends the list.
        return found[: next((index for index, name in enumerate(found) if name in ("", "-1")), len(found))]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=index", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("nvidia-smi does not answer (%s): no GPUs are handed out", error)
        return []
    return [line.strip() for line in said.splitlines() if line.strip().isdigit()]


def cell_environment(gpus: Sequence[str], jobs: int) -> dict[str, str]:
    """What a cell's processes find in their environment: their GPUs, and their share of the CPU's threads."""
    environment = {GPU_VARIABLE: ",".join(gpus)} if gpus else {}
    if jobs > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = str(max(1, cores // jobs))
        environment |= {name: share for name in THREAD_VARIABLES if name not in os.environ}
    return environment


def check_gpus(plan: Plan, gpus: Sequence[str]) -> None:
    """`UserError` for a cell that needs more GPUs than there are."""
    for cell in plan.cells:
        if gpus and cell.arm.gpus > len(gpus):
            raise UserError(f"arms.{cell.arm_name}: gpus = {cell.arm.gpus}, and there are {len(gpus)}")


class Progress:
    """What is done and what is left, said after each step in a line and shown as a bar."""

    def __init__(self, cells: Sequence[Cell], jobs: int) -> None:
        steps = [(cell, step) for cell in cells for step in cell.steps]
        self._left = {step.place: kind_of(cell, step) for cell, step in steps if not step.done}
        self._seconds: dict[tuple[str, ...], list[float]] = {}
        for cell, step in steps:
            if step.done:
                self._seconds.setdefault(kind_of(cell, step), []).append(step.seconds)
        self._jobs, self._count, self._all = jobs, 0, len(self._left)
        self._bar = progress_bar(self._all, "study")
        self._lock = threading.Lock()

    def finished(self, cell: Cell, step: Step) -> None:
        """A step came to a good end."""
        with self._lock:
            seconds, kind = step.seconds, self._left.pop(step.place)
            self._seconds.setdefault(kind, []).append(seconds)
            self._count += 1
            self._bar.update()
            what = f"tested on {step.test}" if step.test else "trained"
            logger.info(
                "[%d/%d] %s: %s in %s; %s", self._count, self._all, cell, what, duration(seconds), self.time_left()
            )

    def time_left(self) -> str:
        """The steps that are left, at the mean time of those of their kind, else of all."""
        if not self._left:
            return "nothing is left"
        known = {kind: statistics.mean(found) for kind, found in self._seconds.items()}
        overall = statistics.mean(value for found in self._seconds.values() for value in found)
        seconds = sum(known.get(kind, overall) for kind in self._left.values()) / self._jobs
        return f"about {duration(seconds)} left"

    def close(self) -> None:
        self._bar.close()


def kind_of(cell: Cell, step: Step) -> tuple[str, ...]:
    """Steps that take about as long as one another."""
    return (step.kind, step.test) if step.kind == "test" else (step.kind, cell.arm_name, cell.setting, cell.pair.train)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def run_locally(plan: Plan, jobs: int, run: Callable[..., Outcome] = run_cell) -> list[Outcome]:
    """Run what is left of the study, `jobs` cells at a time; raises `Stopped` when the user stops it.

    A cell waits for the one that it starts from; it is skipped where that one fails. run: runs one, as `run_cell` does.
    """
    gpus = visible_gpus()
    check_gpus(plan, gpus)
    waiting = [cell for cell in plan.cells if not cell.done]
    outcomes: list[Outcome] = []
    progress, running, devices = Progress(plan.cells, jobs), Running(), Devices(gpus, jobs)
    at_work: dict[Future[Outcome], tuple[Cell, list[str]]] = {}
    begun = time.monotonic()
    try:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while waiting or at_work:
                    while len(at_work) < jobs and (found := _next(waiting, at_work, devices)):
                        cell, taken = found
                        waiting.remove(cell)
                        job = pool.submit(
                            run,
                            cell,
                            cell_environment(taken, jobs),
                            running,
                            lambda step, cell=cell: progress.finished(cell, step),
                        )
                        at_work[job] = found
                    ended, _ = wait(at_work, timeout=1.0, return_when=FIRST_COMPLETED)
                    for job in ended:
                        devices.give_back(at_work.pop(job)[1])
                        outcomes.append(job.result())
                        for problem in outcomes[-1].problems:
                            logger.error("%s: %s", outcomes[-1].cell, problem)
            except KeyboardInterrupt:
                running.stop()
                raise
    except KeyboardInterrupt as error:
        number = getattr(error, "signal_number", signal.SIGINT)
        raise Stopped("stopped: the same command goes on where this one ends", number) from error
    finally:
        progress.close()
    logger.info("%d cells in %s", len(outcomes), duration(time.monotonic() - begun))
    return outcomes


def _next(
    waiting: Sequence[Cell], at_work: dict[Future[Outcome], tuple[Cell, list[str]]], devices: Devices
) -> tuple[Cell, list[str]] | None:
    """The first cell whose start is not to come any more, with GPUs for it."""
    to_come = {cell.folder for cell in waiting} | {cell.folder for cell, _ in at_work.values()}
    for cell in waiting:
        if cell.start is None or cell.start.trained or cell.start.folder not in to_come:
            taken = devices.take(cell.arm.gpus)
            return None if taken is None else (cell, taken)
    return None
