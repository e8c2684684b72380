"""The lock of a run's folder: it has one owner and ends with its process."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import utils.locks
from tests.helpers import OTHER_LOCK, write_lock
from utils.errors import UserError, WriteError
from utils.locks import check_ours, locked

HOLD = """
import sys, time
from pathlib import Path
from utils.locks import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".run.lock"


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=Path(__file__).parents[1], text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEAT": 0.1, "LEASE": 0.5, "SILENT_AFTER": 0.5}.items():
        monkeypatch.setattr(utils.locks, name, seconds)


def test_a_folder_has_one_writer_which_the_error_names(path: Path) -> None:
    with locked(path):
        with pytest.raises(UserError) as refused, locked(path):
            pass
        for part in (str(path.parent), f"process {os.getpid()} on {socket.gethostname()}", "last heartbeat 0 s ago"):
            assert part in str(refused.value)
        assert "\n" not in str(refused.value)
        assert path.is_file()
    assert not list(path.parent.iterdir())
    path.parent.rmdir()
    # Released on errors and signals too, without the folder that was created for the lock.
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), locked(path):
            raise error
    assert not path.parent.exists()


def test_a_lock_can_be_waited_for(path: Path) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(path):
            held.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    start = time.monotonic()
    with pytest.raises(UserError, match="being written by another run"), locked(path, patience=0.2):
        pass
    assert time.monotonic() - start >= 0.2
    threading.Timer(0.2, release.set).start()
    with locked(path, patience=60):
        assert path.is_file()
    thread.join()
    assert not path.exists()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=f"process {holder.pid} on "), locked(path):
        pass
    holder.kill()
    holder.wait()
    assert path.is_file()
    with locked(path):
        check_ours(path)
    assert not path.exists()


def test_a_lock_of_another_machine_is_judged_by_its_heartbeat(path: Path, short_lease: None) -> None:
    marker = OTHER_LOCK.replace("120.0", "0.5")
    write_lock(path, marker)
    with pytest.raises(UserError, match=r"process 7 on elsewhere, last heartbeat 0 s ago"), locked(path):
        pass
    write_lock(path, marker, silent=100)
    with locked(path):
        check_ours(path)
    # Silent for a while, as after a network failure, and then alive again.
    write_lock(path, marker, silent=100)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="elsewhere"), locked(path):
        pass
    stop.set()
    thread.join()


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_many_simultaneous_starts_wins(path: Path, stale: bool) -> None:
    """Without a lock, and with one whose holder has ended."""
    for _ in range(20):
        if stale:
            write_lock(path, OTHER_LOCK.replace("=7", f"={2**22 + 1}").replace("elsewhere", socket.gethostname()))
        assert sorted(race(path, 8)) == ["refused"] * 7 + ["won"]
        assert not list(path.parent.glob("*")), "nothing is left behind"


def race(path: Path, count: int) -> list[str]:
    """The results of `count` threads that request a lock at the same time; the owner keeps it until all have tried."""
    start, end = threading.Barrier(count), threading.Barrier(count)
    results: list[str] = []

    def take() -> None:
        start.wait()
        try:
            with locked(path):
                results.append("won")
                end.wait()
        except UserError:
            results.append("refused")
            end.wait()

    threads = [threading.Thread(target=take) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_run_whose_lock_was_taken_over_ends_and_leaves_the_lock(path: Path) -> None:
    with locked(path):
        check_ours(path)
        write_lock(path)
        with pytest.raises(UserError, match=r"taken over by another run .process 7 on elsewhere"):
            check_ours(path)
    assert path.is_file(), "it is no longer ours to release"
    path.unlink()
    check_ours(path)


@pytest.mark.parametrize("folder", ["file", "x" * 300])
def test_an_unwritable_lock_is_an_error(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(WriteError) as refused, locked(tmp_path / folder / ".run.lock"):
        pass
    assert "cannot be written" in str(refused.value) and "\n" not in str(refused.value)
