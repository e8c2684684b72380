"""Whether a run may start or resume in a folder, and which of its phases and loops need not be repeated."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from engine.runtime.distributed import from_main_process
from engine.runtime.run_folder import (
    LOCK_FILE,
    LOG_FILE,
    WARNINGS_FILE,
    check_resumable,
    check_same_run,
    describe_differences,
)
from engine.training.phases import Phase
from engine.training.state import signature_in
from utils.errors import UserError
from utils.files import check_folder
from utils.locks import locked
from utils.logging import log_to_files


def check_phases(done: Sequence[int], planned: Sequence[int], phases: Sequence[Phase], save_path: Path) -> list[int]:
    """Epochs done in each of `phases`; `UserError` if the run on disk cannot become a run of these phases.

    The phase that the run has reached may get more epochs, unless its schedule ends with it. A phase on which others
    were trained cannot change.
    """
    remedy = "give another --save_path"
    counts = [*done, *([0] * (len(phases) - len(done)))]
    if any(counts[len(phases) :]):
        raise UserError(f"{save_path} holds a longer run; {remedy}")
    counts = counts[: len(phases)]
    for index, (count, phase) in enumerate(zip(counts, phases, strict=True)):
        if count > phase.epochs:
            raise UserError(f"{save_path} has {count} {phase.stage} epochs, more than {phase.epochs}; {remedy}")
        if count and not phase.can_grow and phase.epochs != planned[index]:
            raise UserError(
                f"{save_path}: loop {phase.loop}'s {phase.stage} stage was started with {planned[index]} epochs, over "
                f"which its learning rate falls; {phase.epochs} epochs are another run: {remedy}"
            )
        if count < phase.epochs and any(counts[index + 1 :]):
            raise UserError(
                f"{save_path}: the {phase.stage} stage ended after {count} epochs and others were trained on it; "
                f"{phase.epochs} epochs are another run: {remedy}"
            )
    return counts


def unchanged_loops(
    loops: Sequence[dict[str, Any]], planned: int, done: Sequence[int], phases: Sequence[Phase]
) -> list[dict[str, Any]]:
    """The results of the loops that need not be finished again.

    planned: the run's earlier number of phases. A loop with epochs to train is finished after them; one that has become
    the last of a shorter run is finished again, as the last.
    """
    open_loops = {phase.loop for count, phase in zip(done, phases, strict=True) if count < phase.epochs}
    if planned > len(phases):
        open_loops.add(phases[-1].loop)
    first = min(open_loops, default=len(loops) + 1)
    return [result for result in loops if result["loop"] < first]


@contextmanager
def locked_folder(save_path: Path, signature: dict[str, Any], accelerator: Accelerator) -> Iterator[Callable[[], None]]:
    """Lock a run's folder until the block ends; yields the function that starts the log.

    Comes after all other checks, so that a mistake leaves nothing behind. The first process holds the lock for all.
    Raises `UserError` if another run is in progress there, and as `check_save_path` does.
    """
    with ExitStack() as stack:
        error: UserError | None = None
        if accelerator.is_main_process:
            try:
                check_folder(save_path, "--save_path")
                stack.enter_context(locked(save_path / LOCK_FILE))
                check_save_path(save_path, signature)
            except UserError as raised:
                error = raised
        rejected = [error is not None]
        broadcast_object_list(rejected)
        if error is not None:
            raise error
        if rejected[0]:
            # The first process has printed the reason.
            raise SystemExit(2)
        if differences := describe_differences(from_main_process(lambda: signature), signature):
            raise UserError(f"this machine's run is not the first one's ({differences}): give all the same files")

        def begin_log() -> None:
            if accelerator.is_main_process:
                stack.enter_context(log_to_files(save_path / LOG_FILE, save_path / WARNINGS_FILE))

        yield begin_log


def check_save_path(save_path: Path, signature: dict[str, Any]) -> None:
    """Raise `UserError` for the folder of another run, and for checkpoints without a run's state."""
    check_resumable(save_path)
    if before := signature_in(save_path):
        check_same_run(save_path, before, signature)
