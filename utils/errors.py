"""Exceptions that end a script in one line: user errors, files that cannot be written, signals."""


class UserError(Exception):
    """A user error; the message is one line that says what is wrong and what to do.

    Scripts print it to standard error and exit with status 2 (`utils.script.run_script`).
    """

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: the message without a traceback."""
        return [f"{type(self).__name__}: {self}"]


class WriteError(UserError, OSError):
    """A file or folder that cannot be written; the message names it and says why (`utils.files`)."""


class NotFiniteError(Exception):
    """A loss or gradient was not finite: the step was not taken, the last valid state is on disk (exit status 3)."""


class Stopped(Exception):
    """A signal stopped a run; the message says how to resume it (exit status 128 + the signal's number)."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Interrupted(KeyboardInterrupt):
    """A signal ended the program at once (exit status 128 + the signal's number)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


def original_message(error: UserError) -> str:
    """The message of a UserError, also of one that a DataLoader worker raised.

    torch re-raises a worker's exception in the main process with its traceback as the message, which ends with the
    class's full name and the original message.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    name = f"{UserError.__module__}.{UserError.__qualname__}: "
    wrapped = [line.removeprefix(name) for line in lines if line.startswith(name)]
    return wrapped[-1] if len(lines) > 1 and wrapped else str(error)
