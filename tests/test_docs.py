"""The documentation against the repository: links, commands, options, files and figures. Nothing is run."""

from __future__ import annotations

import ast
import csv
import json
import re
import statistics
from collections import defaultdict
from dataclasses import fields
from functools import cache
from urllib.parse import unquote

import pytest

from engine.config.training import BaseConfig, CrossAttentionRunConfig, FeedbackConfig
from engine.evaluation.results import METRICS
from engine.study.study import read_study
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
    headings,
    links,
    pages,
    read_page,
    references,
    repository_files,
    shortened,
    tables,
)
from utils.arguments import command_options, make_parser

PAGES = pages()
BLOCKS = [block for page in PAGES for block in blocks(page, read_page(page))]
ALL_COMMANDS = [command for block in BLOCKS for command in commands(block)]
METHOD = "docs/method.md"
# Options of other programs, and of run.py.
FOREIGN_FLAGS = {"--machine_rank", "--multi_gpu", "--num_processes", "--shm-size", "--torch-index"}
# Files that runs write, or that are not in this repository.
OTHER_FILES = {"comparison.md", "study.md", "forward_utils_cross_attention.py"}
MOST_WORDS = 16_400


@cache
def known_files() -> frozenset[str]:
    """Files of a clone and their folders."""
    files = repository_files()
    return frozenset(path.as_posix() for file in files for path in (file, *file.parents))


@cache
def known_flags() -> frozenset[str]:
    """All options of scripts, tools and benchmarks."""
    scripts = [file.stem for file in ROOT.glob("*.py") if file.stem != "run"]
    modules = [f"benchmarks.{file.stem}" for file in (ROOT / "benchmarks").glob("[!_]*.py")]
    others = [
        "tests.check_commands",
        "dataset.convert",
        "engine.cli.share",
        "engine.evaluation.rescore",
        "examples.run_onnx",
    ]
    return frozenset().union(*map(flags_of, [*scripts, *modules, *others]))


def link_problem(page: str, target: str) -> str | None:
    """The problem of a link; external addresses are not fetched."""
    if re.match(r"https?://|mailto:", target):
        return None
    path, _, anchor = unquote(target).partition("#")
    resolved = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
    file = resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else "outside the repository"
    if file not in known_files():
        return f"{target}: no such file"
    if anchor and (not file.endswith(".md") or anchor not in anchors(read_page(file))):
        return f"{target}: {file} has no heading #{anchor}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page: str) -> None:
    assert not [problem for target in links(read_page(page)) if (problem := link_problem(page, target))]


def test_the_index_names_every_page_and_the_earlier_guides() -> None:
    index = read_page(INDEX)
    assert {f"docs/{target.partition('#')[0]}" for target in links(index)} >= {
        page for page in PAGES if page.startswith("docs/") and page != INDEX
    }
    (guides,) = [rows for header, *rows in tables(index) if header[0] == "earlier name"]
    assert all(links(row[1]) or code_spans(row[1]) for row in guides)


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=lambda command: command.place)
def test_commands_are_accepted_by_their_scripts(command: Command) -> None:
    check_arguments(command.words)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_blocks_are_valid(block: Block) -> None:
    assert block.language in LANGUAGES
    if block.language == PYTHON:
        ast.parse("\n".join(block.lines))
    if block.language == JSON:
        for line in block.lines:
            json.loads(line)
    if "long" in block.marks:
        assert any(shortened(command) is not command for command in commands(block)), "no command has these options"
    assert block.language == COMMANDS or not set(block.marks) - {"needs"}


@pytest.mark.parametrize("page", PAGES)
def test_options_and_files_in_the_text_exist(page: str) -> None:
    text = read_page(page)
    # What the changes of docs/extending.md add.
    flags = known_flags() | FOREIGN_FLAGS | {f"--{name}" for name in re.findall(r"^\+    (\w+): ", text, re.MULTILINE)}
    files = known_files() | set(re.findall(r"^--- (.+)", text, re.MULTILINE))
    names = {path.rsplit("/", 1)[-1] for path in files} | OTHER_FILES
    missing = []
    for span in code_spans(text):
        for flag in re.findall(r"(?<![\w-])--\w[\w-]*\*?", span):
            if flag not in flags and not (flag.endswith("*") and any(known.startswith(flag[:-1]) for known in flags)):
                missing.append(flag)
        for path in re.findall(r"(?<![\w./*{}-])[\w./-]+\.(?:py|md|toml|yml|ipynb)(?![\w/])", span):
            if path not in files and f"docs/{path}" not in files and ("/" in path or path not in names):
                missing.append(path)
    assert not missing


def test_the_documentation_is_short() -> None:
    """Tables that are made from files or checked against the code do not count."""
    words = 0
    for page in set(PAGES) - {"CONTRIBUTING.md"}:
        text = re.sub(r"^<!-- (?:study|catalog): .*\n(?:\|.*\n)*", "", read_page(page), flags=re.MULTILINE)
        text = re.sub(
            r"^\| (?:argument \| base|names \| accepted|GPU \| `--prec|pixels \| tok).*\n(?:\|.*\n)*",
            "",
            text,
            flags=re.MULTILINE,
        )
        words += len(text.split())
    assert words <= MOST_WORDS
    assert len(read_page("README.md").split()) <= 600


def test_the_table_of_defaults_is_that_of_the_code() -> None:
    presets = FeedbackConfig.__dataclass_fields__["preset"].metadata["choices"]
    columns = {
        "base": BaseConfig(),
        "cross-attention": CrossAttentionRunConfig(),
        **{name: FeedbackConfig.of(preset=name) for name in presets},
    }
    header, *rows = next(table for table in tables(read_page(METHOD)) if table[0][1:] == list(columns))
    table = {row[0].strip("`-"): dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    assert table == {name: {title: default_of(config, name) for title, config in columns.items()} for name in table}
    assert set().union(*(FeedbackConfig.preset_values(name) for name in presets)) <= set(table)


def default_of(config: object, name: str) -> str:
    value = getattr(config, name) if name in {item.name for item in fields(config)} else "-"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_the_flags_of_the_deviations_make_the_published_preset() -> None:
    """Each is one deviation, all of them are the preset; a study measures those that the toy datasets can show."""
    header, *rows = next(table for table in tables(read_page(METHOD)) if table[0][0] == "what")
    column, gain = header.index("flag"), header.index("gain on the toy datasets")
    flags = [words for row in rows for words in row[column].strip("`").split()]
    assert BaseConfig.preset_values("published") == vars(make_parser(BaseConfig, None).parse_args(flags))
    measured = [row[column].strip("`") for row in rows if not row[gain].startswith("n/a")]
    study = read_study(ROOT / "studies" / "deviations.toml")
    arms = {" ".join(command_options(arm.arguments)) for arm in study.arms.values()}
    assert {*measured, "--preset published", ""} <= {words.replace("1e-05", "1e-5") for words in arms}


@cache
def results() -> dict[str, dict[str, list[float]]]:
    """The values of docs/results/*.csv of single runs, by arm and metric; tests/test_doc_tables.py checks studies."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted((ROOT / "docs" / "results").glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                if "arm" in row and not {"train", "compared_with"} & row.keys():
                    for metric in METRICS.keys() & row.keys():
                        values[row["arm"]][metric].append(float(row[metric]))
    return values


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_values_follow_from_the_seeds(page: str) -> None:
    """Means and standard deviations; those shown were computed before the values of the seeds were rounded."""
    metrics = {title: metric for metric, title in METRICS.items()}
    checked = 0
    for header, *rows in tables(read_page(page)):
        for arm, *cells in rows if header[0] != "Arm" else ():
            for title, cell in zip(header[1:], cells, strict=True):
                if title in metrics:
                    values = results()[arm][metrics[title]]
                    mean, _, spread = cell.partition(" ± ")
                    assert float(mean) == pytest.approx(statistics.mean(values), abs=0.015), (arm, title)
                    expected = statistics.stdev(values) if len(values) > 1 else 0
                    assert float(spread or 0) == pytest.approx(expected, abs=0.015), (arm, title)
                    checked += 1
    assert checked >= 12


def test_the_tests_of_the_known_defects_exist() -> None:
    named = re.findall(r"(tests/\w+\.py)::(\w+)", read_page(METHOD))
    assert len(named) >= 11
    for file, name in named:
        assert f"def {name}(" in read_page(file), f"{file}::{name}"


def test_sections_that_the_code_refers_to_exist() -> None:
    missing = []
    for file in repository_files():
        if file.suffix in (".py", ".txt", ".toml", ".ipynb", ".html", ".yml", ".md"):
            for page, section in references((ROOT / file).read_text(encoding="utf-8")):
                if page not in known_files() or (section and section not in headings(read_page(page))):
                    missing.append(f'{file}: {page}, "{section}"')
    assert not missing


# The rules themselves, on a page made for it.

PAGE = """# The first page, `code`

<!-- long: --text_epoch 1 --image_epoch 1 -->
<!-- status: 1 -->
```
python train.py --image_lr 1e-3  # a comment
python inference.py --checkpoint none
```

`[not](a_link)`, [link](docs) and ![image](a.png)

```text
python nothing.py
```

| a | b |
|---|--:|
| 1 | 2 |
"""


def test_pages_are_parsed() -> None:
    first, second = blocks("page.md", PAGE)
    assert (first.line, first.language) == (6, "")
    assert first.marks == {"long": "--text_epoch 1 --image_epoch 1", "status": "1"}
    train, inference = commands(first)
    assert train.words == ("python", "train.py", "--image_lr", "1e-3")
    assert shortened(train).words[4:] == ("--text_epoch", "1", "--image_epoch", "1")
    assert shortened(inference) is inference
    assert (second.language, second.marks, commands(second)) == ("text", {}, [])
    assert tables(PAGE) == [[["a", "b"], ["1", "2"]]]
    assert links(PAGE) == ["docs", "a.png"]
    assert anchors(PAGE) == {"the-first-page-code"}


@pytest.mark.parametrize("text", ["<!-- long: --x -->\ntext\n```\n```", "<!-- lang: x -->\n```\n```"])
def test_marks_without_a_block_or_meaning_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match=r"page\.md:"):
        blocks("page.md", text)


def test_a_mark_that_a_script_accepts_in_part_is_an_error() -> None:
    command = Command("page.md", 1, ("python", "test_stage2_gradients.py"), {"long": "--batches 1 --unknown 3"})
    with pytest.raises(ValueError, match="unknown"):
        shortened(command)


@pytest.mark.parametrize(
    "line",
    [
        "python train.py --no_such_flag",
        "python no_such_script.py",
        "python run.py no_such_command",
        "python -m benchmarks.bench_metrics --no_such_flag",
        "accelerate launch --num_processes 2 train.py --no_such_flag",
        "sbatch examples/train_two_nodes.sbatch --no_such_flag",
        "curl somewhere",
    ],
)
def test_wrong_commands_are_errors(line: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        check_arguments(line.split())


def test_the_check_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_commands.main(["--list"]) == 0
    output = capsys.readouterr().out
    assert all(f"{command.place}  [" in output for command in ALL_COMMANDS)
