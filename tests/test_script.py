"""How scripts end: one line for what is not a programmer's mistake, and for a signal at any moment."""

from __future__ import annotations

from utils.script import run_script

import errno
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import dataset.toy_world
from dataset.toy_world import write_toy_dataset
from tests.scripts import start


def end_of(main: Callable[[], int | None], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The exit status of a script, and its lines on standard error."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    return ended.value.code, capsys.readouterr().err.splitlines()


def test_a_file_that_nobody_foresaw_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = end_of(lambda: tmp_path.read_text(encoding="utf-8"), capsys)
    assert (status, lines) == (2, [f"error: {tmp_path}: is a folder, not a file"])
    status, lines = end_of(lambda: (tmp_path / "none").read_text(encoding="utf-8"), capsys)
    assert (status, lines) == (2, [f"error: {tmp_path / 'none'}: no such file or folder"])

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    status, (line,) = end_of(full, capsys)
    assert status == 2 and "the disk is full" in line

    def other() -> None:
        raise OSError("a mistake of the programmer's")

    with pytest.raises(OSError, match="a mistake"):
        run_script(other)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_script_in_a_line_with_all_cleared_away(
    number: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    cleared = []

    def main() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            # What a launcher sends after it comes too late to disturb.
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            cleared.append(True)

    assert end_of(main, capsys) == (status, ["stopped"])
    assert cleared == [True]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
def test_what_breaks_because_of_a_signal_is_not_complained_about(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.") from None

    assert end_of(main, capsys) == (143, ["stopped"])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_libraries_are_imported(number: int, status: int) -> None:
    process = start("inference.py", "--checkpoint", "none", "--model_name", "nosuch", "--dataset", "toy_test")
    time.sleep(0.9)
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", "stopped\n")
    assert process.returncode == status


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
def test_a_signal_while_the_toy_world_is_drawn_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []

    def draw(*arguments: object) -> object:
        drawn.append(arguments)
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    real = dataset.toy_world.draw_toy_class
    monkeypatch.setattr(dataset.toy_world, "draw_toy_class", draw)
    assert end_of(lambda: write_toy_dataset("toy_test", tmp_path / "toy_test"), capsys) == (130, ["stopped"])
    assert len(drawn) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_thread_that_ends_with_a_disk_error_leaves_the_word_to_who_writes_next(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    import threading

    def fail(error: Exception) -> None:
        raise error

    def main() -> None:
        for error in (OSError(errno.ENOSPC, "No space left on device"), ValueError("a mistake")):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()

    status, lines = end_of(main, capsys)
    assert status == 0
    assert "a mistake" in lines[-1]
    assert not any("No space" in line for line in lines)
    assert logging.getLogger().level is not None
