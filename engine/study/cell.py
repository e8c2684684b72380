"""Run a cell: each step in its own process, under a keeper that ends the process when the study ends."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.study import keeper
from engine.study.evaluations import read_evaluation
from engine.study.plan import ROOT, Cell, Step, path_from_root

logger = logging.getLogger(__name__)

KEEPER = Path(keeper.__file__)


@dataclass(frozen=True)
class Outcome:
    """The problems of a cell that was run; none if it is complete."""

    cell: Cell
    problems: tuple[str, ...] = ()


class StepRunner:
    """Runs steps, and can stop all of them from any thread."""

    def __init__(self) -> None:
        self.stopping = False
        self._keepers: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, step: Step, environment: Mapping[str, str]) -> int | None:
        """Run a step and return its exit status; None if it was stopped or not started."""
        command = [sys.executable, "-I", str(KEEPER), str(step.marker), str(step.log), sys.executable, *step.command]
        with self._lock:
            if self.stopping:
                return None
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                # A process group of its own: Ctrl-C reaches only this process, which ends the steps in order.
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                start_new_session=os.name != "nt",
            )
            self._keepers.add(process)
        try:
            status = process.wait()
        finally:
            # A Slurm job may raise an exception here; the step then gets time to end.
            self._end([process])
        return None if self.stopping and status else status

    def stop(self) -> None:
        """End all steps and start no more."""
        with self._lock:
            self.stopping = True
            keepers = list(self._keepers)
        self._end(keepers)

    def _end(self, keepers: list[subprocess.Popen[bytes]]) -> None:
        for process in keepers:
            with suppress(OSError):
                if process.stdin:
                    process.stdin.close()
        for process in keepers:
            with suppress(subprocess.TimeoutExpired):
                process.wait(keeper.GRACE + 10)
            self._keepers.discard(process)


def run_cell(
    cell: Cell, environment: Mapping[str, str], runner: StepRunner, finished: Callable[[Step], None] = lambda step: None
) -> Outcome:
    """Run the remaining steps of a cell; `finished` is called after each successful step."""
    if cell.start is not None and not cell.start.trained:
        return Outcome(cell, (f"skipped: it starts from {cell.start}, which is not trained",))
    problems: list[str] = []
    for step in cell.steps:
        if step.done:
            continue
        status = runner.run(step, environment)
        if status is None:
            return Outcome(cell, (*problems, "stopped"))
        name = f"test on {step.test}" if step.test else "training"
        if status:
            problems.append(
                f"{name} ended with status {status}: {_last_line(step.log)} (log: {path_from_root(step.log)})"
            )
            if not step.test:
                break
        elif step.test and not read_evaluation(step.path):
            step.marker.unlink()
            problems.append(f"{name} wrote no CSV file with a column class to {path_from_root(step.path)}")
        else:
            finished(step)
    return Outcome(cell, tuple(problems))


def _last_line(log: Path) -> str:
    """The last line of a log, which is the error of a failed process."""
    with suppress(OSError):
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line.split("\r")[-1].strip() for line in text.split("\n") if line.strip()]
        return lines[-1][:300] if lines else "no output"
    return "no log"
