"""One writer to a folder: a lock file that says who writes there, and that outlives no program which was killed."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil

from utils.errors import UserError
from utils.files import writing

# Seconds between two heartbeats, and without one until a holder on another machine counts as gone: network file
# systems show a file's time up to a minute late.
BEAT, GONE_AFTER = 10.0, 120.0
# Seconds until a lock file that nobody has finished writing is taken for one whose writer was killed.
UNFINISHED_AFTER = 2.0
# Of a process's start, which the system's clock can shift a little.
TOLERANCE = 2.0
# Seconds between two attempts to take a lock that is waited for.
ATTEMPT = 0.05


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: a process, by its number and start (seconds since 1970), on a machine; `token` is the claim's.

    host: with the process's own world of process numbers, which containers of one machine do not share.
    """

    host: str
    process: int
    started: float
    token: str

    @classmethod
    def this_process(cls) -> Holder:
        return cls(_host(), os.getpid(), psutil.Process().create_time(), secrets.token_hex(8))

    def __str__(self) -> str:
        return (
            f"process {self.process} on {self.host.split(' ')[0]}, "
            f"started {datetime.fromtimestamp(self.started):%Y-%m-%d %H:%M:%S}"
        )

    def is_gone(self, silent: float) -> bool:
        """Whether the process has ended: here by looking at it, elsewhere by seconds since its last heartbeat."""
        if self.host != _host():
            return silent > GONE_AFTER
        try:
            process = psutil.Process(self.process)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            return abs(process.create_time() - self.started) > TOLERANCE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


class FolderLock:
    """The lock of a folder, held from `acquire` to `release`; several processes of one launch leave it to the first.

    A lock whose holder is gone is taken over. The time of the file is the heartbeat.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.holder = Holder.this_process()
        self._stop = threading.Event()
        self._made: list[Path] = []

    def acquire(self, patience: float = 0.0) -> None:
        """Take the lock; `UserError` that says who holds it, where somebody still does after `patience` seconds."""
        end = time.monotonic() + patience
        while True:
            try:
                with writing(self.path):
                    self._made = self._made or [folder for folder in self.path.parents if not folder.exists()]
                    self._take(self.path)
                break
            except UserError:  # held; or, on Windows, just being deleted
                if time.monotonic() >= end:
                    raise
                time.sleep(ATTEMPT)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def release(self) -> None:
        """Give the lock back, and leave no folder behind that was made for it alone."""
        self._stop.set()
        with suppress(OSError):
            if _read(self.path) == self.holder:
                self.path.unlink()
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def _take(self, path: Path) -> None:
        """Make `path` with our name in it, or put it in the place of one whose holder is gone.

        Only one of several that find the same holder gone makes the claim to its place, a file named after it. Nobody
        else may then replace it, so what is read with the claim in hand still holds when it is replaced.
        """
        while not self._create(path):
            try:
                found, silent = _read(path), _silence(path)
            except FileNotFoundError:
                continue
            if found is None and silent < UNFINISHED_AFTER:
                time.sleep(0.1)
                continue
            if found is not None and not found.is_gone(silent):
                raise UserError(
                    f"{self.path.parent} is being written by another run ({found}, last heard of {silent:.0f} s ago): "
                    "wait for its end, stop it, or give another folder"
                )
            claim = path.with_name(f"{path.name}.{found.token if found else 'unfinished'}")
            self._take(claim)
            if _reads(path, found):
                claim.replace(path)
                return
            claim.unlink()

    def _create(self, path: Path) -> bool:
        # In every attempt: who was refused before us may have made the folder, and has removed it again.
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self.holder)))
        except FileExistsError:
            return False
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return True

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            # A file server that is away for a moment costs a heartbeat and no more.
            with suppress(OSError):
                if _read(self.path) == self.holder:
                    os.utime(self.path)


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[FolderLock]:
    """Hold the lock `path`; `UserError` where somebody else does, for longer than `patience` seconds."""
    lock = FolderLock(path)
    lock.acquire(patience)
    try:
        yield lock
    finally:
        lock.release()


def check_ours(path: Path) -> None:
    """`UserError` where another process holds the lock now, as it may after this machine has slept."""
    try:
        found = _read(path)
    except FileNotFoundError:
        return
    if found is not None and (found.host, found.process) != (_host(), os.getpid()):
        raise UserError(f"{path.parent} was taken over by another run ({found}) while this one was not heard of")


def _host() -> str:
    space = ""
    if sys.platform == "linux":
        with suppress(OSError):
            space = f" {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname() + space


def _read(path: Path) -> Holder | None:
    """Who holds the lock; None for a file that is not written to its end."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return None


def _reads(path: Path, holder: Holder | None) -> bool:
    with suppress(FileNotFoundError):
        return _read(path) == holder
    return False


def _silence(path: Path) -> float:
    """Seconds since the file's last heartbeat, by the clock of the file system that it lies on."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
