"""The documentation against the repository: links, commands, flags and test names; nothing is run or downloaded.

What `tests.documented` parses is checked here; `python -m tests.check_commands` runs the commands as well.
"""

from __future__ import annotations

import ast
import csv
import json
import re
import statistics
from collections import defaultdict
from dataclasses import fields
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from engine.config.common import decided_by, make_parser
from engine.config.feedback import FeedbackConfig, plan_loops
from engine.config.training import BaseConfig, CrossAttentionRunConfig
from engine.evaluation.evaluate import METRICS
from engine.study.plan import words_of
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
    prose,
    read_page,
    reason_not_run,
    references,
    repository_files,
    shortened,
    tables,
)

PAGES = pages()
BLOCKS = [block for page in PAGES for block in blocks(page, read_page(page))]
ALL_COMMANDS = [command for block in BLOCKS for command in commands(block)]
# Addresses elsewhere are not fetched.
ELSEWHERE = ("http://", "https://", "mailto:")
METHOD = "docs/method.md"
# Flags of other programs, and of run.py, that pages speak of.
FOREIGN_FLAGS = {"--cpu", "--logdir", "--multi_gpu", "--num_processes", "--torch-index"}
# Files that runs write, which pages name like files of the repository.
WRITTEN = {"comparison.md", "study.md"}


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
    runnable = [name for name in modules if name != "benchmarks.__init__"]
    return frozenset().union(
        *map(
            flags_of,
            [*scripts, *runnable, "tests.check_commands", "dataset.convert", "engine.cli.share", "examples.run_onnx"],
        )
    )


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
    text = read_page(page)
    # What the worked changes of docs/extending.md would add.
    added = {f"--{name}" for name in re.findall(r"^\+    (\w+): ", text, re.MULTILINE)}
    flags = known_flags() | FOREIGN_FLAGS | added
    files = known_files() | set(re.findall(r"^--- (.+)", text, re.MULTILINE))
    names = {path.rsplit("/", 1)[-1] for path in files} | WRITTEN
    missing = []
    for span in code_spans(text):
        for flag in re.findall(r"(?<![\w-])--\w[\w-]*\*?", span):
            if not any(known == flag or (flag.endswith("*") and known.startswith(flag[:-1])) for known in flags):
                missing.append(flag)
        for path in re.findall(r"(?<![\w./*{}-])[\w./-]+\.(?:py|md|toml|yml|ipynb)(?![\w/])", span):
            if (path not in files and f"docs/{path}" not in files) if "/" in path else path not in names:
                missing.append(path)
    assert not missing


def test_the_table_of_defaults_is_that_of_the_code() -> None:
    presets = FeedbackConfig.__dataclass_fields__["preset"].metadata["choices"]
    columns = {
        "base": BaseConfig(),
        "cross-attention": CrossAttentionRunConfig(),
        **{name: FeedbackConfig.of(preset=name) for name in presets},
    }
    header, *rows = next(table for table in tables(read_page(METHOD)) if table[0][1:] == list(columns))
    shown = {row[0].strip("`-"): dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    assert shown == {name: {title: default_of(config, name) for title, config in columns.items()} for name in shown}
    assert set().union(*(decided_by(FeedbackConfig, name) for name in presets)) <= set(shown)


def test_the_flags_of_the_deviations_make_the_published_preset() -> None:
    """Each is one deviation, all of them are the preset; a study measures those that the toy world can show."""
    header, *rows = next(table for table in tables(read_page(METHOD)) if table[0][0] == "what")
    column, cost = header.index("flag"), header.index("gain on the toy world")
    flags = [words for row in rows for words in row[column].strip("`").split()]
    given = vars(make_parser(BaseConfig, None).parse_args(flags))
    assert {**decided_by(BaseConfig, "published")} == given
    measured = [row[column].strip("`") for row in rows if not row[cost].startswith("n/a")]
    study = read_study(ROOT / "studies" / "deviations.toml")
    arms = {" ".join(words_of(arm.arguments)) for arm in study.arms.values()}
    assert {*measured, "--preset published", ""} <= {words.replace("1e-05", "1e-5") for words in arms}


def default_of(config: object, name: str) -> str:
    return in_words(getattr(config, name)) if name in {item.name for item in fields(config)} else "-"


def in_words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@cache
def results() -> dict[str, dict[str, dict[str, float]]]:
    """The figures of docs/results/*.csv by arm, seed and metric."""
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for file in sorted((ROOT / "docs" / "results").glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                # What the literature reports has neither arms nor seeds; studies' figures have tests of their own.
                if "arm" not in row or "train" in row or "verdict" in row:
                    continue
                arm, seed = row.pop("arm"), row.pop("seed")
                assert seed not in found[arm], f"{file}: {arm}, seed {seed} stands twice"
                found[arm][seed] = {metric: float(value) for metric, value in row.items() if value}
    return found


def figures_of(arm: str, metric: str, against: str | None) -> list[float]:
    """A metric of an arm for each seed, or its gain over another arm's."""
    mine, other = results()[arm], results().get(against, {})
    return [values[metric] - (other[seed][metric] if against else 0) for seed, values in mine.items()]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_figures_follow_from_the_seeds(page: str) -> None:
    """Means, standard deviations and gains; those shown were taken before the seeds' figures were rounded."""
    titles = {title: metric for metric, title in METRICS.items()}
    checked = 0
    for header, *rows in tables(read_page(page)):
        for arm, *cells in rows:
            for title, cell in zip(header[1:], cells, strict=True):
                # "Arm" heads the tables that studies have written, with tests of their own (`benchmarks.doc_tables`).
                if title in titles and header[0] != "Arm":
                    gain = "base continued" if cell[0] in "+-" else None
                    values = figures_of(arm, titles[title], gain)
                    mean, _, spread = cell.partition(" ± ")
                    assert float(mean) == pytest.approx(statistics.mean(values), abs=0.015), (arm, title)
                    assert bool(spread) == (len(values) > 1), (arm, title)
                    if spread:
                        assert float(spread) == pytest.approx(statistics.stdev(values), abs=0.015), (arm, title)
                    checked += 1
    assert checked >= 12


def test_times_per_gpu_follow_from_the_formula() -> None:
    page = read_page("docs/benchmarks.md")
    header, *rows = next(table for table in tables(page) if table[0][0] == "GPU")
    for what, petaflop in work_on_visa().items():
        assert f"{petaflop:.1f}" in page
        for row in rows:
            shown = dict(zip(header, row, strict=True))
            number, unit = shown[what].split()
            second = {"s": 1, "min": 60, "h": 3600}[unit]
            expected = petaflop * 1000 / (0.4 * float(shown["peak, TFLOP/s"]))
            assert float(number) * second == pytest.approx(expected, rel=0.03, abs=0.6 * second), row


def work_on_visa() -> dict[str, float]:
    """PFLOP of the defaults on 32 shots of 12 classes, and of testing on MVTec, from the page's TFLOP per image."""
    images, base, cross = 32 * 12, BaseConfig(), CrossAttentionRunConfig()
    assert not cross.text_cross_attn_weight, "words that see images cost more"

    def of_loops(config: FeedbackConfig, of_first: tuple[float, float], of_later: tuple[float, float]) -> float:
        costs = [of_first, *[of_later] * (config.num_feedback_loops - 1)]
        plan = zip(plan_loops(config), costs, strict=True)
        return sum(loop.text_epochs * text + loop.image_epochs * image for loop, (text, image) in plan)

    work = {
        "base": base.text_epoch * 1.2 + base.image_epoch * 2.2,
        "cross-attention": cross.text_epoch * 1.2 + cross.image_epoch * 2.2,
        "feedback V3": of_loops(FeedbackConfig.of(preset="v3"), (1.2, 2.2), (1.1, 2.2)),
        "feedback V2": of_loops(FeedbackConfig.of(preset="v2"), (1.3, 3.3), (1.1, 2.3)),
    }
    return {name: images * found / 1000 for name, found in work.items()} | {"testing on MVTec": 1725 * 1.0 / 1000}


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
    named = re.findall(r"(tests/\w+\.py)::(\w+)", read_page(METHOD))
    assert len(named) >= 11
    for file, name in named:
        assert name in functions_of(file), f"{file}::{name}"


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_sections_that_the_code_refers_to_exist() -> None:
    missing = []
    for file in repository_files():
        if file.suffix in (".py", ".txt", ".toml", ".ipynb", ".html", ".yml", ".md"):
            for page, section in references((ROOT / file).read_text(encoding="utf-8")):
                if Path(page) not in repository_files() or (section and section not in headings(read_page(page))):
                    missing.append(f'{file}: {page}, "{section}"')
    assert not missing


def test_the_readme_is_short() -> None:
    assert len(read_page("README.md").split()) <= 700


def test_pictures_are_small() -> None:
    large = [path.name for path in (ROOT / "docs" / "images").iterdir() if path.stat().st_size > 300_000]
    assert not large


@pytest.mark.parametrize(
    "name",
    [
        "quick start of a fair comparison",
        "cross-attention from a base",
        "feedback V2 guide",
        "gradient dilution",
        "testing guide",
        "V1 against V2",
        "what det_proj does",
        "expected times per GPU",
    ],
)
def test_the_index_leads_to_what_users_of_earlier_code_look_for(name: str) -> None:
    rows = [row for table in tables(read_page(INDEX)) for row in table if name in row[0].replace("`", "")]
    assert len(rows) == 1
    assert links(rows[0][1])


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
        6,
        "",
        {"long": "--text_epoch 1 --image_epoch 1", "status": "1"},
    )
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
    marks = {"long": "--batches 1 --unknown 3"}
    words = ("python", "test_stage2_gradients.py")
    with pytest.raises(ValueError, match="unknown"):
        shortened(Command("page.md", 1, words, marks))
    launched = Command("page.md", 1, ("accelerate", "launch", "train.py"), {"long": "--text_epoch 1"})
    assert shortened(launched).words == (*launched.words, "--text_epoch", "1")


def test_references_of_code() -> None:
    text = """Losses (docs/method.md, "Losses"), and (docs/training.md).
    # see docs/method.md,
    # "Known defects" """
    method = {("docs/method.md", section) for section in ("Losses", "Known defects")}
    assert references(text) == {*method, ("docs/training.md", "")}
    assert headings(PAGE) == {"The first page, code & [link](docs)", "Same"}


def test_tables_are_read() -> None:
    assert tables("| a | b |\n|---|--:|\n| 1 | 2 |\n\n| c |\n|---|\n") == [[["a", "b"], ["1", "2"]], [["c"]]]


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
        "python -m benchmarks.bench_metrics --no_such_flag",
        "python -m engine.cli.demo --anything",
        "python train_cross_attention_feedback.py --no_such_flag",
        "accelerate launch --num_processes 2 train.py --no_such_flag",
        "accelerate launch --no_such_flag train.py",
        "sbatch examples/no_such_job.sbatch",
        "sbatch examples/train_two_nodes.sbatch --no_such_flag",
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
