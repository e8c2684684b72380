"""Set up the environment and run a command in it: the demo, the web page, all tests, or the checks of style and types.

`python run.py demo` trains and compares models on the toy datasets, `python run.py app` scores your own images in the
browser. Each command creates `.venv` next to this file and installs what is missing. Only Python 3.10 or newer is
needed.

On Windows, pip installs torch without CUDA. PyTorch's own index has CUDA builds
(https://pytorch.org/get-started/locally lists an index for each CUDA version):

    python run.py --torch-index https://download.pytorch.org/whl/cu126 demo
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import signal
import subprocess
import sys
import venv
from pathlib import Path
from typing import NoReturn

from utils.version import project_version

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
REQUIREMENTS = {
    "demo": ["requirements.txt"],
    "app": ["requirements.txt", "requirements-app.txt"],
    "test": ["requirements.txt", "requirements-dev.txt"],
}
REQUIREMENTS["check"] = REQUIREMENTS["test"]
COMMANDS = {
    "demo": [["-m", "engine.cli.demo"]],
    "app": [["app.py"]],
    # All tests of a file run in one process, because they share trained models.
    "test": [["-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]],
    "check": [["-m", "ruff", "check", "."], ["-m", "ruff", "format", "--check", "."], ["-m", "mypy"]],
}


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors. The parser of the other scripts needs packages that may be missing."""

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(f"{message} (see run.py --help)"))


def package_index(text: str) -> str:
    """Check that the text is a package index for pip: a URL or a folder."""
    if "://" not in text and not (text and Path(text).is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a URL, such as https://..., nor a folder")
    return text


def main(words: list[str] | None = None) -> int:
    # Parsed first and at any position, because the arguments after the command are passed on unchanged.
    index = Parser(add_help=False, allow_abbrev=False)
    index.add_argument(
        "--torch-index", metavar="URL", type=package_index, help="package index to install torch and torchvision from"
    )
    options, words = index.parse_known_args(words)
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[index], allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=project_version())
    parser.add_argument("command", choices=sorted(COMMANDS), help="what to run; check: style, format and types")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="arguments of the command, such as test -k metadata")
    if not words:
        parser.print_help()
        return 2
    arguments = parser.parse_args(words)
    if not PYTHON.is_file() and not {"-h", "--help"}.isdisjoint(arguments.rest):
        parser.print_help()  # the command's own help needs an environment
        return 0
    if arguments.command == "demo" and {"-h", "--help", "--version"}.isdisjoint(arguments.rest) and arguments.rest:
        parser.error(f"the demo takes no options: leave {' '.join(arguments.rest)} out")
    if sys.version_info < (3, 10):  # noqa: UP036  older versions of Python reach this line
        return fail("Python 3.10 or newer is needed, this is " + sys.version.split()[0])
    problem = set_up(REQUIREMENTS[arguments.command], options.torch_index)
    if problem:
        return fail(problem)
    for command in COMMANDS[arguments.command]:
        status = call([str(PYTHON), *command, *arguments.rest])
        if status:
            return status
    return 0


def call(command: list[str]) -> int:
    """Run a command and return its exit status. The command handles signals, not this process."""
    with subprocess.Popen(command, cwd=ROOT) as process:
        # The terminal sends SIGINT to both processes. SIGTERM is sent to this one only, so it is forwarded.
        before = {
            signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number)),
        }
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 128 - status if status < 0 else status


def set_up(requirements: list[str], torch_index: str | None = None) -> str | None:
    """Create the environment and install `requirements` unless that is done; returns an error message or None.

    torch_index: the package index of torch and torchvision; an installed build is replaced once.
    """
    if not PYTHON.is_file():
        say(f"creating {VENV}")
        try:
            venv.create(VENV, with_pip=True, clear=VENV.exists())
        except (subprocess.CalledProcessError, OSError) as error:
            return f"cannot create {VENV} ({error}); on Debian and Ubuntu, install the package python3-venv"
    if torch_index is not None:
        torch = re.findall(r"^(?:torch|torchvision)\b.*", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
        arguments = ["--force-reinstall", "--index-url", torch_index, *torch]
        if not install("torch", f"torch from {torch_index}", arguments, torch_index):
            return f"pip could not install torch from {torch_index}; its message is above"
    for name in requirements:
        wanted = hashlib.sha256(all_of(name)).hexdigest()
        if not install(name, name, ["-r", str(ROOT / name)], wanted):
            return f"pip could not install {name}; its message is above"
    return None


def all_of(name: str) -> bytes:
    """The content of a requirements file and of the files that it includes."""
    content = (ROOT / name).read_bytes()
    included = re.findall(r"^-r (\S+)", content.decode("utf-8"), re.M)
    return b"".join([content, *map(all_of, included)])


def install(stamped: str, what: str, arguments: list[str], wanted: str) -> bool:
    """Install with pip unless the stamp file equals `wanted`; returns whether it is installed."""
    # Written last, so an interrupted installation is repeated.
    stamp = VENV / f".installed-{stamped}"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return True
    large = stamped in ("torch", "requirements.txt")
    say(f"installing {what}" + (" (6.5 GB, mostly torch; takes a few minutes)" if large else ""))
    if call([str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *arguments]):
        return False
    stamp.write_text(wanted, encoding="utf-8")
    return True


def say(message: str) -> None:
    print(message, flush=True)


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
