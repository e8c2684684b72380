"""Run every command and Python block of the documentation in a fresh copy of the repository.

`tests/documented.py` defines which blocks are commands and what the marks before them mean. Commands run in the order
of the pages; later ones use files of earlier ones. Each is run as written, shortened by its `long` mark, or only
parsed. In the copy, the image list of toy_test is cut to a few images per class, so that testing takes seconds. The
exit status is 1 if any command failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.few_shot import few_shot
from engine.data.task import load_task
from tests.documented import (
    PYTHON,
    ROOT,
    Command,
    blocks,
    check_arguments,
    commands,
    pages,
    read_page,
    reason_not_run,
    repository_files,
    shortened,
)
from utils.errors import UserError
from utils.script import run_script

# Images of each class of toy_test; one command shows the fourth anomalous one.
TESTED_IMAGES = 8
# Seconds after which a command is stopped.
LIMIT = 1800


@dataclass(frozen=True)
class Item:
    """A command or Python block: its place, the command to run (None: only parsed), and the expected exit status."""

    place: str
    text: str
    form: str
    argv: list[str] | None
    status: int = 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.check_commands", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help='run commands whose "PAGE:LINE COMMAND" matches')
    parser.add_argument("--list", action="store_true", help="list the commands and run nothing")
    parser.add_argument("--folder", type=Path, help="copy the repository to this folder and keep it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    items = [item for item in documented_items() if re.search(options.only, f"{item.place} {item.text}")]
    if not items:
        raise UserError(f"--only {options.only} matches no command")
    if options.list:
        for item in items:
            say(f"{item.place}  [{item.form}]  {item.text}")
        return 0
    if options.folder is not None:
        return check(items, options.folder)
    with tempfile.TemporaryDirectory(prefix="check_commands_", ignore_cleanup_errors=True) as folder:
        return check(items, Path(folder))


def documented_items() -> Iterator[Item]:
    """All commands and Python blocks in the order in which they run."""
    for page in pages():
        for block in blocks(page, read_page(page)):
            yield from map(command_item, commands(block))
            if block.language == PYTHON:
                needs = block.marks.get("needs")
                argv = None if needs else [sys.executable, "-c", "\n".join(block.lines)]
                form = f"not run: {needs}" if needs else "as written"
                yield Item(f"{page}:{block.line}", f"Python, {len(block.lines)} lines", form, argv)


def command_item(command: Command) -> Item:
    check_arguments(command.words)
    if reason := reason_not_run(command.words) or command.marks.get("needs"):
        return Item(command.place, str(command), f"arguments only: {reason}", None)
    words = shortened(command).words
    form = "as written" if words == command.words else "shortened"
    argv = [sys.executable, *words[1:]]
    if words[0] == "accelerate":
        argv = [sys.executable, "-m", f"accelerate.commands.{words[1]}", *words[2:]]
    return Item(command.place, " ".join(words), form, argv, int(command.marks.get("status", 0)))


def check(items: Sequence[Item], folder: Path) -> int:
    """Copy the repository to `folder` and run the items there; returns the exit status."""
    copy_repository(folder)
    cut_test_images(folder / "data")
    failed = []
    for number, item in enumerate(items, start=1):
        say(f"[{number}/{len(items)}] {item.place}  [{item.form}]  {item.text}")
        if item.argv is None:
            continue
        start = time.perf_counter()
        status, output = run(item.argv, folder)
        say(f"  status {status} after {time.perf_counter() - start:.0f} s")
        if status != item.status:
            failed.append(item)
            say("\n".join(f"    {line}" for line in output.splitlines()[-15:]))
    say(f"\n{len(failed)} of {len(items)} commands failed")
    for item in failed:
        say(f"  {item.place}  {item.text}")
    return int(bool(failed))


def copy_repository(folder: Path) -> None:
    """Copy the files of a clone, with uncommitted changes and new files."""
    for file in repository_files():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, target)


def cut_test_images(data_root: Path) -> None:
    """Draw toy_test and keep a few images of each class, but all of the class that the pages name files of."""
    data_root.mkdir(exist_ok=True)
    data = load_task("toy_test", data_root)
    chosen = {record.image_path for record in few_shot(data.records, TESTED_IMAGES, 0)}
    for record in data.records:
        if record.image_path not in chosen and record.class_name != "cup":
            (data.located.root / record.image_path).unlink()
    load_task("toy_test", data_root)  # saves the list of these images


def run(argv: Sequence[str], folder: Path) -> tuple[int, str]:
    """The exit status and output of a command; datasets are drawn in the copy and nothing is downloaded."""
    environment = {name: value for name, value in os.environ.items() if name != "ANOMALY_DATA_ROOT"}
    environment |= {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            argv,
            cwd=folder,
            env=environment,
            timeout=LIMIT,
            text=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return 124, str(error)
    return done.returncode, done.stdout


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    run_script(main)
