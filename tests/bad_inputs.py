"""Bad inputs to every script, each of which must end in one line: `python -m tests.bad_inputs`.

The rule is the same for all (`verdict`): exit status 2, one line on standard error that begins with `error: ` and is
the last, no traceback, soon, and no file or folder made, changed or removed anywhere. The scripts run in this process,
as `__main__` and one after another, so that libraries are imported once. The cases are in `tests/bad_cases.py`.
"""

import argparse
import functools
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import matplotlib.font_manager  # noqa: F401  writes a list of fonts into the home folder when it is first imported

from tests.damage import world
from tests.in_process import Answer, answer
from utils.text import format_table

# Seconds of the processor's time that a refusal may take.
SOON = 5.0
# Below the current folder; what a case prepares is there alone.
CASE = Path("case")
# What datasets keep by design as soon as they have been listed.
KEPT = re.compile(r"metadata_test\w*\.jsonl")
# The files of a run, but for temporary ones and its lock.
WHOLE = re.compile(r"here/new(/\w[\w.]*)?")
_NOT_OURS = re.compile(r"\w*(Error|Exception|Warning)\b|usage:|\S+: error:")


@dataclass(frozen=True)
class Case:
    """A command that a script must reject.

    kind: a word for the table. says: a word of the error, or several with "|" between, of which one must be in it.
    what: the damage, in words. prepare: creates files below `CASE`. stand_in: is entered while the script runs, for
    what a test cannot create, such as a folder that root may not write. begins: whether the run in the folder `new`
    may have begun, and leaves files from which it resumes.
    """

    script: str
    kind: str
    arguments: tuple[str, ...]
    says: str = ""
    prepare: Callable[[], object] | None = None
    stand_in: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    begins: bool = False
    what: str = ""

    def __str__(self) -> str:
        words = (word if len(word) <= 40 else f"{word[:20]}...{word[-10:]}" for word in self.arguments)
        return " ".join([self.script, *map(ascii, words), *([f"({self.what})"] if self.what else [])])


@contextmanager
def scratch() -> Iterator[Path]:
    """A world of its own to run scripts in: the current folder is `here`, with the kept runs, their CLIP and images.

    Home and temporary files are in it, too.
    """
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="bad") as name:
        folder = Path(name).resolve()
        for part in ("home", "temporary", "outside"):
            (folder / part).mkdir()
        (folder / "outside" / "evil.txt").write_text("not to be touched", encoding="utf-8")
        shutil.copytree(world(), folder / "here")
        environment = {"HOME": str(folder / "home"), "USERPROFILE": str(folder / "home")}
        os.chdir(folder / "here")
        try:
            with (
                mock.patch.dict(os.environ, environment),
                mock.patch.object(tempfile, "tempdir", str(folder / "temporary")),
                # Nothing may be downloaded.
                mock.patch("model.clip_loading.reach_hub", side_effect=ConnectionError("no network")),
            ):
                yield folder
        finally:
            os.chdir(before)


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """The entries of a folder by path: type, size, and digest of a file's content."""
    found: dict[str, tuple[object, ...]] = {}
    folders = [str(folder)]
    while folders:
        for entry in os.scandir(folders.pop()):
            if KEPT.fullmatch(entry.name):
                continue
            status = entry.stat(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
                found[entry.path] = (status.st_mode,)
            elif entry.is_file(follow_symlinks=False):
                digest = content_digest(entry.path, status.st_size, status.st_mtime_ns, status.st_ino)
                found[entry.path] = (status.st_mode, status.st_size, digest)
            else:
                found[entry.path] = (status.st_mode,)
    return {path[len(str(folder)) + 1 :]: entry for path, entry in found.items()}


@functools.lru_cache(maxsize=10_000)
def content_digest(path: str, *_of_this_version: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def problems_of(case: Case, folder: Path) -> list[str]:
    """The problems of a script's answer to a case, in `scratch`; none if it follows the rule."""
    there = set(Path().iterdir())
    CASE.mkdir()
    try:
        if case.prepare is not None:
            case.prepare()
        before = snapshot(folder)
        with case.stand_in():
            result = answer(case.script, case.arguments)
        after = snapshot(folder)
    finally:
        for path in set(Path().iterdir()) - there:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return verdict(case, result, changed)


def verdict(case: Case, result: Answer, changed: Sequence[str]) -> list[str]:
    """The rule for all cases."""
    lines = result.errors.splitlines()
    marked = [line for line in lines if line.startswith("error: ")]
    wrong = []
    if result.status != 2:
        wrong.append(f"exit status {result.status}")
    if "Traceback" in result.errors + result.output:
        wrong.append(f"a traceback: {lines[-1] if lines else ''}")
    if len(marked) != 1 or lines[-1:] != marked:
        wrong.append(f"{len(marked)} error lines in: {result.errors[-300:]!r}")
    wrong += [f"more than the line: {line!r}" for line in lines if _NOT_OURS.match(line)]
    if marked and not any(word in marked[0] for word in case.says.split("|")):
        wrong.append(f"{case.says!r} is not in {marked[0]!r}")
    if marked and len(marked[0]) > 1200:
        wrong.append(f"a line of {len(marked[0])} characters")
    if case.begins:
        changed = [path for path in changed if not WHOLE.fullmatch(path)]
    if changed:
        wrong.append(f"made, changed or removed: {', '.join(changed)}")
    if result.seconds > SOON:
        wrong.append(f"took {result.seconds:.1f} s")
    return wrong


def main(words: Sequence[str] | None = None) -> int:
    from tests.bad_cases import CASES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="list the cases, and stop")
    parser.add_argument("--only", metavar="WORD", default="", help="a kind of cases, or a script")
    options = parser.parse_args(words)
    chosen = [case for case in CASES if options.only in ("", case.kind, case.script)]
    counts, failed = Counter(case.kind for case in chosen), Counter[str]()
    if options.list:
        sys.stdout.writelines(f"{case.kind}: {case}\n" for case in chosen)
        return 0
    with scratch() as folder:
        for case in chosen:
            wrong = problems_of(case, folder)
            failed[case.kind] += bool(wrong)
            if wrong:
                sys.stdout.write("\n    ".join([f"{case.kind}: {case}", *wrong]) + "\n")
    rows = [[kind, str(count), str(failed[kind])] for kind, count in counts.items()]
    rows.append(["all", str(counts.total()), str(failed.total())])
    sys.stdout.write(format_table(["Kind", "Cases", "Failures"], rows) + "\n")
    return int(failed.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
