"""Logging to the screen, above progress bars, and to the files of a run."""

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from utils.errors import NotFiniteError, Stopped, UserError, WriteError, original_message
from utils.files import append_text, check_folder
from utils.processes import is_main_process

# Libraries whose INFO messages are not for users of this project.
QUIET = ("accelerate", "httpx", "huggingface_hub", "matplotlib", "onnx_ir", "onnxscript", "torch")
TIME = "%Y-%m-%d %H:%M:%S"
Item = TypeVar("Item")
# Records kept in memory until a run has its folder; nothing reaches this number.
MAX_RECORDS = 10**6


class ScreenHandler(logging.Handler):
    """Writes records to standard error, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class AppendingHandler(logging.Handler):
    """Appends each record to a file, which is open only while it is written.

    A record that cannot be written because another program holds the file (Windows) is written with the next one.
    Raises `WriteError` if the disk is full or fails.
    """

    def __init__(self, file: Path, formatter: logging.Formatter, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self.file = file
        self.setFormatter(formatter)
        self._waiting = ""

    def emit(self, record: logging.LogRecord) -> None:
        self._waiting += self.format(record) + "\n"
        exists = self.file.is_file()
        try:
            append_text(self.file, self._waiting)
        except WriteError as error:
            if not (exists and isinstance(error.__cause__, PermissionError)):
                self._waiting = ""
                raise
        else:
            self._waiting = ""


class JsonFormatter(logging.Formatter):
    """Formats a record as a line of JSON: time, level, message."""

    def format(self, record: logging.LogRecord) -> str:
        row = {"time": self.formatTime(record, TIME), "level": record.levelname, "message": record.getMessage().strip()}
        return json.dumps(row, ensure_ascii=False)


def set_up_logging(file: Path | None = None, warnings_file: Path | None = None) -> None:
    """Log INFO and above, and Python's warnings, to the screen and to files; a later call replaces an earlier one.

    Args:
        file: Receives all records with their time, first those since the last call without a file.
        warnings_file: Receives warnings and errors as JSON lines.

    Raises:
        UserError: The folder of `file` cannot be written.
    """
    root = logging.getLogger()
    earlier: list[logging.LogRecord] = []
    for handler in list(root.handlers):
        earlier += handler.buffer if isinstance(handler, MemoryHandler) else []
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
        memory = MemoryHandler(MAX_RECORDS, flushOnClose=False)
        memory.buffer += earlier
        root.addHandler(memory)
        return
    check_folder(file.parent, "log")
    handlers = [AppendingHandler(file, logging.Formatter("%(asctime)s %(levelname)s %(message)s", TIME))]
    if warnings_file is not None:
        handlers.append(AppendingHandler(warnings_file, JsonFormatter(), logging.WARNING))
    for handler in handlers:
        for record in earlier:
            if record.levelno >= handler.level:
                handler.handle(record)
        root.addHandler(handler)


@contextmanager
def log_to_files(file: Path, warnings_file: Path) -> Iterator[None]:
    """Log the block, what was logged before it, and the error or signal that ends it, to files too."""
    set_up_logging(file, warnings_file)
    try:
        yield
    except Exception as error:  # the caller prints it
        _log_end(error)
        raise
    finally:
        set_up_logging()


def _log_end(error: Exception) -> None:
    """Log the end of a run to its files only: one line, or the traceback of a program error."""
    expected = isinstance(error, (UserError, NotFiniteError, Stopped))
    line = original_message(error) if isinstance(error, UserError) else str(error)
    level = logging.INFO if isinstance(error, Stopped) else logging.ERROR
    trace = None if expected else (type(error), error, error.__traceback__)
    record = logging.LogRecord(__name__, level, __file__, 0, "%s", (line,), trace)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, AppendingHandler) and level >= handler.level:
            with suppress(WriteError):
                handler.handle(record)


def progress_bar(total: int, description: str, items: Iterable[Any] | None = None) -> tqdm:
    """A progress bar on standard error, around `items` if there are some; none if that is not a terminal."""
    disable = None if is_main_process() else True
    return tqdm(items, description, total, leave=False, disable=disable, file=sys.stderr, dynamic_ncols=True)


def with_progress(items: Sequence[Item], description: str) -> Iterator[Item]:
    """The items, with a progress bar."""
    return iter(progress_bar(len(items), description, items))
