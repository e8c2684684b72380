"""The documentation as data: pages, fenced blocks, commands, links and tables.

Pages are `README.md`, `CONTRIBUTING.md`, then `docs/README.md` and the pages of `docs/` in the order of its links.

A fenced block without a language contains commands, one per line. `python` blocks are run too, `json` blocks are parsed
line by line, `diff` blocks are applied by `tests/test_extending.py`, and `text` blocks are ignored. HTML comments on
the lines before a block mark it:

    <!-- long: ARGUMENTS -->   `tests/check_commands.py` appends these arguments, which shorten the command, if its
                               script has them (argparse uses the last value)
    <!-- needs: WHAT -->       requires data or hardware: only the arguments are checked
    <!-- status: NUMBER -->    the expected exit status

`<!-- study: ... -->` precedes a table that `benchmarks/doc_tables.py` writes.
"""

import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from unittest import mock

from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
INDEX = "docs/README.md"

FENCE = re.compile(r"\s*(`{3,})\s*(\S*)\s*")
MARK = re.compile(r"<!-- (long|needs|status): (.+) -->")
CODE_SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\[\]]*\]\(([^()\s]+)\)")
HEADING = re.compile(r"#{1,6} (.*)")
COMMANDS, PYTHON, JSON, TEXT, DIFF = "", "python", "json", "text", "diff"
LANGUAGES = (COMMANDS, PYTHON, JSON, TEXT, DIFF)

# Commands that are not run, by their first words, with the reason.
NOT_RUN = {
    ("python", "run.py"): "creates an environment of its own",
    ("python", "-m", "tests.check_commands"): "runs the others",
    ("python", "app.py"): "is a server; tests/test_app.py uses it",
    ("tensorboard",): "is a server",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: the number of its first line, its lines and marks."""

    page: str
    line: int
    language: str
    lines: tuple[str, ...]
    marks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A command line of a block, split into words as a shell does."""

    page: str
    line: int
    words: tuple[str, ...]
    marks: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join(self.words)

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """All pages, in the order in which their commands are run."""
    linked = [f"docs/{target.partition('#')[0]}" for target in links(read_page(INDEX)) if not target.startswith(".")]
    existing = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
    order = [page for page in dict.fromkeys(linked) if page in existing]
    return ["README.md", "CONTRIBUTING.md", INDEX, *order, *(page for page in existing if page not in (*order, INDEX))]


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, text: str) -> list[Block]:
    """The fenced blocks of a page. Raises `ValueError` for an unknown mark and for one without a block."""
    result: list[Block] = []
    marks: dict[str, str] = {}
    language, start, inside = "", 0, []
    for number, line in enumerate(text.splitlines(), start=1):
        match = FENCE.fullmatch(line)
        if start and match:
            result.append(Block(page, start, language, tuple(inside), marks))
            start, marks = 0, {}
        elif start:
            inside.append(line)
        elif match:
            language, start, inside = match.group(2), number + 1, []
        elif mark := MARK.fullmatch(line):
            marks[mark.group(1)] = mark.group(2)
        elif marks or (line.startswith("<!--") and not line.startswith(("<!-- study: ", "<!-- catalog: "))):
            raise ValueError(f"{page}:{number}: an unknown mark, or a mark without a block")
    return result


def commands(block: Block) -> list[Command]:
    """The commands of a block; a block of another language has none."""
    if block.language != COMMANDS:
        return []
    return [
        Command(block.page, number, tuple(words), block.marks)
        for number, line in enumerate(block.lines, start=block.line)
        if (words := shlex.split(line, comments=True))
    ]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code_spans(text: str) -> list[str]:
    return CODE_SPAN.findall(prose(text))


def links(text: str) -> list[str]:
    """Targets of all links and images of a page."""
    return LINK.findall(CODE_SPAN.sub("", prose(text)))


def anchors(text: str) -> set[str]:
    """The anchors of a page by GitHub's rule: the heading in lower case without punctuation."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(text)}


def headings(text: str) -> set[str]:
    """The headings of a page without the signs of code."""
    matches = (HEADING.fullmatch(line) for line in prose(text).splitlines())
    return {match.group(1).replace("`", "") for match in matches if match}


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a page as rows of cells, the header first, without the line of dashes."""
    rows = re.findall(r"(?:^\|.*\|$\n?)+", prose(text), re.MULTILINE)
    cells = [[[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()] for table in rows]
    return [[header, *body] for header, _, *body in cells]


def references(text: str) -> set[tuple[str, str]]:
    """Pages that code refers to, with the section in quotation marks or ""; also across line ends."""
    joined = re.sub(r"\s*\n\s*(?:#\s)?\s*", " ", text)
    return set(re.findall(r"(docs/[\w/]+\.md)(?:,\s\"([^\"]+)\")?", joined))


def reason_not_run(words: Sequence[str]) -> str | None:
    """Why a command is not run; None for one that is."""
    return next((reason for start, reason in NOT_RUN.items() if tuple(words[: len(start)]) == start), None)


def check_arguments(words: Sequence[str]) -> None:
    """Parse a command's arguments with its own parser. Raises `ValueError` with the parser's message."""
    program, *rest = words
    if program == "python" and rest[:1] == ["-m"] and len(rest) > 1:
        check_module(rest[1], rest[2:])
    elif program == "python" and rest:
        check_script(rest[0], rest[1:])
    elif program == "accelerate" and rest[:1] == ["launch"]:
        launch = importlib.import_module("accelerate.commands.launch")
        with parsing():
            parsed = launch.launch_command_parser().parse_args(rest[1:])
        check_script(parsed.training_script, parsed.training_script_args)
    elif program == "sbatch":
        place = next((number for number, word in enumerate(rest) if word.endswith(".sbatch")), 0)
        check_job(rest[place], rest[place + 1 :])
    elif rest[:1] != ["--logdir"] or program != "tensorboard":
        raise ValueError(f"no rule for checking: {shlex.join(words)}")


def check_script(script: str, arguments: Sequence[str]) -> None:
    if not (ROOT / script).is_file():
        raise ValueError(f"{script}: no such script")
    if script != "run.py":
        check_module(module_of(script), arguments)
    elif not set(arguments) & set(importlib.import_module("run").COMMANDS):
        raise ValueError(f"run.py has no command {shlex.join(arguments)}")


def module_of(script: str) -> str:
    return script.removesuffix(".py").replace("/", ".")


def check_job(file: str, arguments: Sequence[str]) -> None:
    """Parse the arguments of a Slurm job with the script that its file starts."""
    script = re.search(r"(\w+\.py) \"\$@\"", read_page(file)) if (ROOT / file).is_file() else None
    if script is None:
        raise ValueError(f"{file}: no such job file")
    check_script(script.group(1), arguments)


def check_module(name: str, arguments: Sequence[str]) -> None:
    """Parse arguments with a module's `script`, `build_parser` or `parse_arguments`; others take none."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"no module {name}: {error}") from error
    with parsing(), mock.patch.object(sys, "argv", [name, *arguments]):
        if hasattr(module, "script"):
            module.script.parse()
        elif hasattr(module, "build_parser"):
            module.build_parser().parse_args()
        elif hasattr(module, "parse_arguments"):
            module.parse_arguments()
        elif arguments:
            raise ValueError(f"{name} takes no arguments")


@cache
def flags_of(name: str) -> set[str]:
    """The flags in a module's help; none for a module without a parser."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(ValueError):
        check_module(name, ["--help"])
    return set(re.findall(r"--\w[\w-]*", output.getvalue()))


@contextlib.contextmanager
def parsing() -> Iterator[None]:
    """Turn a parser's error into `ValueError`; `--help` is none."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            yield
    except UserError as error:
        raise ValueError(str(error)) from error
    except SystemExit as error:
        if error.code:
            raise ValueError(message.getvalue().strip()) from error


def shortened(command: Command) -> Command:
    """The command with the arguments of its `long` mark, or unchanged if its script has none of them.

    Raises `ValueError` if the script has only some of them: unchanged, the command would take long.
    """
    more = shlex.split(command.marks.get("long", ""))
    if not {word for word in more if word.startswith("--")} & flags_of_command(command.words):
        return command
    words = (*command.words, *more)
    check_arguments(words)
    return Command(command.page, command.line, words, command.marks)


def flags_of_command(words: Sequence[str]) -> set[str]:
    if tuple(words[:2]) == ("python", "-m"):
        return flags_of(words[2])
    scripts = [module_of(word) for word in words if word.endswith(".py") and word != "run.py"]
    return flags_of(scripts[0]) if scripts else set()


def repository_files() -> list[Path]:
    """Tracked files and new ones that git does not ignore, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, encoding="utf-8")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{ROOT}: git cannot list its files; this needs a git checkout") from error
    return [Path(name) for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
