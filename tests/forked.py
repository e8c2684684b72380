"""Scripts in processes of their own that need not import the libraries: each is forked from one that has them.

It runs `python -m tests.forked`, reads a request from standard input a line, and answers in a line.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CAN_FORK = hasattr(os, "fork")


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process from which scripts are forked; it ends with this one."""
    command = [sys.executable, "-m", "tests.forked"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, cwd=Path(__file__).parents[1], text=True, encoding="utf-8", **pipes)


def _ask(**request: Any) -> Any:
    _server().stdin.write(json.dumps(request) + "\n")
    _server().stdin.flush()
    return json.loads(_server().stdout.readline())


class Forked:
    """A script with the interface of `subprocess.Popen`; `slowly`: with a pause before each step."""

    def __init__(self, words: Sequence[str], cwd: Path, environment: Mapping[str, str], slowly: bool) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.returncode: int | None = None
        place = {"cwd": str(cwd), "environment": dict(environment), "said": self._folder.name}
        self.pid: int = _ask(words=words, slowly=slowly, **place)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, "it does not end"
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.wait(timeout)
        output, errors = (Path(self._folder.name, name).read_text(encoding="utf-8") for name in ("1", "2"))
        return output, errors


def serve() -> tuple[list[str], bool] | None:
    """Answer requests; in a forked process, return its command and whether it runs slowly."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                words, slowly = request.pop("words"), request.pop("slowly")
                become(**request)
                return words, slowly
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return None


def become(cwd: str, environment: Mapping[str, str], said: str) -> None:
    """Set the streams, folder and environment of a separate process."""
    for number, file in enumerate((Path(os.devnull), Path(said, "1"), Path(said, "2"))):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))


if __name__ == "__main__":
    import torch
    import torch.utils.tensorboard

    import tests.launched  # noqa: F401
    from tests import slowly

    asked = serve()
    if asked is not None:
        sys.argv = asked[0]
        slowly.main(slowly.PAUSE if asked[1] else 0)
