"""Runs one command for a study, and ends it when the study is gone: `keeper.py MARKER LOG WORD...`.

Standard input is a pipe that whoever started this holds open; its end, however it comes about, ends the command. One
keeper at a time works for a marker, so that a study which is started again waits for what the one before left behind.
The marker is written last, and only for a command that ended well. Needs the standard library alone, so that it starts
at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

# Seconds that a command has to end by itself once it is asked to.
GRACE = 30.0


def main(marker: Path, log: Path, words: list[str]) -> int:
    """The command's exit status; that of a marker that is there already is 0."""
    marker.parent.mkdir(parents=True, exist_ok=True)
    with marker.with_suffix(".lock").open("a+b") as lock:
        wait_for_lock(lock)
        if marker.is_file():
            return 0
        begun = time.time()
        with log.open("ab") as output:
            output.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {json.dumps(words)}\n".encode())
            output.flush()
            command = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            threading.Thread(target=end_when_alone, args=(command,), daemon=True).start()
            status = command.wait()
        if status == 0:
            temporary = marker.with_suffix(".tmp")
            temporary.write_text(json.dumps({"seconds": round(time.time() - begun, 1)}) + "\n", encoding="utf-8")
            temporary.replace(marker)
        # A command that a signal ended has a negative status, which no process can leave with.
        return status if status >= 0 else 128 - status


def end_when_alone(command: subprocess.Popen[bytes]) -> None:
    """End the command once standard input does."""
    with suppress(OSError):
        while os.read(0, 1):
            pass
    command.terminate()
    try:
        command.wait(GRACE)
    except subprocess.TimeoutExpired:
        command.kill()


def wait_for_lock(file: IO[bytes]) -> None:
    """Hold the file's lock, which the system gives back however this process ends."""
    if os.name == "nt":
        import msvcrt

        while True:
            with suppress(OSError):
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                return
            time.sleep(0.2)
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
