"""Run every command and Python block of the documentation, from a fresh copy of the repository, and report each.

`tests/documented.py` says which blocks hold commands and what the marks before them mean. Commands are run in the order
of the pages, with this interpreter in place of `python`; later ones use what earlier ones wrote. The form of each is
"as written"; "shortened" by its `long` mark; "arguments only" where a `needs` mark says what is missing here, or where
a rule says why a command is not run, which is shown. In the copy the list of toy_test's images is cut to a few of each
class, so that testing takes seconds. Exit status 1 if any command failed, else 0.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.few_shot import few_shot
from dataset.metadata import kept_file
from engine.data.task import load_task
from tests.documented import (
    PYTHON,
    ROOT,
    Block,
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
from utils.files import write_text
from utils.script import run_script
from utils.tables import format_table

AS_WRITTEN, SHORTENED, ARGUMENTS = "as written", "shortened", "arguments only"
# Images of each class of toy_test that are tested on; some command shows the fourth anomalous one.
TESTED_IMAGES = 8
# A command that takes longer is stopped, in seconds.
LIMIT = 1800
SHOWN_WIDTH = 90
SHOWN_LINES = 15


@dataclass(frozen=True)
class Item:
    """Something to check: where it stands, how it is shown, what is run, and the exit status it should end with.

    argv: None where nothing is run, for the `reason` given; problem: what its own parser has against it.
    """

    page: str
    line: int
    shown: str
    form: str
    argv: list[str] | None
    status: int = 0
    reason: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of an item; status: None where nothing was run and its arguments are fine."""

    item: Item
    seconds: float
    status: int | None
    output: str

    @property
    def failed(self) -> bool:
        return self.status is not None and self.status != self.item.status


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.check_commands", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PATTERN", help='commands whose "PAGE:LINE COMMAND" this expression finds')
    parser.add_argument("--list", action="store_true", help="list the commands and their forms, and run nothing")
    parser.add_argument(
        "--folder", type=Path, help="copy the repository here and keep it; what earlier runs wrote there is used again"
    )
    parser.add_argument("--all_images", action="store_true", help="test on all images of toy_test")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parse_arguments(arguments)
    items = [item for item in documented_items() if wanted(item, asked.only)]
    if not items:
        raise UserError(f"--only {asked.only}: finds no command")
    if asked.list:
        for item in items:
            say(f"{item.page}:{item.line}  [{item.form}]  {item.shown}{because(item)}")
        return 0
    if asked.folder is not None:
        return check(items, asked.folder, asked.all_images)
    folder = Path(tempfile.mkdtemp(prefix="check_commands_"))
    try:
        return check(items, folder, asked.all_images)
    finally:
        if asked.keep:
            say(f"Kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def documented_items(root: Path = ROOT) -> list[Item]:
    """All commands and Python blocks, in the order in which they are run."""
    found = []
    for page in pages(root):
        for block in blocks(page, read_page(page, root)):
            found += [command_item(command) for command in commands(block)]
            if block.language == PYTHON:
                found.append(python_item(block))
    return found


def command_item(command: Command) -> Item:
    # What is not accepted is not run either: without its shorter form it might take hours.
    try:
        check_arguments(command.words)
        run = shortened(command)
    except ValueError as error:
        return Item(command.page, command.line, str(command), ARGUMENTS, None, problem=str(error))
    reason = reason_not_run(command.words) or needed(command.marks.get("needs"))
    if reason:
        return Item(command.page, command.line, str(command), ARGUMENTS, None, reason=reason)
    form = AS_WRITTEN if run is command else SHORTENED
    status = int(command.marks.get("status", 0))
    return Item(command.page, command.line, str(run), form, runnable(run.words), status)


def python_item(block: Block) -> Item:
    shown = f"Python, {len(block.lines)} lines"
    if reason := needed(block.marks.get("needs")):
        return Item(block.page, block.line, shown, ARGUMENTS, None, reason=reason)
    return Item(block.page, block.line, shown, AS_WRITTEN, [sys.executable, "-c", block.text])


def needed(what: str | None) -> str | None:
    return f"needs {what}" if what else None


def runnable(words: Sequence[str]) -> list[str]:
    """A command in words, with this interpreter in place of the one on the path."""
    if words[0] == "accelerate":
        return [sys.executable, "-m", f"accelerate.commands.{words[1]}", *words[2:]]
    return [sys.executable if words[0] == "python" else words[0], *words[1:]]


def wanted(item: Item, pattern: str | None) -> bool:
    return pattern is None or bool(re.search(pattern, f"{item.page}:{item.line} {item.shown}"))


def check(items: Sequence[Item], folder: Path, all_images: bool = False) -> int:
    """Copy the repository to `folder`, run the items there, and say what became of them; returns the exit status."""
    copy_repository(folder)
    if not all_images:
        cut_test_images(folder / "data")
    say(f"{len(items)} commands, in {folder}\n")
    outcomes = []
    for number, item in enumerate(items, start=1):
        say(f"[{number}/{len(items)}] {item.page}:{item.line}  {item.shown}{because(item)}")
        outcome = run_item(item, folder)
        outcomes.append(outcome)
        if outcome.failed:
            last = "\n".join(f"    {line}" for line in outcome.output.splitlines()[-SHOWN_LINES:])
            say(f"  FAILED with status {outcome.status}, expected {item.status}. Its last lines:\n{last}")
        elif item.argv:
            say(f"  {outcome.seconds:.0f} s")
    say("\n" + outcome_table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.failed]
    run = [outcome for outcome in outcomes if outcome.item.argv]
    seconds = sum(outcome.seconds for outcome in outcomes)
    say(
        f"\n{len(run)} run in {seconds:.0f} s, {len(items) - len(run)} by their arguments only, {len(failed)} failed"
        + "".join(f"\n  {outcome.item.page}:{outcome.item.line}  {outcome.item.shown}" for outcome in failed)
    )
    return int(bool(failed))


def copy_repository(folder: Path) -> None:
    """Copy what a clone would hold, uncommitted changes and new files included."""
    for file in repository_files():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, target)


def cut_test_images(data_root: Path) -> None:
    """Draw toy_test and leave a few images of each class in the list that is read from then on."""
    data_root.mkdir(exist_ok=True)
    data = load_task("toy_test", data_root)
    chosen = {record.image_path for record in few_shot(data.records, TESTED_IMAGES, 0)}
    listed = kept_file(data.located)
    lines = listed.read_text(encoding="utf-8").splitlines()
    kept = [lines[0], *(line for line in lines[1:] if json.loads(line)["image_path"] in chosen)]
    write_text(listed, "\n".join(kept) + "\n")


def run_item(item: Item, folder: Path) -> Outcome:
    if item.argv is None:
        return Outcome(item, 0.0, 2 if item.problem else None, item.problem)
    start = time.perf_counter()
    # Datasets are drawn in the copy, and nothing is downloaded.
    environment = {name: value for name, value in os.environ.items() if name != "ANOMALY_DATA_ROOT"}
    environment |= {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            item.argv,
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
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = 124, f"{(error.stdout or b'').decode('utf-8', 'replace')}\nstopped after {LIMIT} s"
    except OSError as error:
        status, output = 127, str(error)
    return Outcome(item, time.perf_counter() - start, status, output)


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """A row for each command, which comes last and is cut to a readable width."""
    rows = [
        [
            outcome.item.page,
            str(outcome.item.line),
            outcome.item.form,
            f"{outcome.seconds:.1f}" if outcome.item.argv else "",
            result(outcome),
            shortly(outcome.item.shown),
        ]
        for outcome in outcomes
    ]
    width = max((len(row[-1]) for row in rows), default=0)
    header = ["Page", "Line", "Form", "Seconds", "Status", "Command".ljust(width)]
    return format_table(header, [[*row[:-1], row[-1].ljust(width)] for row in rows])


def result(outcome: Outcome) -> str:
    if outcome.status is None:
        return "accepted"
    return f"{outcome.status} FAILED" if outcome.failed else str(outcome.status)


def shortly(text: str) -> str:
    return text if len(text) <= SHOWN_WIDTH else f"{text[: SHOWN_WIDTH - 3]}..."


def because(item: Item) -> str:
    return f"  (not run: {item.reason})" if item.reason else ""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    run_script(main)
