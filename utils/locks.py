"""One writer per folder: a lock file that names its holder and expires if the holder stops refreshing it."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

from utils.errors import UserError
from utils.files import folder_for, writing

logger = logging.getLogger(__name__)

# Seconds between two heartbeats, and seconds without one after which a lock expires. Network file systems show a
# file's time up to a minute late.
BEAT, LEASE = 10.0, 120.0
# Seconds without a heartbeat after which a start waits for the lock to expire instead of failing at once.
SILENT_AFTER = 3 * BEAT


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`; if the block fails, remove the empty folders that were created for it.

    A lock whose process has ended on this machine is taken over at once, any other one when its lease has expired.

    Args:
        path: the lock file, in the folder that it protects.
        patience: seconds to wait for a holder that is alive.

    Raises:
        UserError: another process holds the lock; the message names it.
        WriteError: the lock file cannot be written.
    """
    lease = _lease(path)
    with folder_for(path):
        try:
            with writing(path):
                _acquire(lease, path, patience)
            yield
        finally:
            lease.release()


def check_ours(path: Path) -> None:
    """Raise `UserError` if another process holds the lock now, which can happen after this machine was suspended."""
    lease = _lease(path)
    if path.exists() and not lease.is_lock_held_by_us:
        raise UserError(f"{path.parent} was taken over by another run ({_holder(lease)}) while this one was suspended")


def _lease(path: Path) -> SoftFileLease:
    return SoftFileLease(path, lease_duration=LEASE, heartbeat_interval=BEAT)


def _acquire(lease: SoftFileLease, path: Path, patience: float) -> None:
    try:
        lease.acquire(timeout=patience)
        return
    except Timeout:
        silence = _seconds_since_heartbeat(path)
    if silence > SILENT_AFTER:
        silent = f"whose holder ({_holder(lease)}) has been silent for {silence:.0f} s"
        logger.warning("Waiting up to %.0f s for the lock of %s, %s", LEASE + BEAT, path.parent, silent)
        with suppress(Timeout):
            lease.acquire(timeout=LEASE + BEAT)
            return
    raise UserError(
        f"{path.parent} is being written by another run ({_holder(lease)}, last heartbeat {silence:.0f} s ago): wait "
        "until it ends, stop it, or choose another folder"
    )


def _holder(lease: SoftFileLease) -> str:
    owner = lease.owner
    return f"process {owner.pid} on {owner.hostname}" if owner else "of an unknown process"


def _seconds_since_heartbeat(path: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the file system that holds the file."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as now:
            return max(0.0, os.fstat(now.fileno()).st_mtime - path.stat().st_mtime)
    except FileNotFoundError:  # released in the meantime
        return 0.0
