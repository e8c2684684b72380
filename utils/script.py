"""How a script starts and ends: this module comes first among its imports, and `run_script` is its last line.

A signal that comes while libraries are imported, which takes seconds, ends the script in one line; so this module
imports nothing that takes long.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from utils.errors import Interrupted, NotFiniteError, Stopped, UserError, original_message
from utils.processes import another_ended, check_alone, speaks_first

USER_ERROR = 2
NOT_FINITE = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ROOT = Path(__file__).resolve().parent.parent
# Characters of a word in what is said at the end: the longest paths of most systems.
LONGEST_WORD = 1000


def run_script(main: Callable[[], int | None], less_memory: str = "smaller batches", shared: bool = False) -> NoReturn:
    """Run a script's `main` and leave with its status; a user's mistake is one line on standard error and status 2.

    less_memory: what to take where the GPU's memory is too small, with the script's flags; shared: whether several
    processes of a launch share its work, which is refused otherwise. One line is said by all of them.
    SIGINT and SIGTERM raise `Interrupted` in `main`, so that it leaves nothing half done, and end in a line too.
    """
    received: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        # A launcher sends SIGTERM after the SIGINT of the terminal; only a person in a hurry sends SIGINT again.
        if not received or number == signal.SIGINT:
            received.append(number)
            forget_children()
            raise Interrupted(number)

    interrupt.ends_main = True
    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    threading.excepthook = _thread_ended
    try:
        status = _status_of(main if shared else _alone(main), received, less_memory)
    finally:
        threading.excepthook = threading.__excepthook__
        for number, handler in before.items():
            signal.signal(number, _leave_silently if handler is _leave else handler)
    sys.exit(status)


def _alone(main: Callable[[], int | None]) -> Callable[[], int | None]:
    """`main`, but a `UserError` in place of the same work and files several times."""

    def alone() -> int | None:
        check_alone(Path(sys.argv[0]).name)
        return main()

    return alone


def _status_of(main: Callable[[], int | None], received: list[int], less_memory: str) -> int:
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as error:
        return _stopped(getattr(error, "signal_number", signal.SIGINT))
    except Stopped as error:
        return _say(str(error), 128 + error.signal_number)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); nothing is left to say, and Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if received:
            # The signal reached a process that we wait for first, and its end is what is complained about.
            return _stopped(received[0])
        line, status = _explain(error, less_memory)
        if line is not None:
            return _say(f"error: {line}", status)
        if not _another_ended():
            raise
        return _say("stopped: another process of this launch has ended", status)


def _another_ended() -> bool:
    """Whether another process of the launch has ended, of which libraries complain in ways of their own."""
    try:
        return another_ended() or not speaks_first()
    except KeyboardInterrupt:  # the launcher ends the others
        return True


def _explain(error: Exception, less_memory: str) -> tuple[str | None, int]:
    """The line and status for an error that is not a programmer's; no line for one that is."""
    if isinstance(error, UserError):
        return original_message(error), USER_ERROR
    if isinstance(error, NotFiniteError):
        return str(error), NOT_FINITE
    if isinstance(error, OSError):
        from utils.files import DISK_ERRORS, reason

        if error.filename is not None or error.errno in DISK_ERRORS:
            return f"{_shown(error.filename)}: {reason(error)}", USER_ERROR
    # Where torch was never imported, none of its errors can have come.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory; these need less: {less_memory}", USER_ERROR
    return None, 1


def _thread_ended(args: threading.ExceptHookArgs) -> None:
    """What ended a thread: TensorBoard's writer hands a disk's error on to the next who writes, who reports it."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _shown(filename: Any) -> str:
    """An error's file; none where the error does not say, as for standard output."""
    if not filename:
        return "a file or the output"
    return os.fsdecode(filename) if isinstance(filename, (str, bytes, os.PathLike)) else str(filename)


def _say(message: str, status: int) -> int:
    words = (word if len(word) <= LONGEST_WORD else f"{word[:100]}...{word[-100:]}" for word in message.split())
    if speaks_first():
        sys.stderr.write(" ".join(words) + "\n")
    return status


def _stopped(number: int) -> int:
    return _say("stopped", 128 + number)


def _leave(number: int, _frame: FrameType | None) -> None:
    """End at once, in a line: while imports run there is nothing to clear away."""
    if speaks_first():
        os.write(2, b"stopped\n")
    os._exit(128 + number)


def _leave_silently(number: int, _frame: FrameType | None) -> None:
    """End at once: the script has had its say."""
    os._exit(128 + number)


def _quiet_child() -> None:
    """A process that helps another one leaves signals to it: the terminal sends Ctrl-C to both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def forget_children() -> None:
    """Let processes that load images end unnoticed, which the signal may have reached too, once we end ourselves.

    torch answers the end of one with an exception at whatever line is being run.
    """
    if hasattr(signal, "SIGCHLD"):
        # Not SIG_DFL: Python complains of a signal that has come already and has no handler any more.
        signal.signal(signal.SIGCHLD, lambda *_: None)


@contextmanager
def children_without_signals() -> Iterator[None]:
    """Let processes that are started in the block ignore SIGINT from their first instruction on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def importing() -> Iterator[None]:
    """Let a signal end the script at once while `main` imports libraries: some do not bear an exception then."""
    ours = [number for number in SIGNALS if getattr(signal.getsignal(number), "ends_main", False)]
    before = {number: signal.signal(number, _leave) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ending_children() -> Iterator[None]:
    """End the processes that help this one where the block is left early: nobody waits for what they do then."""
    try:
        yield
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise


def _is_our_script() -> bool:
    main = getattr(sys.modules["__main__"], "__file__", None)
    if main is None or not Path(main).resolve().is_relative_to(ROOT):
        return False
    # Not so pytest, which may lie in an environment in this folder.
    return "site-packages" not in Path(main).resolve().parts


# Imported elsewhere, in a notebook or by the tests, this leaves signals alone. A process that multiprocessing starts
# imports the script as well, and has been given its name by then.
if multiprocessing.current_process().name != "MainProcess":
    _quiet_child()
elif _is_our_script():
    for _number in SIGNALS:
        signal.signal(_number, _leave)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_quiet_child)
