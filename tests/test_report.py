"""`report.html`: its content and its layout on desktops and phones, light and dark."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from playwright.sync_api import Browser, Page

from engine.config.training import BaseConfig, CrossAttentionRunConfig, FeedbackConfig, RunConfig
from engine.evaluation.results import METRICS as ALL_METRICS
from engine.evaluation.results import PUBLISHED, ClassResult, Evaluation, ImageScore
from engine.report.commands import command_line, training_command
from engine.report.comparison import Comparison, Row
from engine.report.page import best_of_columns, example_rows, extreme_images
from engine.report.runs import group_warnings, read_rows, until_checkpoint
from model.checkpoint import Checkpoint
from tests.browser import browser  # noqa: F401
from tests.evaluating import compare_feedback_loops
from tests.scripts import read_csv, train_small_runs
from utils import svg_charts
from utils.svg_charts import class_chart, loop_chart, training_charts

# Folders in the tests are no datasets of the catalog, so that published scores are not reported.
METRICS = [metric for metric in ALL_METRICS if not metric.startswith(PUBLISHED)]

RUN = "feedback_" + "of_a_long_name" * 6
VIEWS = [(width, scheme) for width in (1280, 360) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train_small_runs(tmp_path_factory.mktemp("world"))
    # A name that no line of a phone holds.
    (folder / "feedback").rename(folder / RUN)
    row = {"time": "2026-01-02 03:04:05", "level": "WARNING", "message": "gradients are <vanishing> & low"}
    with (folder / RUN / "warnings.jsonl").open("a", encoding="utf-8") as file:
        file.write(3 * f"{json.dumps(row)}\n")
    return folder


@pytest.fixture(scope="module")
def report(world: Path) -> Path:
    """The report of the runs with all sections."""
    asked = {"base_path": world / "base", "unadapted": True, "device": "cpu", "report": True}
    assert compare_feedback_loops(world / RUN, str(world / "test"), **asked) == 0
    return world / RUN / "report.html"


@pytest.fixture(params=VIEWS, ids=[f"{width} px, {scheme}" for width, scheme in VIEWS])
def page(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Page]:  # noqa: F811
    """The report in a window; it must request and log nothing."""
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


def test_every_image_exists_and_is_legible(page: Page) -> None:
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


def test_no_element_overflows(page: Page) -> None:
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


def test_the_table_equals_the_comparison(page: Page, report: Path) -> None:
    cells = page.evaluate(
        "[...document.querySelectorAll('#metrics tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    averages = [row for row in read_csv(report.parent / "comparison.csv") if row["class"] == "average"]
    assert [row[0] for row in cells] == [row["model"] for row in averages]
    for printed, row in zip(cells, averages, strict=True):
        # With two decimals of six.
        expected = [float(row[metric]) for metric in METRICS]
        assert [float(value) for value in printed[1:]] == pytest.approx(expected, rel=0, abs=0.005001)
    marked = page.evaluate("[...document.querySelectorAll('td.best')].map(c => [c.cellIndex, c.innerText])")
    assert {column for column, _ in marked} == set(range(1, 1 + len(METRICS)))
    for column, value in marked:
        assert float(value) == max(float(row[column]) for row in cells)


def test_the_report_lists_the_run_and_its_commands(world: Path, report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "gradients are &lt;vanishing&gt; &amp; low (3 times)" in text
    assert "<vanishing>" not in text
    assert "Training from scratch, without a base" in text
    assert "Unfair comparison: different optimizer steps" in text
    for heading in ("Best: anomalous images", "Worst: anomalous images", "Worst: normal images"):
        assert heading in text
    assert f"{RUN}/loop_2_final.pth</dd>" in text
    assert "<dd>cork, reed</dd>" in text
    # Two classes, each with an image of every kind.
    assert text.count('class="example"') == 6
    commands = [line.strip() for line in re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)]
    assert [shlex.split(command)[1] for command in commands] == [
        "train.py",
        "train_cross_attention_feedback_v2.py",
        "compare_feedback_loops.py",
    ]
    parser = import_module("compare_feedback_loops").script.parser()
    again = parser.parse_args(shlex.split(commands[-1])[2:])
    assert (again.save_path, again.base_path, again.unadapted, again.report) == (
        world / RUN,
        world / "base",
        True,
        True,
    )


def test_reports_without_history_or_readable_files(world: Path, tmp_path: Path) -> None:
    run = shutil.copytree(world / RUN, tmp_path / "run")
    for name in ("history.jsonl", "warnings.jsonl"):
        (run / name).unlink(missing_ok=True)
    (run / "loop_2_final.pth").write_bytes(b"")
    assert compare_feedback_loops(run, str(world / "test"), device="cpu", report=True) == 1
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "Loop 2 is unreadable" in text
    assert "No curves" in text
    (run / "loop_1_final.pth").write_bytes(b"")
    assert compare_feedback_loops(run, str(world / "test"), device="cpu", report=True) == 1
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "None: no model could be read" in text
    assert 'class="best"' not in text


def evaluation(name: str, **values: float | None) -> Evaluation:
    full = dict.fromkeys(METRICS, 50.0) | values
    return Evaluation(name, "test", [ClassResult("cork", dict.fromkeys(ALL_METRICS) | full, ())])


def made_up(**rows: dict[str, float | None]) -> Comparison:
    """A comparison of base and loops, by their metrics where they are not 50."""
    listed = [Row(name.replace("_", " "), int(name[-1]) if "Loop" in name else None) for name in rows]
    found = {row.name: evaluation(row.name, **values) for row, values in zip(listed, rows.values(), strict=True)}
    return Comparison("test", listed, found, [])


def test_the_best_value_of_a_column_is_chosen_by_printed_values() -> None:
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


def test_examples_are_of_the_last_loop_or_the_one_that_training_images_selected() -> None:
    comparison = made_up(base={}, Loop_1={"pixel_auroc": 60.0}, Loop_2={"pixel_auroc": 55.0})
    assert [row.name for row in example_rows(comparison)] == ["base", "Loop 2"]
    assert [row.name for row in example_rows(replace(comparison, selected=1))] == ["base", "Loop 1"]
    assert [row.name for row in example_rows(made_up(unadapted={}, base={}))] == ["unadapted", "base"]
    assert example_rows(Comparison("test", [], {}, [])) == []


def test_one_example_of_each_class() -> None:
    scores = {"a": (0.1, 0.9), "b": (0.2, 0.8), "c": (0.5,)}
    images = {name: tuple(ImageScore(f"{name}{score}", True, score) for score in scores[name]) for name in scores}
    pool = Evaluation("m", "test", [ClassResult(name, {}, images[name]) for name in images])
    assert [image.path for image in extreme_images(pool, True, highest=True)] == ["a0.9", "b0.8", "c0.5"]
    assert [image.path for image in extreme_images(pool, True, highest=False)] == ["a0.1", "b0.2", "c0.5"]
    assert extreme_images(pool, False, highest=True) == []


def test_damaged_files_of_a_run_are_omitted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "history.jsonl"
    assert read_rows(file) == []
    file.write_text('{"loop": 1}\n', encoding="utf-8")
    assert read_rows(file) == [{"loop": 1}]
    for content in (b"\xff\xfe{", b"[1]\n"):
        file.write_bytes(content)
        assert read_rows(file) == [] and "does not include this file" in caplog.text


def test_warnings_that_differ_in_numbers_are_grouped() -> None:
    low = [f"gradients are low: norm {0.001 * n:.3g}, below 0.01" for n in range(1, 9)]
    lines = group_warnings([*low, "collapsed", "again", "again"])
    assert lines == [f"{low[0]} (8 times, with other numbers)", "collapsed", "again (2 times)"]
    many = group_warnings(["a" * length for length in range(1, 31)])
    assert len(many) == 21
    assert many[-1] == "and 10 more"


def test_a_resumed_run_is_shown_up_to_its_checkpoint() -> None:
    def rows(*stages: tuple[int, str, int]) -> list[dict[str, Any]]:
        return [{"loop": loop, "stage": stage, "epoch": epoch} for loop, stage, epoch in stages]

    base = rows((1, "text", 1), (1, "text", 2), (1, "text", 3), (1, "image", 1), (1, "image", 2))
    assert until_checkpoint(base, Checkpoint(Path("x"), {}, epoch=1)) == base[:4]
    assert until_checkpoint(base, Checkpoint(Path("x"), {}, epoch=None)) == base
    loops = rows((1, "text", 1), (1, "image", 1), (2, "text", 1), (2, "image", 1))
    assert until_checkpoint(loops, Checkpoint(Path("x"), {}, epoch=7, loop=1)) == loops[:2]


BASE, CROSS, FEEDBACK = "train.py", "train_cross_attention.py", "train_cross_attention_feedback_v2.py"
CONFIGS: list[tuple[RunConfig, str]] = [
    (BaseConfig(), BASE),
    (BaseConfig(levels=(2, 4), relu=True, image_lr=1e-5, dataset="my data", save_path=Path("runs/a b")), BASE),
    (CrossAttentionRunConfig(load_base_image_adapter=Path("x/y.pth"), seed=3), CROSS),
    (FeedbackConfig.of(preset="v2", optimizer="adam", text_epochs_per_loop=(3, 2, 1)), FEEDBACK),
    (FeedbackConfig.of(preset="v1", reset_optimizers=False, val_fraction=0.2), FEEDBACK),
    (FeedbackConfig.of(preset="v1"), FEEDBACK),
]


@pytest.mark.parametrize(("config", "script"), CONFIGS)
def test_the_shown_command_repeats_the_run(config: RunConfig, script: str) -> None:
    words = shlex.split(training_command({"arguments": config.to_dict(), "script": script}))
    parser = import_module(Path(words[1]).stem).script.parser()
    assert type(config).of(**vars(parser.parse_args(words[2:]))) == config


def test_commands_contain_the_launcher_and_no_defaults() -> None:
    config = {"arguments": BaseConfig().to_dict(), "script": BASE, "processes": 2}
    assert training_command(config) == "accelerate launch --num_processes 2 train.py"
    other = replace(FeedbackConfig.of(preset="v2"), seed=4)
    command = training_command({"arguments": other.to_dict(), "script": FEEDBACK})
    assert command == "python train_cross_attention_feedback_v2.py --seed 4"
    values = {"a": None, "b": False, "c": True, "d": [1, 2], "e": Path("x y")}
    assert command_line("s.py", values) == "python s.py --c --d 1 2 --e 'x y'"


def test_legends_and_labels_of_charts_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []

    def draw_only(draw: Callable[[Figure], None], height: float) -> str:
        drawn.append(Figure(figsize=(svg_charts.WIDTH, height), layout="constrained"))
        draw(drawn[-1])
        return ""

    monkeypatch.setattr(svg_charts, "_svg", draw_only)
    sides = {f"grad_norm/{side}_cross_attn": 0.1 for side in ("text", "image")}
    row = {"loss": 1.0, "grad_norm/total": 1.0, "abnormal_inside": 0.5, "abnormal_outside": 0.1, "epoch": 1, **sides}
    training_charts([{**row, "loop": loop, "stage": stage} for loop in (1, 2) for stage in ("text", "image")])
    models = ("unadapted", "base", "cross-attention", "Loop 10")
    class_chart("Pixel AUC", {model: {"corrugated_sheet_of_metal": 50.0} for model in models})
    loop_chart("Pixel AUC", ({1: 80.0, 10: 81.0}, dict.fromkeys(models[:3], 80.0)))
    assert len(drawn) == 5
    for figure in drawn:
        FigureCanvasAgg(figure).draw()
        legends = [legend.get_window_extent() for legend in figure.legends]
        for box in (figure.axes[0].get_tightbbox(), *legends):
            assert box.x0 >= 0 and box.x1 <= figure.bbox.width
            assert box.y0 >= 0 and box.y1 <= figure.bbox.height
