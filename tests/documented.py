"""What the documentation says that can be checked: its pages, fenced blocks, commands, links and headings.

Pages are `README.md`, then `docs/README.md`, then the pages of `docs/` in the order in which that index links to them.

A fenced block without a language holds commands, a line each, which may end in a comment. `python` blocks are run too,
`json` blocks are read line by line, `diff` blocks are applied by `tests/test_extending.py`, `text` blocks are left
alone; no other language is known.

Marks are HTML comments on the lines right before a block:

    <!-- long: ARGUMENTS -->   it takes long: `tests/check_commands.py` appends these arguments to each command of the
                               block whose script has these flags (argparse lets the last one win)
    <!-- needs: WHAT -->       it cannot run without that, such as data or a GPU: its arguments alone are checked
    <!-- status: NUMBER -->    its commands end with that exit status by design

`<!-- study: ... -->` stands before a table that `benchmarks/doc_tables.py` makes.
"""

from __future__ import annotations

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

FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*(\S*)\s*")
MARK = re.compile(r"\s*<!--\s*(\w+):\s*(.*?)\s*-->\s*")
CODE_SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
LINK = re.compile(r"\[[^\[\]]*\]\(\s*([^()\s]+)[^()]*\)|<(?:a|img)\s[^>]*?(?:href|src)=\"([^\"]+)\"")
HEADING = re.compile(r"#{1,6}\s+(.*?)\s*#*\s*")
MARKS = ("long", "needs", "status")
COMMANDS, PYTHON, JSON, TEXT, DIFF = "", "python", "json", "text", "diff"
LANGUAGES = (COMMANDS, PYTHON, JSON, TEXT, DIFF)

# The script that parses the arguments of one without a parser of its own, and what it puts before them.
PARSED_BY = {"train_cross_attention_feedback": ("train_cross_attention_feedback_v2", ("--preset", "v1"))}
# Commands whose arguments are checked and that the check does not run, by how they begin, and why.
NOT_RUN = {
    ("python", "run.py"): "makes an environment of its own: to be tried by hand; tests/test_demo.py runs a short demo",
    ("python", "-m", "tests.check_commands"): "is what runs the others",
    ("python", "app.py"): "is a server; tests/test_app.py uses it",
    ("tensorboard",): "is a server",
    ("source",): "changes a shell",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its page relative to the repository, the number of its first line, its lines and marks."""

    page: str
    line: int
    language: str
    lines: tuple[str, ...]
    marks: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


@dataclass(frozen=True)
class Command:
    """A command line of a block, in words as a shell would split it."""

    page: str
    line: int
    words: tuple[str, ...]
    marks: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join(self.words)

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages(root: Path = ROOT) -> list[str]:
    """All pages, in the order in which their commands are run; pages without a link in the index come last."""
    index = root / INDEX
    linked = [(index.parent / target.partition("#")[0]).resolve() for target in links(index.read_text("utf-8"))]
    order = {path: number for number, path in reversed(list(enumerate(linked)))}
    found = sorted((root / "docs").glob("*.md"), key=lambda path: (order.get(path.resolve(), len(order)), path.name))
    others = [path.relative_to(root).as_posix() for path in found if path != index]
    return ["README.md", INDEX, *others]


def read_page(page: str, root: Path = ROOT) -> str:
    return (root / page).read_text(encoding="utf-8")


def blocks(page: str, text: str) -> list[Block]:
    """The fenced blocks of a page. Raises `ValueError` for a mark that is not known or stands before no block."""
    found: list[Block] = []
    marks: dict[str, str] = {}
    fence, language, start, inside = "", "", 0, []
    for number, line in enumerate(text.splitlines(), start=1):
        match = FENCE.fullmatch(line)
        if fence:
            if match and match.group(1).startswith(fence) and not match.group(2):
                found.append(Block(page, start, language, tuple(inside), marks))
                fence, marks = "", {}
            else:
                inside.append(line)
        elif match:
            fence, language, start, inside = match.group(1), match.group(2), number + 1, []
        elif (mark := MARK.fullmatch(line)) and mark.group(1) in MARKS:
            marks[mark.group(1)] = mark.group(2)
        elif mark and mark.group(1) == "study":
            continue
        elif line.strip().startswith("<!--"):
            raise ValueError(f"{page}:{number}: not a mark ({', '.join(MARKS)}): {line.strip()}")
        elif marks:
            raise ValueError(f"{page}:{number}: the marks above stand before no block")
    if fence:
        raise ValueError(f"{page}:{start}: this block has no end")
    return found


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
    """A page without its fenced blocks, with as many lines as before."""
    lines, fence = [], ""
    for line in text.splitlines():
        match = FENCE.fullmatch(line)
        if match and not fence:
            fence = match.group(1)
        elif match and match.group(1).startswith(fence) and not match.group(2):
            fence = ""
        elif not fence:
            lines.append(line)
            continue
        lines.append("")
    return "\n".join(lines)


def code_spans(text: str) -> list[str]:
    """What stands between backticks in a page's prose."""
    return [match.group(2).strip() for match in CODE_SPAN.finditer(prose(text))]


def links(text: str) -> list[str]:
    """Targets of all links and images of a page."""
    plain = CODE_SPAN.sub("", prose(text))
    found = []
    while match := LINK.search(plain):
        found.append(match.group(1) or match.group(2))
        # An image may be the text of a link: without it, the link around it is found in the next round.
        plain = plain[: match.start()] + plain[match.end() :]
    return found


def anchors(text: str) -> set[str]:
    """What a link may name after `#`, by GitHub's rule: the heading in small letters, without punctuation."""
    found: set[str] = set()
    counts: dict[str, int] = {}
    for line in prose(text).splitlines():
        if not (match := HEADING.fullmatch(line)):
            continue
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match.group(1))
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = counts.get(slug, 0)
        counts[slug] = number + 1
        found.add(f"{slug}-{number}" if number else slug)
    return found


def headings(text: str) -> set[str]:
    """The headings of a page as they are written, without the signs of code and emphasis."""
    found = (HEADING.fullmatch(line) for line in prose(text).splitlines())
    return {re.sub(r"[`*]", "", match.group(1)) for match in found if match}


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a page as rows of cells, the header first and without the line of dashes."""
    found: list[list[list[str]]] = []
    inside = False
    for line in prose(text).splitlines():
        if is_row := line.startswith("|"):
            if not inside:
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        inside = is_row
    return [[header, *rows] for header, _, *rows in found]


def references(text: str) -> set[tuple[str, str]]:
    """Pages of docs/ that code names, each with the section in quotation marks behind it, or ""; over line ends too."""
    joined = re.sub(r"\s*\n\s*(?:#\s)?\s*", " ", text)
    return set(re.findall(r"(docs/[\w/]+\.md)(?:,\s\"([^\"]+)\")?", joined))


def reason_not_run(words: Sequence[str]) -> str | None:
    """Why the check does not run a command; None for one that it runs."""
    return next((reason for start, reason in NOT_RUN.items() if tuple(words[: len(start)]) == start), None)


def check_arguments(words: Sequence[str]) -> None:
    """Let a command's own parser read its arguments, without running it; `ValueError` says what is wrong."""
    program, *rest = words
    if program == "python" and rest[:1] == ["-m"] and len(rest) > 1:
        return check_module(rest[1], rest[2:])
    if program == "python" and rest and rest[0].endswith(".py"):
        return check_script(rest[0], rest[1:])
    if program == "accelerate" and rest[:1] == ["launch"]:
        return check_launch(rest[1:])
    if program == "sbatch":
        return check_job(rest)
    if program == "tensorboard":
        expected = len(rest) == 2 and rest[0] == "--logdir"
    else:
        expected = list(words) == ["source", ".venv/bin/activate"]
    if not expected:
        raise ValueError(f"no rule says how to check: {shlex.join(words)}")
    return None


def check_script(script: str, arguments: Sequence[str]) -> None:
    if not (ROOT / script).is_file() or ("/" in script and not script.startswith("examples/")):
        raise ValueError(f"{script}: no such script beside the README")
    if script == "run.py":
        known = importlib.import_module("run").COMMANDS
        if len(arguments) != 1 or arguments[0] not in known:
            raise ValueError(f"run.py takes one of {', '.join(known)}, not {shlex.join(arguments)}")
        return
    name = module_of(script)
    name, first = PARSED_BY.get(name, (name, ()))
    check_module(name, [*first, *arguments])


def module_of(script: str) -> str:
    """A script's name as that of a module: examples lie in a folder."""
    return script.removesuffix(".py").replace("/", ".")


def check_job(arguments: Sequence[str]) -> None:
    """Let the script that a job file starts read what is handed to it."""
    place = next((number for number, word in enumerate(arguments) if word.endswith(".sbatch")), len(arguments))
    file = ROOT / "".join(arguments[place : place + 1])
    if not file.is_file():
        raise ValueError(f"sbatch {shlex.join(arguments)}: no such job file")
    script = re.search(r"(\w+\.py) \"\$@\"", file.read_text(encoding="utf-8"))
    check_script(script.group(1), arguments[place + 1 :])


def check_launch(arguments: Sequence[str]) -> None:
    launch = importlib.import_module("accelerate.commands.launch")
    with parsing():
        parsed = launch.launch_command_parser().parse_args(list(arguments))
    check_script(parsed.training_script, parsed.training_script_args)


def check_module(name: str, arguments: Sequence[str]) -> None:
    """Let a module's `build_parser` or `parse_arguments` read arguments; one that has neither takes none."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"no module {name}: {error}") from error
    with parsing(), mock.patch.object(sys, "argv", [name, *arguments]):
        if hasattr(module, "build_parser"):
            module.build_parser().parse_args()
        elif hasattr(module, "parse_arguments"):
            module.parse_arguments()
        elif arguments:
            raise ValueError(f"{name} takes no arguments")


@cache
def flags_of(name: str) -> set[str]:
    """The flags that a module's help names; none for one without a parser."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        module = importlib.import_module(name)
        with mock.patch.object(sys, "argv", [name, "--help"]):
            if hasattr(module, "build_parser"):
                module.build_parser().parse_args()
            elif hasattr(module, "parse_arguments"):
                module.parse_arguments()
    return set(re.findall(r"--\w[\w-]*", said.getvalue()))


@contextlib.contextmanager
def parsing() -> Iterator[None]:
    """Turn what a parser does on a mistake into `ValueError`; `--help` is none."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            yield
    except UserError as error:
        raise ValueError(str(error)) from error
    except SystemExit as error:
        if error.code:
            raise ValueError(said.getvalue().strip()) from error


def shortened(command: Command) -> Command:
    """The command with the arguments of its `long` mark, or as it is where its script has none of these flags.

    Raises `ValueError` where the script has some of them and does not accept them: as it is, it would take long.
    """
    more = shlex.split(command.marks.get("long", ""))
    if not flags_in(more) & flags_of_command(command.words):
        return command
    longer = (*command.words, *more)
    check_arguments(longer)
    return Command(command.page, command.line, longer, command.marks)


def flags_in(words: Sequence[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


def flags_of_command(words: Sequence[str]) -> set[str]:
    """The flags that a command's script has, however it is started; none for one that is not of this project."""
    if tuple(words[:2]) == ("python", "-m"):
        return flags_of(words[2])
    scripts = [module_of(word) for word in words if word.endswith(".py") and word != "run.py"]
    return flags_of(PARSED_BY.get(scripts[0], scripts)[0]) if scripts else set()


def repository_files(root: Path = ROOT) -> list[Path]:
    """Tracked files and new ones that git does not ignore, relative to the root; `UserError` outside a checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True, encoding="utf-8")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{root}: git cannot list its files; this needs a git checkout") from error
    return [Path(name) for name in done.stdout.split("\0") if name and (root / name).is_file()]
