"""Run the cells of a study on this machine, several at a time, on its GPUs if it has any."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial

from engine.study.cell import Outcome, StepRunner, run_cell
from engine.study.plan import Cell, Plan, Step
from utils.errors import Stopped, UserError
from utils.logging import progress_bar
from utils.text import readable_time

logger = logging.getLogger(__name__)

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# A cell with the GPUs assigned to it.
Assignment = tuple[Cell, list[str]]


class GpuPool:
    """Assigns GPUs to cells: one cell per GPU, or as few cells per GPU as `jobs` requires."""

    def __init__(self, gpus: Sequence[str], jobs: int) -> None:
        self.cells = dict.fromkeys(gpus, 0)
        self.capacity = -(-jobs // len(gpus)) if gpus else 0

    def take(self, count: int) -> list[str] | None:
        """The `count` GPUs with the fewest cells; None if too few are free. Without GPUs, an empty list."""
        if not self.cells:
            return []
        free = sorted((gpu for gpu, cells in self.cells.items() if cells < self.capacity), key=self.cells.__getitem__)
        if len(free) < count:
            return None
        for gpu in free[:count]:
            self.cells[gpu] += 1
        return free[:count]

    def release(self, gpus: Sequence[str]) -> None:
        for gpu in gpus:
            self.cells[gpu] -= 1


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as in `CUDA_VISIBLE_DEVICES`."""
    variable = os.environ.get(GPU_VARIABLE)
    if variable is not None:
        names = [name.strip() for name in variable.split(",")]
        # CUDA ignores everything from the first invalid name on.
        return names[: next((index for index, name in enumerate(names) if name in ("", "-1")), len(names))]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=index", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("nvidia-smi failed (%s): no GPUs are assigned", error)
        return []
    return [line.strip() for line in output.splitlines() if line.strip().isdigit()]


def cell_environment(gpus: Sequence[str], jobs: int) -> dict[str, str]:
    """The environment variables of a cell's processes: their GPUs, and their share of the CPU threads."""
    environment = {GPU_VARIABLE: ",".join(gpus)} if gpus else {}
    if jobs > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = str(max(1, cores // jobs))
        environment |= {name: share for name in THREAD_VARIABLES if name not in os.environ}
    return environment


def check_gpus(plan: Plan, gpus: Sequence[str]) -> None:
    """Raise `UserError` if a cell needs more GPUs than this machine has."""
    for cell in plan.cells:
        if gpus and cell.arm.gpus > len(gpus):
            raise UserError(f"arms.{cell.arm_name}: gpus = {cell.arm.gpus}, but this machine has {len(gpus)}")


class Progress:
    """Logs each finished step, and shows a bar with the remaining time."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._total = sum(not step.done for cell in cells for step in cell.steps)
        self._count = 0
        self._bar = progress_bar(self._total, "study")
        self._lock = threading.Lock()

    def finished(self, cell: Cell, step: Step) -> None:
        with self._lock:
            self._count += 1
            self._bar.update()
            action = f"tested on {step.test}" if step.test else "trained"
            logger.info("[%d/%d] %s: %s in %s", self._count, self._total, cell, action, readable_time(step.seconds))

    def close(self) -> None:
        self._bar.close()


def run_locally(plan: Plan, jobs: int, run: Callable[..., Outcome] = run_cell) -> list[Outcome]:
    """Run the remaining cells of a study.

    A cell runs after the cell that it starts from, and is skipped if that one fails.

    Args:
        plan: The study.
        jobs: Number of cells that run at the same time.
        run: Runs one cell, with the arguments of `run_cell`.

    Raises:
        Stopped: The user stopped the study.
        UserError: A cell needs more GPUs than this machine has.
    """
    gpus = visible_gpus()
    check_gpus(plan, gpus)
    waiting = [cell for cell in plan.cells if not cell.done]
    outcomes: list[Outcome] = []
    progress, runner, pool = Progress(plan.cells), StepRunner(), GpuPool(gpus, jobs)
    active: dict[Future[Outcome], Assignment] = {}
    start = time.monotonic()
    try:
        with ThreadPoolExecutor(jobs) as executor:
            try:
                while waiting or active:
                    while len(active) < jobs and (assignment := _next(waiting, active, pool)):
                        cell, assigned = assignment
                        waiting.remove(cell)
                        environment, finished = cell_environment(assigned, jobs), partial(progress.finished, cell)
                        active[executor.submit(run, cell, environment, runner, finished)] = assignment
                    ended, _ = wait(active, timeout=1.0, return_when=FIRST_COMPLETED)
                    for job in ended:
                        pool.release(active.pop(job)[1])
                        outcomes.append(job.result())
                        for problem in outcomes[-1].problems:
                            logger.error("%s: %s", outcomes[-1].cell, problem)
            except KeyboardInterrupt:
                runner.stop()
                raise
    except KeyboardInterrupt as error:
        number = getattr(error, "signal_number", signal.SIGINT)
        raise Stopped("stopped: the same command resumes the study", number) from error
    finally:
        progress.close()
    logger.info("%d cells in %s", len(outcomes), readable_time(time.monotonic() - start))
    return outcomes


def _next(waiting: Sequence[Cell], active: dict[Future[Outcome], Assignment], pool: GpuPool) -> Assignment | None:
    """The first cell whose start is available or has failed, with GPUs for it."""
    pending = {cell.folder for cell in waiting} | {cell.folder for cell, _ in active.values()}
    for cell in waiting:
        if cell.start is None or cell.start.trained or cell.start.folder not in pending:
            gpus = pool.take(cell.arm.gpus)
            return None if gpus is None else (cell, gpus)
    return None
