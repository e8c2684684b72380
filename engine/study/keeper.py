"""Run one command of a study, and end it when the study ends: `keeper.py MARKER LOG COMMAND...`.

The process that starts this one holds a pipe to standard input; when the pipe closes for any reason, the command ends.
Only one keeper per marker runs a command at a time; another one exits with `BUSY`. The marker is written last, and only
if the command succeeded. Only the standard library is imported, for a fast start.
"""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

# Seconds that a terminated command has before it is killed.
GRACE = 30.0
# Exit status if another keeper runs the command: EX_TEMPFAIL, "try again later".
BUSY = 75


def main(marker: Path, log: Path, command: list[str]) -> int:
    """Run the command unless the marker exists, and return its exit status."""
    marker.parent.mkdir(parents=True, exist_ok=True)
    with marker.with_suffix(".lock").open("a+b") as file:
        if not lock(file):
            return BUSY
        if marker.is_file():
            return 0
        start = time.time()
        with log.open("ab") as output:
            output.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {json.dumps(command)}\n".encode())
            output.flush()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            threading.Thread(target=end_with_stdin, args=(process,), daemon=True).start()
            status = process.wait()
        if status == 0:
            temporary = marker.with_suffix(".tmp")
            temporary.write_text(json.dumps({"seconds": round(time.time() - start, 1)}) + "\n", encoding="utf-8")
            temporary.replace(marker)
        # A process ended by a signal has a negative status, which cannot be an exit status.
        return status if status >= 0 else 128 - status


def end_with_stdin(process: subprocess.Popen[bytes]) -> None:
    """End a process when standard input closes."""
    with suppress(OSError):
        while os.read(0, 1):
            pass
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()


def lock(file: IO[bytes]) -> bool:
    """Try for a second to lock a file; the system releases the lock when this process ends."""
    for _ in range(5):
        with suppress(OSError):
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.2)
    return False


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
