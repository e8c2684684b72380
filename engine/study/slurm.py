"""The same cells through submitit: as Slurm jobs, or on this machine where there is no Slurm."""

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

from engine.study.cell import Outcome, Running, run_cell
from engine.study.local import run_locally
from engine.study.plan import ROOT, Cell, Plan, Step, shown
from utils.errors import UserError
from utils.logging import set_up_logging

if TYPE_CHECKING:
    import submitit

logger = logging.getLogger(__name__)

# Minutes of a job where the study file does not say, and how often one may run out of them: each goes on where the one
# before was ended.
TIMEOUT_MIN, TIMEOUTS = 24 * 60, 100


class Job:
    """A cell as a job. submitit requeues it when its time is over or it is preempted, as its `checkpoint` says."""

    def __call__(self, cell: Cell, environment: Mapping[str, str]) -> Outcome:
        set_up_logging()
        outcome = run_cell(cell, environment, Running())
        for problem in outcome.problems:
            logger.error("%s: %s", cell, problem)
        return outcome

    def checkpoint(self, *arguments: Any) -> submitit.helpers.DelayedSubmission:
        """The same again: what is done is not done again, and a training goes on by its own restart."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


def run_through_submitit(plan: Plan, partition: str, jobs: int | None, report: Callable[[], None]) -> bool:
    """Submit what is left of a study, or run it where there is no Slurm; whether it is all over when this returns.

    report: what a last job does after all others. Raises `UserError` where submitit is not installed.
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
    """Slurm's executor, or the local one where there is no Slurm."""
    import submitit

    limits = {f"{cluster}_max_num_timeout": TIMEOUTS for cluster in ("slurm", "local")}
    return submitit.AutoExecutor(folder, **limits)


def parameters(plan: Plan) -> dict[str, Any]:
    """What all jobs ask for: the study file's words, in submitit's names."""
    return {"name": plan.study.name, "timeout_min": TIMEOUT_MIN, **plan.study.slurm}


def ask_for(executor: submitit.AutoExecutor, given: Mapping[str, Any]) -> None:
    """Say what the next jobs need; `UserError` for words of the study file that submitit does not know."""
    try:
        executor.update_parameters(**given)
    except (NameError, AssertionError) as error:
        raise UserError(f"[study.slurm]: {' '.join(str(error).split())}") from error


def submit(
    plan: Plan, executor: submitit.AutoExecutor, partition: str, jobs: int | None, report: Callable[[], None]
) -> None:
    """Submit an array for each level of dependency (and number of GPUs), then a job that writes the report.

    An array waits for the end of those before it, good or bad: each cell looks for itself whether its start is there.
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
                ask_for(executor, {"gpus_per_node": gpus, **common, **after, **limit})
                with executor.batch():
                    sent = [executor.submit(Job(), cell, {}) for cell in cells]
                submitted.append(sent[0].job_id.partition("_")[0])
                logger.info("Level %d: %d cells in job %s", level, len(cells), submitted[-1])
            after = {"slurm_dependency": f"afterany:{':'.join(submitted)}"}
        ask_for(executor, {**common, **after, "gpus_per_node": 0})
        last = executor.submit(report)
    logger.info("Job %s writes the report after them; logs are in %s", last.job_id, shown(plan.folder / "slurm"))


class LocalJobs:
    """Runs a cell as a job on this machine, in the place of `run_cell`."""

    def __init__(self, executor: submitit.AutoExecutor, given: Mapping[str, Any]) -> None:
        self.executor = executor
        self._submitting = threading.Lock()
        # GPUs are handed out here, not by the executor.
        ask_for(executor, {**given, "gpus_per_node": 0})

    def __call__(
        self, cell: Cell, environment: Mapping[str, str], running: Running, finished: Callable[[Step], None]
    ) -> Outcome:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        open_steps = [step for step in cell.steps if not step.done]
        with self._submitting, importable():
            job = self.executor.submit(Job(), cell, environment)
        cancelled = False
        while not job.done():
            if running.stopping and not cancelled:
                job.cancel()
                cancelled = True
            time.sleep(0.1)
        for step in open_steps:
            if step.done:
                finished(step)
        try:
            return job.result()
        except (FailedJobError, UncompletedJobError) as error:
            if running.stopping:
                return Outcome(cell, ("stopped",))
            why = " ".join(str(error).split())[-300:]
            return Outcome(cell, (f"its job {job.job_id} ended without a result; the same command goes on ({why})",))


def importable() -> Any:
    """A block in which jobs that are submitted find this project's modules, wherever it is called from."""
    from submitit.helpers import environment_variables

    return environment_variables(
        PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    )
