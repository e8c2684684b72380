"""Writing files completely or not at all, with one-line errors."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from utils.errors import UserError, WriteError
from utils.text import csv_table

logger = logging.getLogger(__name__)

# Instead of the operating system's messages.
REASONS = {
    errno.ENOSPC: "the disk is full; make room and start the same command again",
    errno.EDQUOT: "the disk quota is used up; make room and start the same command again",
    errno.EFBIG: "it would be larger than the system allows",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk or the network file system failed (I/O error)",
    errno.EACCES: "not permitted",
    errno.EPERM: "not permitted",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "a part of this path is a file, not a folder",
    errno.EISDIR: "is a folder, not a file",
    errno.ENOENT: "no such file or folder",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.ENAMETOOLONG: "the name is too long",
}
# Errors of a disk or file system, whatever the file.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
# Seconds to wait for a program that holds a file open (Windows): for an essential file, and for others.
PATIENCE, SHORT_PATIENCE = 60.0, 2.0
NOT_REPLACED = ".not_replaced"
_TEMPORARY = re.compile(r"\..+\.(\d+)@(.+)\.tmp")


def reason(error: BaseException) -> str | None:
    """Describe why a file could not be used; None for an error that is not about files.

    Libraries wrap the system's error: torch keeps it as the cause, safetensors in its message.
    """
    if isinstance(error, UnicodeEncodeError):
        return "the name is not valid UTF-8"
    if isinstance(error, ValueError) and "null" in str(error):
        return "the name has a NUL character"
    if isinstance(error, OSError):
        return REASONS.get(error.errno or 0, error.strerror or str(error))
    if match := re.search(r"\(os error (\d+)\)", str(error)):
        return REASONS.get(int(match.group(1)), str(error))
    wrapped = error.__cause__ or error.__context__
    return reason(wrapped) if isinstance(wrapped, OSError) else None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn file errors in the block into a `WriteError` that names `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries report a full disk with unrelated classes
        why = reason(error)
        if why is None:
            raise
        raise WriteError(f"{path} cannot be written: {why}") from error


@contextmanager
def replacing(path: Path, essential: bool = True) -> Iterator[Path]:
    """Write a temporary file in the block that replaces `path` when the block ends without an error.

    Args:
        path: The file to write; its folder is created.
        essential: Whether work is lost without this file. Windows does not let a file be replaced while another program
            holds it open: an essential file is then a `WriteError` after a minute; any other is soon kept under a
            name that ends in `NOT_REPLACED`, with a warning.

    Yields:
        The temporary path.

    Raises:
        WriteError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}@{socket.gethostname()}.tmp")
    with writing(path), folder_for(path):
        if path.exists() and not path.is_file():
            raise WriteError(f"{path} cannot be written: a folder or a device has this name")
        try:
            yield temporary
            if _move(temporary, path, PATIENCE if essential else SHORT_PATIENCE):
                path.with_name(path.name + NOT_REPLACED).unlink(missing_ok=True)
            elif essential:
                raise WriteError(
                    f"{path} cannot be replaced: another program holds it open, or it may not be changed; close that "
                    "program and start the same command again"
                )
            else:
                aside = path.with_name(path.name + NOT_REPLACED)
                temporary.replace(aside)
                logger.warning("%s is held open by another program: its new content is in %s", path, aside.name)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def folder_for(path: Path) -> Iterator[None]:
    """Create the folder of `path`; if the block fails, remove the empty folders that were created."""
    created: list[Path] = []
    try:
        with writing(path):
            created += (folder for folder in path.parents if not folder.exists())
            path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in created:
            with suppress(OSError):
                folder.rmdir()
        raise


def _move(temporary: Path, path: Path, patience: float) -> bool:
    """Replace a file; False if that is not permitted for `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            temporary.replace(path)
            return True
        except PermissionError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with line feeds; bytes of file names that are not UTF-8 are escaped, such as \\udce9."""
    with replacing(path, essential=False) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write one line of JSON for each row; numbers that are not finite become null."""
    write_text(path, "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows))


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], json_lines: bool = False) -> None:
    """Write rows with the same keys as CSV, None as an empty cell; json_lines: also as JSON lines, ending in .jsonl."""
    write_text(path, csv_table([list(rows[0]), *(list(row.values()) for row in rows)]))
    if json_lines:
        write_json_lines(path.with_suffix(".jsonl"), rows)


def finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: they become None, at any depth."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_text(path: Path, text: str) -> None:
    """Append UTF-8 text to a file completely or not at all; raises `WriteError`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: nothing may be left to write at the interpreter's exit.
        with path.open("ab", buffering=0) as file:
            length = file.seek(0, os.SEEK_END)
            rest = memoryview(text.encode("utf-8", "backslashreplace"))
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(length)
                raise


def check_folder(folder: Path, flag: str) -> None:
    """Raise `UserError`, naming `flag`, if files cannot be written to `folder`; nothing is created.

    For the start of long work; later problems are a `WriteError`.
    """
    try:
        str(folder).encode("utf-8")
        parent = next(parent for parent in (folder, *folder.parents) if _exists(parent))
        if not parent.is_dir():
            raise UserError(f"{flag} {folder}: {parent} is a file or a broken link, not a folder")
        # Permissions alone do not tell whether a file can be created.
        with tempfile.TemporaryFile(dir=parent):
            return
    except (OSError, ValueError) as error:
        shown = str(folder).encode("utf-8", "backslashreplace").decode()
        raise UserError(f"{flag} {shown}: {reason(error) or error}") from error


def _exists(path: Path) -> bool:
    """Whether a file, folder or symbolic link exists; raises `OSError` for a path that cannot be looked up."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that ended processes of this machine left in `folder`."""
    for file in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(file.name)
        if (
            match
            and match[2] == socket.gethostname()
            and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1])))
        ):
            with suppress(OSError):
                file.unlink()
