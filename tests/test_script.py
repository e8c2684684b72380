"""User errors and signals end scripts with one line."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.in_process import ROOT
from utils.errors import NotFiniteError, Stopped, UserError
from utils.script import run_script

IMPORTS = """
from utils.script import run_script


def main():
    print("importing", flush=True)
    import engine.training.base

    print("imported", flush=True)


run_script(main)
"""

needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
BOTH_SIGNALS = pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    threading.excepthook = threading.__excepthook__
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start_code(code: str, **options: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes, **options)


def end_of(main: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> tuple[object, list[str]]:
    """The exit status of a script, and its lines on standard error."""
    with pytest.raises(SystemExit) as ended:
        run_script(main, "--image_batch_size")
    return ended.value.code, capsys.readouterr().err.splitlines()


WORKERS_LINE = (
    "error: worker processes that load images ended, or had too little shared memory: give --num_workers 0, or a "
    "container more memory (docker run --shm-size 2g); then start the same command again"
)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such\nfile"), 2, "error: no such file"),
        (NotFiniteError("loss nan"), 3, "error: loss nan"),
        (Stopped("stopped in epoch 2", 15), 143, "stopped in epoch 2"),
        (torch.OutOfMemoryError("CUDA"), 2, "error: out of GPU memory; to need less: --image_batch_size"),
        (KeyboardInterrupt(), 130, "stopped"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_7_1_1>"), 2, WORKERS_LINE),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), 2, WORKERS_LINE),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), 2, "error: x: is a folder, not a file"),
        (FileNotFoundError(errno.ENOENT, "No such file", b"x"), 2, "error: x: no such file or folder"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "error: a file or the output: the disk is full; make room and start the same command again",
        ),
    ],
)
def test_errors_end_in_one_line_and_their_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    assert end_of(main, capsys) == (status, [line])


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("1 / 0"), OSError("not about a file"), ModuleNotFoundError("no module", name="engine.gone")],
)
def test_a_program_error_keeps_its_traceback(error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        run_script(main)


@needs_signals
@BOTH_SIGNALS
@pytest.mark.parametrize("library_error", [False, True])
def test_a_signal_ends_a_script_in_one_line_after_cleaning_up(
    number: int, status: int, library_error: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if a library turns the interruption into another error."""
    cleaned = []

    def main() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except KeyboardInterrupt:
            if library_error:
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.") from None
            raise
        finally:
            # What a launcher sends after it comes too late to disturb.
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            cleaned.append(True)

    assert end_of(main, capsys) == (status, ["stopped"])
    assert cleaned == [True]


@needs_signals
@BOTH_SIGNALS
def test_a_signal_while_libraries_are_imported(number: int, status: int) -> None:
    process = start_code(IMPORTS)
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    time.sleep(0.3)
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", "stopped\n")
    assert process.returncode == status


WORKERS = """
import time

from utils.script import run_script


def main():
    from torch.utils.data import DataLoader

    for _ in DataLoader(range(8), num_workers=2, collate_fn=slowly):
        print("loaded", flush=True)


def slowly(batch):
    time.sleep(0.5)
    return batch


if __name__ == "__main__":
    run_script(main)
"""


@needs_signals
@BOTH_SIGNALS
def test_worker_processes_end_quietly_when_the_signal_reaches_them_too(number: int, status: int) -> None:
    process = start_code(WORKERS, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "loaded\n"
    os.killpg(process.pid, number)
    assert process.communicate(timeout=60)[1] == "stopped\n"
    assert process.returncode == status


@needs_signals
def test_a_closed_output_pipe() -> None:
    code = "from utils.script import run_script; run_script(lambda: [print('line') for _ in range(10**6)] and None)"
    process = start_code(code)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 1


def test_a_disk_error_in_a_thread_is_raised_at_the_next_write(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> None:
        raise error

    def main() -> None:
        for error in (OSError(errno.ENOSPC, "No space left on device"), ValueError("a program error")):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()

    status, lines = end_of(main, capsys)
    assert status == 0
    assert "a program error" in lines[-1]
    assert not any("No space" in line for line in lines)


@pytest.mark.parametrize(
    "words", [("train.py", "--help"), ("-m", "engine.cli.demo"), ("-m", "dataset.convert", "a", "b")]
)
def test_a_missing_environment_is_named_with_the_command_that_creates_it(words: tuple[str, ...]) -> None:
    ended = subprocess.run([sys.executable, "-S", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2
    for part in ("has no package PIL", "python run.py demo", "activate"):
        assert part in line


@needs_signals
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_connected_with_the_null_device(closed: str, tmp_path: Path) -> None:
    code = f"""
import subprocess, sys
from pathlib import Path
from utils.script import run_script

def main():
    print("output")
    sys.stderr.write("errors")
    file = Path({str(tmp_path / "file")!r}).open("w")
    subprocess.run(["sh", "-c", "echo output; echo errors >&2"], check=True)
    file.write(str(file.fileno()))
    return 5

run_script(main)
"""
    ended = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], cwd=ROOT, check=False)
    assert ended.returncode == 5
    assert int((tmp_path / "file").read_text()) > 2
