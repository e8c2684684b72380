"""Run the cells of a study through submitit: as Slurm jobs, or on this machine if there is no Slurm."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.study.cell import Outcome, StepRunner, run_cell
from engine.study.local import run_locally
from engine.study.plan import ROOT, Cell, Plan, Step, path_from_root
from utils.errors import UserError
from utils.logging import set_up_logging

if TYPE_CHECKING:
    import submitit

logger = logging.getLogger(__name__)

# The default time limit of a job, and how often a job may reach it: each time, the next one resumes.
TIMEOUT_MIN, MAX_TIMEOUTS = 24 * 60, 100


class Job:
    """A cell as a job; submitit calls `checkpoint` to requeue it at its time limit or when it is preempted."""

    def __call__(self, cell: Cell, environment: Mapping[str, str]) -> Outcome:
        set_up_logging()
        outcome = run_cell(cell, environment, StepRunner())
        for problem in outcome.problems:
            logger.error("%s: %s", cell, problem)
        return outcome

    def checkpoint(self, *arguments: Any) -> submitit.helpers.DelayedSubmission:
        """The same job again: it skips finished steps, and its training resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


def run_through_submitit(plan: Plan, partition: str, jobs: int | None, report: Callable[[], object]) -> bool:
    """Submit the remaining cells of a study, or run them if there is no Slurm.

    Args:
        plan: The study.
        partition: The Slurm partition; empty for the default one.
        jobs: Number of jobs that run at the same time.
        report: The work of a last job after all others.

    Returns:
        Whether the cells have ended.

    Raises:
        UserError: submitit is not installed, or rejects the study's parameters.
    """
    if importlib.util.find_spec("submitit") is None:
        raise UserError("--slurm needs submitit: pip install -r requirements-study.txt")
    executor = make_executor(plan.folder / "slurm")
    if executor.cluster == "slurm":
        submit(plan, executor, partition, jobs, report)
        return False
    if partition:
        raise UserError(f"--slurm {partition}: there is no Slurm on this machine (no srun)")
    logger.info("There is no Slurm on this machine: submitit runs the jobs here")
    run_locally(plan, jobs or 1, LocalJobs(executor, parameters(plan)))
    return True


def make_executor(folder: Path) -> submitit.AutoExecutor:
    """An executor for Slurm, or for this machine if there is no Slurm."""
    import submitit

    limits: dict[str, Any] = {f"{cluster}_max_num_timeout": MAX_TIMEOUTS for cluster in ("slurm", "local")}
    return submitit.AutoExecutor(folder, **limits)


def parameters(plan: Plan) -> dict[str, Any]:
    """The parameters of all jobs, as submitit names them."""
    return {"name": plan.study.name, "timeout_min": TIMEOUT_MIN, **plan.study.slurm}


def set_parameters(executor: submitit.AutoExecutor, values: Mapping[str, Any]) -> None:
    """Set the parameters of the next jobs; `UserError` if submitit rejects those of the study file."""
    try:
        executor.update_parameters(**values)
    except (NameError, AssertionError) as error:
        raise UserError(f"[study.slurm]: {' '.join(str(error).split())}") from error


def submit(
    plan: Plan, executor: submitit.AutoExecutor, partition: str, jobs: int | None, report: Callable[[], object]
) -> None:
    """Submit an array for each level of dependency (and number of GPUs), then a job that writes the report.

    An array waits until the previous ones have ended, successfully or not; each cell checks its own start.
    """
    common = parameters(plan) | ({"slurm_partition": partition} if partition else {})
    levels: dict[int, dict[int, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in plan.cells:
        if not cell.done:
            levels[cell.level][cell.arm.gpus].append(cell)
    after: dict[str, str] = {}
    limit = {"slurm_array_parallelism": jobs} if jobs else {}
    with importable():
        for level in sorted(levels):
            submitted = []
            for gpus, cells in levels[level].items():
                set_parameters(executor, {"gpus_per_node": gpus, **common, **after, **limit})
                with executor.batch():
                    array = [executor.submit(Job(), cell, {}) for cell in cells]
                submitted.append(array[0].job_id.partition("_")[0])
                logger.info("Level %d: %d cells in job %s", level, len(cells), submitted[-1])
            after = {"slurm_dependency": f"afterany:{':'.join(submitted)}"}
        set_parameters(executor, {**common, **after, "gpus_per_node": 0})
        last = executor.submit(report)
    logger.info(
        "Job %s writes the report after them; logs are in %s", last.job_id, path_from_root(plan.folder / "slurm")
    )


class LocalJobs:
    """Runs cells as jobs on this machine; used in place of `run_cell`."""

    def __init__(self, executor: submitit.AutoExecutor, values: Mapping[str, Any]) -> None:
        self.executor = executor
        self._submitting = threading.Lock()
        # `run_locally` assigns the GPUs, not the executor.
        set_parameters(executor, {**values, "gpus_per_node": 0})

    def __call__(
        self, cell: Cell, environment: Mapping[str, str], runner: StepRunner, finished: Callable[[Step], None]
    ) -> Outcome:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        remaining = [step for step in cell.steps if not step.done]
        with self._submitting, importable():
            job = self.executor.submit(Job(), cell, environment)
        cancelled = False
        while not job.done():
            if runner.stopping and not cancelled:
                job.cancel()
                cancelled = True
            time.sleep(0.1)
        for step in remaining:
            if step.done:
                finished(step)
        try:
            return job.result()
        except (FailedJobError, UncompletedJobError) as error:
            if runner.stopping:
                return Outcome(cell, ("stopped",))
            reason = " ".join(str(error).split())[-300:]
            return Outcome(cell, (f"job {job.job_id} ended without a result; the same command resumes it ({reason})",))


def importable() -> Any:
    """A context in which submitted jobs can import this project's modules."""
    from submitit.helpers import environment_variables

    return environment_variables(
        PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    )
