"""The lock of a run's folder: one winner, and none that outlives its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

import utils.locks
from utils.errors import UserError
from utils.locks import FolderLock, Holder, check_ours, locked


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".run.lock"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Another living process."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def write(path: Path, holder: Holder, silent: float = 0.0) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(holder)), encoding="utf-8")
    os.utime(path, (time.time() - silent,) * 2)


def holder_of(process: int) -> Holder:
    return replace(Holder.this_process(), process=process, started=psutil.Process(process).create_time(), token="x")


def taken(path: Path) -> bool:
    """Whether a new start gets the lock."""
    try:
        with locked(path):
            assert json.loads(path.read_text(encoding="utf-8"))["process"] == os.getpid()
    except UserError as error:
        assert "\n" not in str(error)
        return False
    assert [entry.name for entry in path.parent.parent.rglob("*") if entry.is_file()] == []
    return True


def test_a_folder_has_one_writer_who_is_named(path: Path) -> None:
    with locked(path):
        with pytest.raises(UserError) as refused, locked(path):
            pass
        host = os.uname().nodename if hasattr(os, "uname") else ""
        for part in (str(path.parent), f"process {os.getpid()}", host, "started 20", "last heard of 0 s ago"):
            assert part in str(refused.value)
        assert path.is_file()
    # Given back on errors and signals too, and the folder goes that was made for the lock alone.
    assert not path.parent.exists()
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), locked(path):
            raise error
    assert not path.parent.exists()


def test_a_lock_can_be_waited_for(path: Path) -> None:
    held = FolderLock(path)
    held.acquire()
    start = time.monotonic()
    with pytest.raises(UserError, match="being written by another run"), locked(path, patience=0.2):
        pass
    assert time.monotonic() - start >= 0.2
    threading.Timer(0.2, held.release).start()
    with locked(path, patience=60) as lock:
        assert path.is_file() and lock is not held
    assert not path.exists()


def test_a_lock_is_taken_over_from_a_process_that_has_ended(path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    living = holder_of(sleeper.pid)
    write(path, living, silent=1e6)
    assert not taken(path), "the process lives, whatever its heartbeat"
    write(path, replace(living, started=living.started - 60))
    assert taken(path), "the number belongs to another process now"
    write(path, living)
    sleeper.kill()
    while psutil.Process(sleeper.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert taken(path), "killed, and not yet waited for"
    write(path, living)
    sleeper.wait()
    assert taken(path), "killed"


def test_a_lock_of_another_machine_is_judged_by_its_heartbeat(path: Path) -> None:
    other = replace(Holder.this_process(), host="elsewhere pid:[1]", token="x")
    write(path, other, silent=utils.locks.GONE_AFTER - 20)
    with pytest.raises(UserError, match=r"on elsewhere, .*last heard of 100 s ago"), locked(path):
        pass
    write(path, other, silent=utils.locks.GONE_AFTER + 1)
    assert taken(path)
    # Another container on this machine has its own process numbers.
    write(path, replace(other, host=other.host.replace("elsewhere", utils.locks.socket.gethostname()), process=2**22))
    assert not taken(path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "a"}'])
def test_an_unfinished_lock_is_waited_for_and_then_taken_over(
    path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(utils.locks, "UNFINISHED_AFTER", 0.3)
    path.parent.mkdir()
    path.write_text(content, encoding="utf-8")
    start = time.monotonic()
    assert taken(path)
    assert time.monotonic() - start > 0.2


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("claimed", [False, True])
def test_of_many_starts_in_one_moment_one_wins(path: Path, stale: bool, claimed: bool) -> None:
    """With no lock, with one whose holder is gone, and with one whose next holder was killed while taking over."""
    gone = replace(Holder.this_process(), process=2**22 + 1, token="gone")
    for _ in range(20):
        if stale:
            write(path, gone)
            if claimed:
                write(path.with_name(f"{path.name}.gone"), replace(gone, token="second"))
        gate, winners, refused = threading.Barrier(8), [], []

        def start(gate: threading.Barrier = gate, winners: list = winners, refused: list = refused) -> None:
            lock = FolderLock(path)
            gate.wait()
            try:
                lock.acquire()
                winners.append(lock)
            except UserError as error:
                refused.append(error)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(winners), len(refused)) == (1, 7)
        assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no claim is left behind"
        winners[0].release()
        assert not path.exists()


def test_a_heart_beats_and_stops_with_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils.locks, "BEAT", 0.02)
    with locked(path):
        os.utime(path, (0, 0))
        end = time.monotonic() + 10
        while path.stat().st_mtime < 1 and time.monotonic() < end:
            time.sleep(0.01)
        assert path.stat().st_mtime > 1
    assert not path.exists()


def test_a_run_that_was_taken_over_says_so_and_leaves_the_lock(path: Path) -> None:
    other = replace(Holder.this_process(), host="elsewhere", process=7, token="x")
    with locked(path):
        check_ours(path)
        write(path, other)
        with pytest.raises(UserError, match=r"taken over by another run .process 7 on elsewhere"):
            check_ours(path)
    assert path.is_file(), "it is no longer ours to give back"
    path.unlink()
    check_ours(path)
