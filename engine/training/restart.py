"""Whether a run may begin or go on in a folder, and what of it need not be done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from engine.runtime.distributed import from_first
from engine.runtime.run_folder import (
    LOCK_FILE,
    LOG_FILE,
    STATE_FILE,
    WARNINGS_FILE,
    check_same_run,
    check_unused,
    describe_differences,
)
from engine.training.phases import Phase
from engine.training.state import read_state
from utils.errors import UserError
from utils.files import check_folder
from utils.locks import locked
from utils.logging import log_kept


def describe_progress(done: Sequence[int], phases: Sequence[Phase]) -> str:
    """Epochs done, as "text 5 of 5 epochs, image 3 of 20 epochs"."""
    several = len({phase.loop for phase in phases}) > 1
    return ", ".join(
        f"{f'loop {phase.loop} ' if several else ''}{phase.side} {count} of {phase.epochs} epochs"
        for count, phase in zip(done, phases, strict=True)
    )


def continued(done: Sequence[int], planned: Sequence[int], phases: Sequence[Phase], save_path: Path) -> list[int]:
    """Epochs done, fitted to the phases now asked for; `UserError` where they would not be the same run.

    More epochs are fine at the point that the run has reached, unless its learning rate was to end there. A phase that
    others were built on cannot grow.
    """
    counts = [*done, *([0] * (len(phases) - len(done)))]
    if len(counts) > len(phases) and any(counts[len(phases) :]):
        raise UserError(f"{save_path} holds a longer run; give another --save_path")
    counts = counts[: len(phases)]
    for index, (count, phase) in enumerate(zip(counts, phases, strict=True)):
        if count > phase.epochs:
            raise UserError(
                f"{save_path} has {count} {phase.side} epochs already, {phase.epochs} are asked for; "
                "give another --save_path"
            )
        if count and not phase.grows and phase.epochs != planned[index]:
            raise UserError(
                f"{save_path}: loop {phase.loop}'s {phase.side} stage began with {planned[index]} epochs, to whose end "
                f"its learning rate falls; {phase.epochs} epochs are another run: give another --save_path"
            )
        if count < phase.epochs and any(counts[index + 1 :]):
            raise UserError(
                f"{save_path}: the {phase.side} stage ended after {count} epochs and others were trained on it; "
                f"{phase.epochs} epochs are another run: give another --save_path"
            )
    return counts


def still_finished(
    loops: Sequence[dict[str, Any]], planned: int, done: Sequence[int], phases: Sequence[Phase]
) -> list[dict[str, Any]]:
    """The results of the loops that need not be finished again.

    planned: phases that the run had before. A loop that has more epochs to go is finished after them, and one that has
    become the last of a run now shorter is finished again, as the last.
    """
    open_loops = {phase.loop for count, phase in zip(done, phases, strict=True) if count < phase.epochs}
    if planned > len(phases):
        open_loops.add(phases[-1].loop)
    first = min(open_loops, default=len(loops) + 1)
    return [found for found in loops if found["loop"] < first]


@contextmanager
def run_folder(
    save_path: Path, resume: str, signature: dict[str, Any], earlier: dict[str, Any], accelerator: Accelerator
) -> Iterator[Callable[[], None]]:
    """Hold a run's folder until the block ends: nobody else writes there. Gives what begins to keep the log.

    Comes after every other check, so that a mistake leaves nothing behind. The first process of a launch holds it for
    all. Raises `UserError` where another run is under way there, and as `check_save_path` does.
    """
    with ExitStack() as stack:
        refused: list[UserError | None] = [None]
        if accelerator.is_main_process:
            try:
                check_folder(save_path, "--save_path")
                stack.enter_context(locked(save_path / LOCK_FILE))
                check_save_path(save_path, resume, signature, earlier)
            except UserError as error:
                refused = [error]
        answer = [refused[0] is not None]
        broadcast_object_list(answer)
        if refused[0] is not None:
            raise refused[0]
        if answer[0]:
            # The first process has said why.
            raise SystemExit(2)
        if differences := describe_differences(from_first(lambda: signature), signature):
            raise UserError(f"this machine's run is not the first one's ({differences}): give all the same files")

        def begin_log() -> None:
            if accelerator.is_main_process:
                stack.enter_context(log_kept(save_path / LOG_FILE, save_path / WARNINGS_FILE))

        yield begin_log


def check_save_path(save_path: Path, resume: str, signature: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Raise `UserError` where a run must not be written: another run's folder, or a used one with `--resume never`.

    earlier: what a run was asked for by arguments that were not there yet.
    """
    check_unused(save_path, resume)
    file = save_path / STATE_FILE
    if not file.is_file():
        return
    state = read_state(file)
    check_same_run(save_path, {**earlier, **state["signature"]}, signature)
    config = state.get("config") or {}
    if config.get("processes", 1) > 1 and "batch_of" not in config:
        raise UserError(
            f"--save_path {save_path} holds an earlier version's run of {config['processes']} processes with a batch "
            "each; now they share one, which is another run: give another --save_path"
        )
