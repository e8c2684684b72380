"""Text and JSON from files that somebody else made: read whole, or refused in one line."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.paths import is_no_file

_SHORT = reprlib.Repr()
_SHORT.maxstring = 100


def read_user_text(path: Path, what: str, most_bytes: int) -> str:
    """The UTF-8 text of a file, without a byte order mark; `what` says in errors what the file is.

    Raises UserError for what is no regular file, cannot be read, is larger than `most_bytes`, or is no UTF-8.
    """
    if is_no_file(path):
        raise UserError(f"{what} {path} cannot be read: it is no file")
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise UserError(f"{what} {path} cannot be read: it is larger than {most_bytes // 2**20} MiB")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} cannot be read: it is no UTF-8 text ({error.reason})") from error


def parse_user_json(text: str, where: str) -> Any:
    """What a JSON text says; UserError for one that is damaged or nested too deeply, which begins with `where`."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: no valid JSON ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise UserError(f"{where}: no valid JSON (nested too deeply)") from error


def shown(value: object) -> str:
    """A value of a file as an error message shows it: as in Python, cut where it is long or deep."""
    return _SHORT.repr(value)
