"""Run scripts of the repository in this process, as `__main__`, so that libraries are imported only once."""

import contextlib
import io
import logging
import runpy
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from types import FrameType
from typing import NamedTuple
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState

from utils.logging import AppendingHandler, ScreenHandler

ROOT = Path(__file__).resolve().parent.parent
# Seconds after which a script counts as hanging.
PATIENCE = 300


class Answer(NamedTuple):
    """The result of a script: its status (None for a traceback), its output on both streams, and its seconds."""

    status: object
    errors: str
    output: str
    seconds: float


class TooLate(BaseException):
    """A script did not end."""


def answer(script: str, arguments: Sequence[str]) -> Answer:
    """Run a script of the repository in this process, as `__main__`."""
    errors = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    status: object = None
    begun, root = time.process_time(), logging.getLogger()
    level, threads = root.level, torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Early log records of other tests are not this script's.
    reset_logging()
    with (
        mock.patch.object(sys, "argv", [script, *arguments]),
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(output),
        warnings_as_usual(),
        in_time(),
    ):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:
            status = error.code
        except (Exception, TooLate) as error:  # a user would see a traceback
            errors.write(f"Traceback: {type(error).__name__}: {error}\n")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            threading.excepthook = threading.__excepthook__
            # accelerate's global state, which a new process would not have.
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            root.setLevel(level)
            torch.set_num_threads(threads)
            reset_logging()
    streams = [stream.buffer.getvalue().decode("utf-8") for stream in map(flushed, (errors, output))]
    return Answer(status, *streams, time.process_time() - begun)


def reset_logging() -> None:
    """Remove the handlers that scripts of this project add to the root logger, and leave warnings to Python."""
    logging.captureWarnings(False)
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, (ScreenHandler, MemoryHandler, AppendingHandler)):
            root.removeHandler(handler)


@contextmanager
def warnings_as_usual() -> Iterator[None]:
    """Show warnings as in a new interpreter: pytest would also show those for developers of libraries."""
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        yield


def show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    """Print a warning as an interpreter does; pytest would collect it."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def flushed(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    return stream


@contextmanager
def in_time() -> Iterator[None]:
    """Raise `TooLate` in the block after `PATIENCE` seconds, if the system supports it."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def raise_too_late(_number: int, _frame: FrameType | None) -> None:
        raise TooLate(f"not at its end after {PATIENCE} seconds")

    before = signal.signal(signal.SIGALRM, raise_too_late)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
