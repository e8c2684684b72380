"""`report.html`: what it says, and how a browser shows it on a desk and on a phone, light and dark."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from engine.compare import compare_feedback_loops
from engine.comparison import Comparison, Row
from engine.config import BaseConfig, CrossAttentionRunConfig, RunConfig
from engine.evaluate import METRICS, ClassResult, Evaluation, ImageScore
from engine.feedback_config import FeedbackConfig
from engine.report import best_of_columns, judged_row, one_of_each_class, read_log, shown_rows
from engine.reproduce import command_line, training_command
from tests.scripts import train_small_runs

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "msedge")
RUN = "feedback_" + "of_a_long_name" * 6
VIEWS = [(width, scheme) for width in (1280, 360) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train_small_runs(tmp_path_factory.mktemp("world"))
    # A name that no line of a phone holds.
    (folder / "feedback").rename(folder / RUN)
    log = folder / RUN / "train.log"
    said = "2026-01-02 03:04:05 WARNING gradients are <vanishing> & low\n"
    log.write_text(log.read_text(encoding="utf-8") + 3 * said, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def report(world: Path) -> Path:
    """The report of the runs, with all that it can show."""
    asked = {"base_path": world / "base", "unadapted": True, "device": "cpu", "report": True}
    assert compare_feedback_loops(world / RUN, str(world / "test"), **asked) == 0
    return world / RUN / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = next(filter(None, map(shutil.which, BROWSERS)), str(own) if own.is_file() else None)
        if found is None:
            pytest.skip(f"no Chromium is installed (looked for {', '.join(BROWSERS)} and Playwright's own)")
        # Without the first, Chromium does not start for root; without the others it asks for the network by itself.
        switches = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        with playwright.chromium.launch(executable_path=found, args=switches) as browser:
            yield browser


@pytest.fixture(params=VIEWS, ids=[f"{width} px, {scheme}" for width, scheme in VIEWS])
def page(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Page]:
    """The report in a window; it must ask for nothing else, and log nothing."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    page.goto(report.as_uri())
    yield page
    page.close()
    assert complaints == []


def test_every_picture_is_there_and_legible(page: Page) -> None:
    # Pictures in closed details would have no size.
    assert page.evaluate("document.querySelectorAll('details img').length") == 0
    pictures = page.evaluate(
        "[...document.images].map(i => [i.alt, i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
    )
    assert len(pictures) > 20
    for words, complete, natural, shown in pictures:
        assert words
        assert complete, words
        assert natural >= 200, words
        assert shown > 100, words
    assert all(address.startswith("data:") for address in page.evaluate("[...document.images].map(i => i.currentSrc)"))


OVERFLOWING = """() => {
    document.querySelectorAll('details').forEach(d => { d.open = true; });
    const wide = [];
    for (const element of document.body.querySelectorAll('*')) {
        const box = element.getBoundingClientRect();
        const scrolled = element.closest('.scroll');
        const outside = box.right > window.innerWidth + 0.5 || box.left < 0;
        if (outside && !scrolled) wide.push(element.outerHTML.slice(0, 80));
        const hides = getComputedStyle(element).overflowX;
        if (element.scrollWidth > element.clientWidth + 1 && element.clientWidth && hides !== 'auto')
            wide.push('inside ' + element.outerHTML.slice(0, 80));
    }
    return wide;
}"""


def test_nothing_overflows(page: Page) -> None:
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_charts_follow_the_colour_scheme(page: Page, request: pytest.FixtureRequest) -> None:
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == dark
    assert page.evaluate(
        "dark => [...document.querySelectorAll('.chart')].every(c => (c.querySelector('img').currentSrc"
        " === c.querySelector('source').srcset) === dark)",
        dark,
    )


def test_the_table_is_the_comparison(page: Page, report: Path) -> None:
    cells = page.evaluate(
        "[...document.querySelectorAll('#metrics tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    with (report.parent / "comparison.csv").open(encoding="utf-8", newline="") as file:
        averages = [row for row in csv.DictReader(file) if row["class"] == "average"]
    assert cells == [[row["model"], *(f"{float(row[metric]):.2f}" for metric in METRICS)] for row in averages]
    marked = page.evaluate("[...document.querySelectorAll('td.best')].map(c => [c.cellIndex, c.innerText])")
    assert {column for column, _ in marked} == set(range(1, 1 + len(METRICS)))
    for column, value in marked:
        assert float(value) == max(float(row[column]) for row in cells)


def test_the_page_says_what_was_run(world: Path, report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "gradients are &lt;vanishing&gt; &amp; low (3 times)" in text
    assert "<vanishing>" not in text
    assert "Training from scratch, without a base" in text
    assert "Unfair comparison: Loop 2 and base differ" in text
    for heading in ("Best: anomalies", "Worst: anomalies", "Worst: normal images"):
        assert heading in text
    assert f"{RUN}/loop_2_final.pth</dd>" in text
    # Two classes, each with an image of every kind.
    assert text.count('class="example"') == 6
    commands = [line.strip() for line in re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)]
    assert [shlex.split(command)[1] for command in commands] == [
        "train.py", "train_cross_attention_feedback_v2.py", "compare_feedback_loops.py",
    ]  # fmt: skip
    parser = import_module("compare_feedback_loops").build_parser()
    again = parser.parse_args(shlex.split(commands[-1])[2:])
    assert (again.save_path, again.base_path, again.unadapted, again.report) == (
        world / RUN, world / "base", True, True,
    )  # fmt: skip


def test_a_report_without_history_and_of_nothing_readable(world: Path, tmp_path: Path) -> None:
    run = shutil.copytree(world / RUN, tmp_path / "run")
    for name in ("history.jsonl", "train.log"):
        (run / name).unlink()
    (run / "loop_2_final.pth").write_bytes(b"")
    assert compare_feedback_loops(run, str(world / "test"), device="cpu", report=True) == 1
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "Loop 2 is unreadable" in text
    assert "no curves" in text
    (run / "loop_1_final.pth").write_bytes(b"")
    assert compare_feedback_loops(run, str(world / "test"), device="cpu", report=True) == 1
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "None: no model could be read" in text
    assert 'class="best"' not in text


def evaluation(name: str, **values: float | None) -> Evaluation:
    full = {metric: values.get(metric, 50.0) for metric in METRICS}
    return Evaluation(name, "test", [ClassResult("cork", full, ())])


def made_up(**rows: dict[str, float | None]) -> Comparison:
    """A comparison of base and loops, by their metrics where they are not 50."""
    listed = [Row(name.replace("_", " "), int(name[-1]) if "Loop" in name else None) for name in rows]
    found = {row.name: evaluation(row.name, **values) for row, values in zip(listed, rows.values(), strict=True)}
    return Comparison("test", listed, found, [])


def test_the_best_of_a_column_is_by_printed_values() -> None:
    comparison = made_up(
        base={"pixel_auroc": 80.001, "image_ap": None, "aupro": 0.0},
        Loop_1={"pixel_auroc": 80.004, "image_ap": None, "aupro": None},
    )
    broken = Comparison("test", [*comparison.rows, Row("Loop 2", 2, problem="damaged")], comparison.evaluations, [])
    base, loop, unreadable = best_of_columns(broken)
    best = dict(zip(METRICS, zip(base, loop, strict=True), strict=True))
    assert best["pixel_auroc"] == (True, True)
    assert best["image_ap"] == (False, False)
    assert best["aupro"] == (True, False)
    assert not any(unreadable)


def test_examples_are_of_the_best_loop_beside_the_references() -> None:
    comparison = made_up(base={}, Loop_1={"pixel_auroc": 60.0}, Loop_2={"pixel_auroc": 55.0})
    assert [row.name for row in shown_rows(comparison)] == ["base", "Loop 1"]
    assert [row.name for row in shown_rows(made_up(unadapted={}, base={}))] == ["unadapted", "base"]
    assert judged_row(made_up(base={})).name == "base"
    assert shown_rows(Comparison("test", [], {}, [])) == []


def test_one_example_of_each_class() -> None:
    pool = [(name, ImageScore(f"{name}{score}", True, score)) for name in "ab" for score in (0.1, 0.9)]
    pool.append(("c", ImageScore("c", True, 0.5)))
    assert [image.path for image in one_of_each_class(pool, highest=True)] == ["a0.9", "b0.9", "c"]
    assert [image.path for image in one_of_each_class(pool, highest=False)] == ["a0.1", "b0.1", "c"]


def test_many_warnings_are_cut(tmp_path: Path) -> None:
    lines = [f"2026-01-02 03:04:{second:02d} WARNING   norm {second}" for second in range(30)]
    (tmp_path / "train.log").write_text("\n".join(["a line of a table", *lines]), encoding="utf-8")
    times, warnings = read_log(tmp_path)
    assert times == [("Log", "from 2026-01-02 03:04:00 to 2026-01-02 03:04:29")]
    assert len(warnings) == 21
    assert warnings[-1].startswith("and 10 more in ")
    assert read_log(tmp_path / "nothing") == ([], [])


CONFIGS: list[tuple[RunConfig, dict[str, Any]]] = [
    (BaseConfig(), {}),
    (BaseConfig(levels=(2, 4), relu=True, image_lr=1e-5, dataset="my data", save_path=Path("runs/a b")), {}),
    (CrossAttentionRunConfig(load_base_image_adapter=Path("x/y.pth"), seed=3), {"cross_attention": {"a": 1}}),
    (FeedbackConfig.from_preset("v2", optimizer="adam", text_epochs_per_loop=(3, 2, 1)), {"feedback": True}),
    (FeedbackConfig.from_preset("v2", optimizer="adam", weight_decay=0.01), {"feedback": True}),
    (FeedbackConfig.from_preset("v1", reset_optimizers=False, val_fraction=0.2), {"feedback": True}),
    (FeedbackConfig.from_preset("v1"), {"feedback": True, "cross_attention": {"a": 1}}),
]


@pytest.mark.parametrize(("config", "kind"), CONFIGS)
def test_the_command_asks_for_the_same_run(config: RunConfig, kind: dict[str, Any]) -> None:
    words = shlex.split(training_command({"arguments": config.to_dict(), **kind}))
    parser = import_module(Path(words[1]).stem).build_parser()
    assert type(config).from_namespace(parser.parse_args(words[2:])) == config


def test_a_default_is_not_repeated() -> None:
    config = replace(FeedbackConfig.from_preset("v2"), seed=4)
    command = training_command({"arguments": config.to_dict(), "feedback": True})
    assert command == "python train_cross_attention_feedback_v2.py --seed 4"
    values = {"a": None, "b": False, "c": True, "d": [1, 2], "e": Path("x y")}
    assert command_line("s.py", values) == "python s.py --c --d 1 2 --e 'x y'"
