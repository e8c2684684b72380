"""The changes of docs/extending.md work in a copy of the repository and pass the style checks."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.documented import DIFF, ROOT, blocks, headings, read_page, repository_files, tables
from tests.scripts import environment

PAGE = "docs/extending.md"


class Change(NamedTuple):
    """The change of a file by a `diff` block: pairs of texts before and after."""

    path: str
    parts: list[tuple[str, str]]


def changes() -> dict[str, list[Change]]:
    """The changes of each section of the page, by its heading."""
    text = read_page(PAGE)
    lines = text.splitlines()
    found: dict[str, list[Change]] = {}
    for block in blocks(PAGE, text):
        if block.language == DIFF:
            section = next(line for line in reversed(lines[: block.line]) if line.startswith("## "))
            found.setdefault(section.removeprefix("## "), []).append(read_change(block.lines))
    return found


def read_change(lines: tuple[str, ...]) -> Change:
    """Parse a block: `--- PATH`, then lines that begin with a blank, `-` or `+`; `@@` separates parts."""
    first, *rest = lines
    parts = []
    for part in re.split(r"^@@.*\n", "\n".join(rest) + "\n", flags=re.MULTILINE):
        kept = [(line[:1] or " ", line[1:] + "\n") for line in part.splitlines()]
        assert all(sign in " +-" for sign, _ in kept), part
        parts.append(tuple("".join(line for sign, line in kept if sign in signs) for signs in (" -", " +")))
    return Change(first.removeprefix("--- "), parts)


def make(change: Change, root: Path) -> None:
    """Change a file below `root`; the text before must occur once."""
    file = root / change.path
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    for before, after in change.parts:
        assert text.count(before) == 1 or not text, f"{change.path} has {text.count(before)} times:\n{before}"
        text = text.replace(before, after, 1) if text else after
    file.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with all changes of the page."""
    root = tmp_path_factory.mktemp("extended")
    for file in repository_files():
        if file.suffix in (".py", ".toml", ".json") or file.parts[0] == "ckpt":
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, root / file)
    for change in (change for several in changes().values() for change in several):
        make(change, root)
    return root


def test_each_change_works(extended: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.extended", str(tmp_path)]
    done = subprocess.run(command, cwd=extended, env=environment(), capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_each_change_passes_the_style_checks(extended: Path) -> None:
    paths = {change.path for several in changes().values() for change in several}
    files = sorted(path for path in paths if path.endswith(".py"))
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *files], cwd=extended, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_each_change_touches_as_many_files_as_the_table_says() -> None:
    _, *rows = next(table for table in tables(read_page(PAGE)) if table[0][1:2] == ["files"])
    said = {re.sub(r"\[(.*)\]\(.*\)", r"\1", what).capitalize(): (int(number), first) for what, number, first in rows}
    files = {section: [change.path for change in several] for section, several in changes().items()}
    assert {section: (len(set(paths)), f"`{paths[0]}`") for section, paths in files.items()} == said
    assert set(said) < headings(read_page(PAGE))
