"""Running a cell: each of its steps in a process of its own, through a keeper that ends it when we are gone."""

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
from engine.study.figures import read_figures
from engine.study.plan import ROOT, Cell, Step, shown

logger = logging.getLogger(__name__)

KEEPER = Path(keeper.__file__)


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: its problems in words, none where it is complete."""

    cell: Cell
    problems: tuple[str, ...] = ()


class Running:
    """The keepers at work, so that all of them can be ended at once, from any thread."""

    def __init__(self) -> None:
        self.stopping = False
        self._keepers: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, step: Step, environment: Mapping[str, str]) -> int | None:
        """Run a step to its end and return its exit status; None where it was stopped, or never begun."""
        words = [sys.executable, "-I", str(KEEPER), str(step.marker), str(step.log), sys.executable, *step.words]
        # In a group of its own, so that Ctrl-C reaches us alone, who end it in order.
        group = (
            {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
        )
        with self._lock:
            if self.stopping:
                return None
            process = subprocess.Popen(
                words, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.PIPE, **group
            )
            self._keepers.add(process)
        try:
            status = process.wait()
        finally:
            # In a Slurm job an exception may come here: the step is ended, and has time for it.
            self._end([process])
        return None if self.stopping and status else status

    def stop(self) -> None:
        """End all steps, and begin no more."""
        with self._lock:
            self.stopping = True
            keepers = list(self._keepers)
        self._end(keepers)

    def _end(self, keepers: list[subprocess.Popen[bytes]]) -> None:
        for process in keepers:
            with suppress(OSError):
                process.stdin.close()
        for process in keepers:
            with suppress(subprocess.TimeoutExpired):
                process.wait(keeper.GRACE + 10)
            self._keepers.discard(process)


def run_cell(
    cell: Cell, environment: Mapping[str, str], running: Running, finished: Callable[[Step], None] = lambda step: None
) -> Outcome:
    """Run what is left of a cell; `finished` is called with each step that came to a good end."""
    if cell.start is not None and not cell.start.trained:
        return Outcome(cell, (f"skipped: it starts from {cell.start}, which is not trained",))
    problems = []
    for step in cell.steps:
        if step.done:
            continue
        status = running.run(step, environment)
        if status is None:
            return Outcome(cell, (*problems, "stopped"))
        what = "training" if step.kind == "train" else f"test on {step.test}"
        if status:
            problems.append(f"{what} ended with status {status}: {_last_line(step.log)} (log: {shown(step.log)})")
            if step.kind == "train":
                break
        elif step.kind == "test" and not read_figures(step.place):
            step.marker.unlink()
            problems.append(f"{what} left no CSV file with a column class in {shown(step.place)}")
        else:
            finished(step)
    return Outcome(cell, tuple(problems))


def _last_line(log: Path) -> str:
    """The last line that a process said, which for a mistake is the error."""
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        found = [line.split("\r")[-1].strip() for line in lines if line.strip()]
        return found[-1][:300] if found else "it said nothing"
    return "no log"
