"""Log to the screen and to a file, without disturbing progress bars."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

# Libraries that narrate at INFO level what a user of this project does not need to read.
QUIET = ("accelerate", "httpx", "httpcore", "huggingface_hub", "matplotlib", "PIL", "urllib3")


def is_main_process() -> bool:
    """Whether this process is the one that talks: of several that a launcher started, the first."""
    return os.environ.get("RANK", "0") == "0"


class ScreenHandler(logging.Handler):
    """Writes records to standard error above any progress bar that is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(file: Path | None = None) -> None:
    """Send INFO and above to the screen and, with a time, to the end of `file`; a later call replaces an earlier."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    screen = ScreenHandler()
    screen.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(screen)
    if file is not None and is_main_process():
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
        lines.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        root.addHandler(lines)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def progress_bar(total: int, description: str) -> tqdm:
    """A bar on standard error that stays away where that is no terminal."""
    disable = None if is_main_process() else True
    return tqdm(total=total, desc=description, leave=False, disable=disable, file=sys.stderr, dynamic_ncols=True)
