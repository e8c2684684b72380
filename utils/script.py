"""Run a script's `main`: user errors and signals end in one line with a defined exit status, never in a traceback."""

import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from utils.errors import Interrupted, NotFiniteError, Stopped, UserError, original_message
from utils.processes import another_process_ended, check_launch, check_single_process, claim_message

USER_ERROR = 2
NOT_FINITE = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Packages of this project.
OWN_PACKAGES = ("benchmarks", "dataset", "engine", "model", "tests", "utils")
# torch's errors if worker processes end, or have too little shared memory.
WORKER_ERRORS = re.compile("DataLoader worker .*(killed by signal|exited unexpectedly)|shared memory|</torch_")
ACTIVATE = r".venv\Scripts\activate" if os.name == "nt" else "source .venv/bin/activate"
# Longest word in a final message: the longest path of most systems.
MAX_WORD = 1000


def run_script(main: Callable[[], int | None], less_memory: str = "smaller batches", shared: bool = False) -> NoReturn:
    """Run a script's `main` and exit with its status.

    A `UserError` or a file that cannot be read or written ends in one line and status 2. SIGINT and SIGTERM raise
    `Interrupted` in `main`, so that nothing is left half-written, and end in one line and status 130 or 143. One
    process of a launch prints that line.

    Args:
        main: The script; imports that take seconds belong inside, where a signal ends them in one line too.
        less_memory: What to try if the GPU runs out of memory, with the script's options.
        shared: Whether the processes of a launch share the work; otherwise several processes are an error.
    """
    received: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        # A launcher sends SIGTERM after the terminal's SIGINT; only the user sends SIGINT twice.
        if not received or number == signal.SIGINT:
            received.append(number)
            ignore_ended_workers()
            raise Interrupted(number)

    open_missing_streams()
    for number in SIGNALS:
        signal.signal(number, interrupt)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=leave_signals_to_parent)
    threading.excepthook = _report_thread
    status = _status_of(main, less_memory, shared, received)
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os._exit(128 + number))
    sys.exit(status)


def _status_of(main: Callable[[], int | None], less_memory: str, shared: bool, received: list[int]) -> int:
    try:
        check_launch()
        if not shared:
            check_single_process(Path(sys.argv[0]).name)
        status = main() or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as error:
        return _print_end("stopped", 128 + getattr(error, "signal_number", signal.SIGINT))
    except Stopped as error:
        return _print_end(str(error), 128 + error.signal_number)
    except BrokenPipeError:
        # The reader of the output has ended (`| head`). Without this, Python would report the error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if received:
            # A library turned the interruption into an error of its own.
            return _print_end("stopped", 128 + received[0])
        message, status = _explain(error, less_memory)
        if message is not None:
            return _print_end(f"error: {message}", status)
        if not _another_ended():
            raise
        return _print_end("stopped: another process of this launch has ended", status)


def _another_ended() -> bool:
    """Whether another process of the launch has ended, which libraries report as errors of their own."""
    try:
        return another_process_ended() or not claim_message()
    except KeyboardInterrupt:  # the launcher ends the others
        return True


def _explain(error: Exception, less_memory: str) -> tuple[str | None, int]:
    """The message and exit status for an error; no message for a program error."""
    if isinstance(error, UserError):
        return original_message(error), USER_ERROR
    if isinstance(error, NotFiniteError):
        return str(error), NOT_FINITE
    if isinstance(error, OSError):
        from utils.files import DISK_ERRORS, reason

        if error.filename is not None or error.errno in DISK_ERRORS:
            name = os.fsdecode(error.filename) if error.filename else "a file or the output"
            return f"{name}: {reason(error)}", USER_ERROR
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error), USER_ERROR
    if isinstance(error, RuntimeError) and WORKER_ERRORS.search(str(error)):
        return (
            "worker processes that load images ended, or had too little shared memory: give --num_workers 0, or a "
            "container more memory (docker run --shm-size 2g); then start the same command again",
            USER_ERROR,
        )
    # Without an import of torch, the error is not one of its own.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory; to need less: {less_memory}", USER_ERROR
    return None, 1


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The message for a package that is not installed; None for a module of this project."""
    name = (error.name or "").partition(".")[0]
    if name in OWN_PACKAGES:
        return None
    return (
        f"{sys.executable} has no package {name}: python run.py demo installs all packages; then activate their "
        f"environment ({ACTIVATE})"
    )


def explain_missing_packages() -> None:
    """From now on, a package that is missing while a script is imported ends it in one line and status 2."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = missing_package(error) if isinstance(error, ModuleNotFoundError) else None
        if message is None:
            sys.__excepthook__(kind, error, trace)
        else:
            sys.exit(_print_end(f"error: {message}", USER_ERROR))

    sys.excepthook = hook


def open_missing_streams() -> None:
    """Connect closed standard streams, as of a daemon, with the null device: other files would take their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))


def _report_thread(args: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, except for file errors: TensorBoard raises those again at its next write."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _print_end(message: str, status: int) -> int:
    words = (word if len(word) <= MAX_WORD else f"{word[:100]}...{word[-100:]}" for word in message.split())
    if claim_message():
        sys.stderr.write(" ".join(words) + "\n")
    return status


def ignore_ended_workers() -> None:
    """Stop reporting worker processes that have ended: the signal that ends this process may have reached them too.

    torch answers the end of a worker with an exception at whatever line is being run.
    """
    if hasattr(signal, "SIGCHLD"):
        # Not SIG_DFL: Python reports a signal that has arrived already and has no handler any more.
        signal.signal(signal.SIGCHLD, lambda *_: None)


def leave_signals_to_parent() -> None:
    """In a worker process: ignore SIGINT, which a terminal sends to it too, and end on SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# A spawned worker imports the script as a module, and has its own name by then.
if multiprocessing.current_process().name != "MainProcess":
    leave_signals_to_parent()
