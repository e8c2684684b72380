"""Run the cells of a study on this machine, several at a time, on its GPUs if it has any.

Each step has its own process, under a keeper that ends the process when the study ends. Several runners of one study,
on one machine or on several, share its cells: a cell runs in one of them, and the others continue with other cells.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import takewhile
from pathlib import Path

from engine.study import keeper
from engine.study.evaluations import read_evaluation
from engine.study.plan import ROOT, Cell, Plan, Step, path_from_root
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
        # CUDA ignores everything from the first invalid name on.
        return list(takewhile(lambda name: name not in ("", "-1"), map(str.strip, variable.split(","))))
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=index", "--format=csv,noheader"]
    output = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False).stdout
    return [line.strip() for line in output.splitlines() if line.strip().isdigit()]


def cell_environment(gpus: Sequence[str], jobs: int) -> dict[str, str]:
    """The environment variables of a cell's processes: their GPUs, and their share of the CPU threads."""
    environment = {GPU_VARIABLE: ",".join(gpus)} if gpus else {}
    if jobs > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = str(max(1, cores // jobs))
        environment |= {name: share for name in THREAD_VARIABLES if name not in os.environ}
    return environment


class CellRunner:
    """Runs cells in any threads and shows the progress; as a context, it ends all processes at its end."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._total = sum(not step.done for cell in cells for step in cell.steps)
        self._count = 0
        self._bar = progress_bar(self._total, "study")
        self._stopping = False
        self._keepers: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> CellRunner:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stopping = True
            for process in self._keepers:
                _close_input(process)
        self._bar.close()

    def run(self, cell: Cell, environment: Mapping[str, str]) -> bool:
        """Run the remaining steps of a cell; returns False if another study is running it."""
        if cell.start is not None and not cell.start.trained:
            logger.error("%s: skipped: it starts from %s, which is not trained", cell, cell.start)
            return True
        for step in cell.steps:
            if step.done:
                continue
            status = self._run_step(step, environment)
            if self._stopping:
                break
            if status == keeper.BUSY:
                return False
            name = f"test on {step.test}" if step.test else "training"
            if status:
                line, log = _last_line(step.log), path_from_root(step.log)
                logger.error("%s: %s ended with status %d: %s (log: %s)", cell, name, status, line, log)
                if not step.test:
                    break
            elif step.test and not read_evaluation(step.path):
                step.marker.unlink()
                folder = path_from_root(step.path)
                logger.error("%s: %s wrote no CSV file with a column class to %s", cell, name, folder)
            else:
                self._log_progress(cell, step)
        return True

    def _run_step(self, step: Step, environment: Mapping[str, str]) -> int:
        script = [keeper.__file__, str(step.marker), str(step.log)]
        with self._lock:
            if self._stopping:
                return 0
            process = subprocess.Popen(
                [sys.executable, "-I", *script, sys.executable, *step.command],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                # A process group of its own: Ctrl-C reaches only this process, which ends the steps in order.
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                start_new_session=os.name != "nt",
            )
            self._keepers.add(process)
        status = process.wait()
        with self._lock:
            self._keepers.remove(process)
            _close_input(process)
        return status

    def _log_progress(self, cell: Cell, step: Step) -> None:
        with self._lock:
            self._count += 1
            self._bar.update()
            action = f"tested on {step.test}" if step.test else "trained"
            logger.info("[%d/%d] %s: %s in %s", self._count, self._total, cell, action, readable_time(step.seconds))


def _close_input(process: subprocess.Popen[bytes]) -> None:
    """Tell a keeper to end its command."""
    if process.stdin:
        process.stdin.close()


def _last_line(log: Path) -> str:
    """The last line of a log, which is the error of a failed process."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = (line.split("\r")[-1].strip() for line in reversed(text.split("\n")))
    return next(filter(None, lines), "no output")[:300]


def run_cells(plan: Plan, jobs: int) -> None:
    """Run the remaining cells of a study.

    A cell runs after the cell that it starts from, and is skipped if that one fails.

    Args:
        plan: The study.
        jobs: Number of cells that run at the same time.

    Raises:
        Stopped: The user stopped the study.
        UserError: A cell needs more GPUs than this machine has.
    """
    gpus = visible_gpus()
    for cell in plan.cells:
        if gpus and cell.arm.gpus > len(gpus):
            raise UserError(f"arms.{cell.arm_name}: gpus = {cell.arm.gpus}, but this machine has {len(gpus)}")
    waiting, pool = [cell for cell in plan.cells if not cell.done], GpuPool(gpus, jobs)
    active: dict[Future[bool], Assignment] = {}
    count, start = len(waiting), time.monotonic()
    try:
        with ThreadPoolExecutor(jobs) as executor, CellRunner(plan.cells) as runner:
            while waiting or active:
                while len(active) < jobs and (assignment := _next(waiting, active, pool)):
                    cell, assigned = assignment
                    waiting.remove(cell)
                    active[executor.submit(runner.run, cell, cell_environment(assigned, jobs))] = assignment
                for job in wait(active, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    cell, assigned = active.pop(job)
                    pool.release(assigned)
                    if not job.result():
                        waiting.append(cell)
    except KeyboardInterrupt as error:
        number = getattr(error, "signal_number", signal.SIGINT)
        raise Stopped("stopped: the same command resumes the study", number) from error
    logger.info("%d cells in %s", count, readable_time(time.monotonic() - start))


def _next(waiting: Sequence[Cell], active: dict[Future[bool], Assignment], pool: GpuPool) -> Assignment | None:
    """The first cell whose start is available or has failed, with GPUs for it."""
    pending = {cell.folder for cell in waiting} | {cell.folder for cell, _ in active.values()}
    for cell in waiting:
        if cell.start is None or cell.start.trained or cell.start.folder not in pending:
            gpus = pool.take(cell.arm.gpus)
            return None if gpus is None else (cell, gpus)
    return None
