"""What ends a script in one line: a mistake of the user's, a file that cannot be written, a signal."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user's: the message is one line that names what is wrong and what to do.

    Scripts turn it into that line on standard error and exit status 2 (`utils.cli.run_script`); libraries raise it.
    """

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: the line, without the code that found the mistake."""
        return [f"{type(self).__name__}: {self}"]


class WriteError(UserError, OSError):
    """A file or folder that cannot be written; the message names it and says why (`utils.files`)."""


class NotFiniteError(Exception):
    """A loss or gradient was not finite: the step was not taken, the last good state is on disk (exit status 3)."""


class Stopped(Exception):
    """The user asked a run to stop; the message says how to go on (exit status 128 + the signal's number)."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end at once, and what is under way is left (exit status 128 + its number)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


def original_message(error: UserError) -> str:
    """The one line of a UserError, also of one that a DataLoader worker raised.

    torch raises a worker's exception again in the main process with the whole traceback as its message; the traceback
    ends with the class's full name and the message that was meant.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    name = f"{UserError.__module__}.{UserError.__qualname__}: "
    wrapped = [line.removeprefix(name) for line in lines if line.startswith(name)]
    return wrapped[-1] if len(lines) > 1 and wrapped else str(error)
