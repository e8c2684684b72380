"""Log to the screen and to a file, without disturbing progress bars."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from utils.errors import NotFiniteError, Stopped, UserError, WriteError, original_message
from utils.files import append_text, check_folder
from utils.processes import is_main_process

# Libraries that narrate at INFO level what a user of this project does not need to read.
QUIET = ("accelerate", "httpx", "httpcore", "huggingface_hub", "matplotlib", "onnx_ir", "onnxscript", "PIL", "urllib3")
TIME = "%Y-%m-%d %H:%M:%S"


class ScreenHandler(logging.Handler):
    """Writes records to standard error above any progress bar that is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class WaitingHandler(logging.Handler):
    """Keeps records until there is a file for them: what is said before a run's folder may be written."""

    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class AppendingHandler(logging.Handler):
    """Adds each record to the end of a file, which is open only while it is written.

    A record that cannot be written because another program holds the file (Windows) waits for the next one. Raises
    `WriteError` for a disk that is full or fails.
    """

    def __init__(self, file: Path, formatter: logging.Formatter, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self.file = file
        self.setFormatter(formatter)
        self._waiting = ""

    def emit(self, record: logging.LogRecord) -> None:
        self._waiting += self.format(record) + "\n"
        begun = self.file.is_file()
        try:
            append_text(self.file, self._waiting)
        except WriteError as error:
            if not (begun and isinstance(error.__cause__, PermissionError)):
                self._waiting = ""
                raise
        else:
            self._waiting = ""


class JsonFormatter(logging.Formatter):
    """A record as a line of JSON: time, level, message."""

    def format(self, record: logging.LogRecord) -> str:
        row = {"time": self.formatTime(record, TIME), "level": record.levelname, "message": record.getMessage().strip()}
        return json.dumps(row, ensure_ascii=False)


def set_up_logging(file: Path | None = None, warnings_file: Path | None = None) -> None:
    """Send INFO and above to the screen and, with a time, to the end of `file`; a later call replaces an earlier.

    What was said since the first call without a file comes first in it. warnings_file: where warnings are kept, as JSON
    lines. Warnings of Python's own kind are logged like the others.
    """
    root = logging.getLogger()
    said: list[logging.LogRecord] = []
    for handler in list(root.handlers):
        said += handler.records if isinstance(handler, WaitingHandler) else []
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    logging.captureWarnings(True)
    screen = ScreenHandler()
    screen.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(screen)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    if not is_main_process():
        return
    if file is None:
        root.addHandler(WaitingHandler(said))
        return
    check_folder(file.parent, "log")
    handlers = [AppendingHandler(file, logging.Formatter("%(asctime)s %(levelname)s %(message)s", TIME))]
    if warnings_file is not None:
        handlers.append(AppendingHandler(warnings_file, JsonFormatter(), logging.WARNING))
    for handler in handlers:
        for record in said:
            if record.levelno >= handler.level:
                handler.handle(record)
        root.addHandler(handler)


@contextmanager
def log_kept(file: Path, warnings_file: Path) -> Iterator[None]:
    """Keep a log of what is said in the block, and before it, and of the error or signal that ends it."""
    set_up_logging(file, warnings_file)
    try:
        yield
    except Exception as error:  # whatever ends a run is in its log, and goes on to whoever shows it on the screen
        _log_end(error)
        raise
    finally:
        set_up_logging()


def _log_end(error: Exception) -> None:
    """Add what ends a run to the files of the log, not to the screen: a line, or the traceback of a program error."""
    expected = isinstance(error, (UserError, NotFiniteError, Stopped))
    line = original_message(error) if isinstance(error, UserError) else str(error)
    level = logging.INFO if isinstance(error, Stopped) else logging.ERROR
    trace = None if expected else (type(error), error, error.__traceback__)
    record = logging.LogRecord(__name__, level, __file__, 0, "%s", (line,), trace)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, AppendingHandler) and level >= handler.level:
            with suppress(WriteError):
                handler.handle(record)


def progress_bar(total: int, description: str) -> tqdm:
    """A bar on standard error that stays away where that is no terminal."""
    disable = None if is_main_process() else True
    return tqdm(total=total, desc=description, leave=False, disable=disable, file=sys.stderr, dynamic_ncols=True)
