"""The documentation against the repository: links, commands, flags and test names; nothing is run or downloaded.

What `tests.documented` parses is checked here; `python -m tests.check_commands` runs the commands as well.
"""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from engine.training.feedback_arguments import PRESETS
from tests import check_commands
from tests.documented import (
    COMMANDS,
    INDEX,
    JSON,
    LANGUAGES,
    PYTHON,
    ROOT,
    Block,
    Command,
    anchors,
    blocks,
    check_arguments,
    code_spans,
    commands,
    flags_of,
    links,
    pages,
    prose,
    read_page,
    reason_not_run,
    repository_files,
    shortened,
)

PAGES = pages()
BLOCKS = [block for page in PAGES for block in blocks(page, read_page(page))]
ALL_COMMANDS = [command for block in BLOCKS for command in commands(block)]
# Addresses elsewhere are not fetched.
ELSEWHERE = ("http://", "https://", "mailto:")
DEFECTS = "docs/known_defects.md"
# Flags of other programs that pages speak of.
FOREIGN_FLAGS = {"--logdir", "--num_processes"}
# Files that runs write, which pages name like files of the repository.
WRITTEN = {"comparison.md"}


@cache
def known_files() -> frozenset[str]:
    """What a clone holds: files, and the folders that they lie in."""
    files = repository_files()
    return frozenset(path.as_posix() for file in files for path in (file, *file.parents))


@cache
def known_flags() -> frozenset[str]:
    """Every flag of the scripts and benchmarks."""
    scripts = [
        file.stem for file in ROOT.glob("*.py") if file.name not in ("run.py", "train_cross_attention_feedback.py")
    ]
    modules = [f"benchmarks.{file.stem}" for file in (ROOT / "benchmarks").glob("*.py")]
    runnable = [name for name in modules if name not in ("benchmarks.__init__", "benchmarks.arms")]
    return frozenset().union(*map(flags_of, [*scripts, *runnable, "tests.check_commands"]))


def problem_of_link(page: str, target: str) -> str | None:
    """What is wrong with a link on a page."""
    if target.startswith(ELSEWHERE):
        return None
    path, _, anchor = unquote(target).partition("#")
    to = page
    if path:
        resolved = (ROOT / page).parent.joinpath(path).resolve()
        to = resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else "outside the repository"
        if to not in known_files():
            return f"{target}: no such file in the repository"
    if anchor and (not to.endswith(".md") or anchor not in anchors(read_page(to))):
        return f"{target}: {to} has no heading #{anchor}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_lead_somewhere(page: str) -> None:
    problems = [problem for target in links(read_page(page)) if (problem := problem_of_link(page, target))]
    assert not problems


@pytest.mark.parametrize("page", PAGES)
def test_links_are_of_the_form_that_is_checked(page: str) -> None:
    """A link of the form [text][name], or its definition, would be seen by nobody."""
    text = prose(read_page(page))
    assert not re.findall(r"^\s*\[[^\]]+\]:\s", text, re.MULTILINE)
    assert not re.findall(r"\]\[", text)


def test_every_page_can_be_reached() -> None:
    reached, waiting = set(), ["README.md", INDEX]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        found = [(ROOT / page).parent.joinpath(target.partition("#")[0]).resolve() for target in links(read_page(page))]
        waiting += [path.relative_to(ROOT).as_posix() for path in found if path.suffix == ".md" and path.is_file()]
    assert set(PAGES) <= reached


def test_the_index_names_every_page() -> None:
    assert {(ROOT / page).resolve() for page in PAGES if page.startswith("docs/") and page != INDEX} <= linked_from(
        INDEX
    )


def linked_from(page: str) -> set[Path]:
    return {(ROOT / page).parent.joinpath(target.partition("#")[0]).resolve() for target in links(read_page(page))}


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=lambda command: command.place)
def test_commands_are_accepted_by_their_scripts(command: Command) -> None:
    check_arguments(command.words)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_blocks_are_what_they_say(block: Block) -> None:
    assert block.language in LANGUAGES, f"not one of {', '.join(filter(None, LANGUAGES))}"
    if block.language == PYTHON:
        ast.parse(block.text)
    if block.language == JSON:
        for line in block.lines:
            json.loads(line)
    if block.language != COMMANDS:
        assert not set(block.marks) - {"needs"}
    if "long" in block.marks:
        assert any(shortened(command) is not command for command in commands(block)), "no command takes these arguments"
    assert "needs" not in block.marks or block.marks["needs"]
    assert block.marks.get("status", "0").isdigit()


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_fenced_blocks(page: str) -> None:
    """An indented block is code to a reader too, and would not be checked."""
    assert not re.findall(r"^ {4,}(?:\$ |python|accelerate|pip) ?.*", prose(read_page(page)), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_files_named_in_the_text_exist(page: str) -> None:
    flags, files = known_flags() | FOREIGN_FLAGS, known_files()
    names = {path.rsplit("/", 1)[-1] for path in files} | WRITTEN
    missing = []
    for span in code_spans(read_page(page)):
        for flag in re.findall(r"(?<![\w-])--\w[\w-]*\*?", span):
            if not any(known == flag or (flag.endswith("*") and known.startswith(flag[:-1])) for known in flags):
                missing.append(flag)
        for path in re.findall(r"(?<![\w./*{}-])[\w./-]+\.(?:py|md|toml|yml|ipynb)(?![\w/])", span):
            if (path not in files and f"docs/{path}" not in files) if "/" in path else path not in names:
                missing.append(path)
    assert not missing


def test_the_table_of_presets_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `--(\w+)` \| (\S[^|]*) \| (\S[^|]*) \|$", read_page("docs/feedback.md"), re.MULTILINE)
    shown = {name: {"v2": v2.strip(), "v1": v1.strip()} for name, v2, v1 in rows}
    assert shown == {
        name: {preset: in_words(values[name]) for preset, values in PRESETS.items()} for name in PRESETS["v2"]
    }


def in_words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


LAYERS = {
    "engine": {"engine", "dataset", "model", "utils"},
    "dataset": {"dataset", "utils"},
    "model": {"model", "utils"},
}


@pytest.mark.parametrize("folder", ["engine", "dataset", "model", "utils"])
def test_imports_point_one_way(folder: str) -> None:
    """As docs/architecture.md says."""
    ours = {"engine", "dataset", "model", "utils", "tests", "benchmarks", *(file.stem for file in ROOT.glob("*.py"))}
    for file in (ROOT / folder).rglob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}: a relative import"
                imported.add(node.module.partition(".")[0])
        assert imported & ours <= LAYERS.get(folder, {"utils"}), file


def test_the_tests_that_show_defects_fixed_exist() -> None:
    named = re.findall(r"(tests/\w+\.py)::(\w+)", read_page(DEFECTS))
    assert len(named) >= 11
    for file, name in named:
        assert name in functions_of(file), f"{file}::{name}"


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


# The rules themselves, on a page made for it.

PAGE = """# The *first* page, `code` & [link](docs)

<!-- long: --text_epoch 1 --image_epoch 1 -->
<!-- status: 1 -->
```
python train.py --image_lr 1e-3  # a comment
python inference.py --checkpoint none
```

## Same

## Same

`[not](a_link)` and [![image](a.png)](b.md#same-1 "title")

```text
python nothing.py
```
"""


def test_blocks_commands_and_marks() -> None:
    first, second = blocks("page.md", PAGE)
    assert (first.line, first.language, first.marks) == (
        6, "", {"long": "--text_epoch 1 --image_epoch 1", "status": "1"},
    )  # fmt: skip
    train, inference = commands(first)
    assert train.words == ("python", "train.py", "--image_lr", "1e-3")
    assert shortened(train).words[4:] == ("--text_epoch", "1", "--image_epoch", "1")
    assert shortened(inference) is inference
    assert inference.place == "page.md:7"
    assert (second.language, second.marks, commands(second)) == ("text", {}, [])


@pytest.mark.parametrize(
    "text", ["<!-- long: --x -->\ntext\n```\n```", "<!-- lang: x -->\n```\n```", "```\npython train.py", "<!-- x -->"]
)
def test_marks_and_blocks_that_lead_nowhere_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match=r"page\.md:"):
        blocks("page.md", text)


def test_a_mark_that_a_script_takes_in_part_is_an_error() -> None:
    """Run as it is written, the command would take long."""
    marks = {"long": "--seeds 0 --arms unknown"}
    words = ("python", "-m", "benchmarks.feedback_on_toy")
    with pytest.raises(ValueError, match="unknown"):
        shortened(Command("page.md", 1, words, marks))
    launched = Command("page.md", 1, ("accelerate", "launch", "train.py"), {"long": "--text_epoch 1"})
    assert shortened(launched).words == (*launched.words, "--text_epoch", "1")


def test_links_and_anchors() -> None:
    assert links(PAGE) == ["docs", "a.png", "b.md#same-1"]
    assert anchors(PAGE) == {"the-first-page-code--link", "same", "same-1"}


@pytest.mark.parametrize(
    "line",
    [
        "python train.py --no_such_flag",
        "python train.py --text_epoch many",
        "python no_such_script.py",
        "python run.py no_such_command",
        "python -m benchmarks.no_such_benchmark",
        "python -m benchmarks.base_on_toy --no_such_flag",
        "python -m engine.demo --anything",
        "python train_cross_attention_feedback.py --no_such_flag",
        "accelerate launch --num_processes 2 train.py --no_such_flag",
        "accelerate launch --no_such_flag train.py",
        "tensorboard --no_such_flag",
        "curl somewhere",
    ],
)
def test_what_no_script_takes_is_an_error(line: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        check_arguments(line.split())


def test_what_is_not_run_has_a_reason() -> None:
    assert reason_not_run(["python", "run.py", "demo"])
    assert reason_not_run(["python", "train.py"]) is None


def test_the_check_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_commands.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) >= len(ALL_COMMANDS)
    assert all(command.page in said for command in ALL_COMMANDS)
