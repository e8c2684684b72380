"""Set up and run: `python run.py demo` shows the project on the toy world, `python run.py test` runs all tests.

Each creates `.venv` beside this file, installs what is missing and runs there. Needs nothing but Python 3.10 or newer.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
REQUIREMENTS = {"demo": ["requirements.txt"], "test": ["requirements.txt", "requirements-dev.txt"]}
REQUIREMENTS["check"] = REQUIREMENTS["test"]
COMMANDS = {
    "demo": [["-m", "engine.demo"]],
    # A file's tests stay in one process, so that they share what they trained.
    "test": [["-m", "pytest", "-n", "2", "--dist", "loadfile"]],
    "check": [["-m", "ruff", "check", "."], ["-m", "ruff", "format", "--check", "."]],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=sorted(COMMANDS), help="what to run; check looks at style and format")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="handed on, such as test -k metadata")
    arguments = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036  an older Python gets as far as this line, and is to be told
        return fail("Python 3.10 or newer is needed, this is " + sys.version.split()[0])
    problem = set_up(REQUIREMENTS[arguments.command])
    if problem:
        return fail(problem)
    for command in COMMANDS[arguments.command]:
        status = subprocess.call([str(PYTHON), *command, *arguments.rest], cwd=ROOT)
        if status:
            return status
    return 0


def set_up(requirements: list[str]) -> str | None:
    """Create the environment and install `requirements` unless that was done; returns what went wrong."""
    if not PYTHON.is_file():
        say(f"creating {VENV}")
        try:
            venv.create(VENV, with_pip=True, clear=VENV.exists())
        except (subprocess.CalledProcessError, OSError) as error:
            return f"cannot create {VENV} ({error}); on Debian and Ubuntu, install the package python3-venv"
    for name in requirements:
        # The stamp is written last, so an installation that was cut off is taken up again.
        stamp = VENV / f".installed-{name}"
        wanted = hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
            continue
        say(f"installing {name} (the first time some 6 GB, most of it torch; a few minutes)")
        command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "-r", str(ROOT / name)]
        if subprocess.call([*command, "--quiet"], cwd=ROOT):
            return f"pip could not install {name}; its message is above"
        stamp.write_text(wanted, encoding="utf-8")
    return None


def say(message: str) -> None:
    print(message, flush=True)


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
