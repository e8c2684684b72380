"""`report.html`: one page, in one file, of what was run, what came out, and what it looks like.

Every picture is inside the file, which loads nothing and runs no script.
"""

from __future__ import annotations

import io
import logging
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image

from dataset.images import resize_image, resize_mask
from engine.data.task import TaskData
from engine.detector.detector import Detector
from engine.evaluation.evaluate import METRICS, UNDEFINED, ImageScore, format_value
from engine.evaluation.image_heatmaps import Picture, look, read_picture
from engine.evaluation.pages import render_page
from engine.report.commands import given_arguments, training_command
from engine.report.comparison import (
    COLUMNS,
    DATA,
    PANELS,
    UNREADABLE,
    Comparison,
    Row,
    best_lines,
    best_loop,
    gains_of_last_loop,
    panel_of,
    table_cells,
    training,
)
from engine.runtime.run_folder import HISTORY_FILE, LOG_FILE, WARNINGS_FILE
from engine.training.verdicts import advice, summary_cells
from model.checkpoint import Checkpoint
from utils.errors import UserError
from utils.files import write_text
from utils.heatmaps import COLOURS, outlined, overlay
from utils.reading import read_json_lines
from utils.svg_charts import Chart, class_chart, data_uri, loop_chart, training_charts
from utils.text import readable_time

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("report.html")
CLASS_METRICS = ("pixel_auroc", "aupro", "image_auroc")
# Of each kind of example, and at most one of a class.
EXAMPLES = 3
# Sides of the pictures in the page, in pixels.
SIDE = 288
LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ([A-Z]+) (.*)")
MOST_WARNINGS = 20


@dataclass(frozen=True)
class ShownImage:
    """A dataset's image on the page: what it is, where its score stands, and it as each model sees it."""

    title: str
    rank: str
    pictures: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Run:
    """One training run on the page; rows of tables are lists of cells.

    watched: whether there is a history or a log, without which nothing is known of warnings.
    """

    name: str
    command: str
    facts: list[tuple[str, str]]
    arguments: list[tuple[str, str, bool]]
    charts: list[Chart]
    header: list[str]
    stages: list[list[str]]
    warnings: list[str]
    watched: bool


def write_report(
    comparison: Comparison, models: Mapping[str, Detector], data: TaskData, save_path: Path, path: Path, command: str
) -> None:
    """Write the page of a comparison.

    models: by a row's name, those whose heatmaps the examples show, the judged loop last (`shown_rows`); none: no
    examples. command: what makes the comparison again.
    """
    header, rows = table_cells(comparison)
    page = render_page(
        TEMPLATE,
        title=f"Feedback loops of {save_path.as_posix()}",
        dataset=comparison.dataset,
        compared=comparison.references is not None,
        scale=colour_scale(),
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        lines=best_lines(comparison),
        gained=f"Gain of {comparison.loops[-1].name} on" if comparison.loops else "",
        gains=gains_of_last_loop(comparison),
        notes=comparison.notes,
        header=header,
        rows=[(row, marks) for row, marks in zip(rows, best_of_columns(comparison), strict=True)],
        loop_charts=loop_charts(comparison),
        class_charts=class_charts(comparison),
        class_header=["Class", "Model", *COLUMNS.values()],
        class_rows=class_rows(comparison),
        tested=tested_facts(comparison, data),
        groups=example_groups(comparison, models, data) if models else [],
        runs=runs_of(comparison),
        silent=[row.name for row in comparison.rows if row.checkpoint and not row.config],
        command=command,
    )
    write_text(path, page)
    logger.info("Report written to %s", path)


def judged_row(comparison: Comparison) -> Row | None:
    """The loop whose examples are shown, the best by pixel AUROC; without loops the last of the other rows."""
    found = best_loop(comparison, "pixel_auroc")
    others = comparison.loops or comparison.others
    return found or (others[-1] if others else None)


def shown_rows(comparison: Comparison) -> list[Row]:
    """The rows that the examples and the charts of classes show: those beside the loops, and the judged one last."""
    judged = judged_row(comparison)
    return [row for row in comparison.others if row is not judged] + ([judged] if judged else [])


def best_of_columns(comparison: Comparison) -> list[list[bool]]:
    """For each row of the table and each metric, whether no row is printed with a higher value."""
    # As they are printed: who differs in the third decimal alone is as good.
    printed = [cells[1:] for cells in table_cells(comparison)[1]]
    columns = zip(*printed, strict=True)
    best = [max((float(cell) for cell in column if is_number(cell)), default=None) for column in columns]
    return [[is_number(cell) and float(cell) == top for cell, top in zip(row, best, strict=True)] for row in printed]


def is_number(cell: str) -> bool:
    """Whether a cell of the table holds a figure."""
    return cell not in (UNDEFINED, UNREADABLE)


def loop_charts(comparison: Comparison) -> list[Chart]:
    """Every metric over the loops."""
    if not comparison.loops:
        return []
    return [loop_chart(COLUMNS[metric], panel_of(comparison, metric)) for metric in PANELS]


def class_charts(comparison: Comparison) -> list[Chart]:
    """Some metrics of every class, a marker for each of the shown rows."""
    rows = shown_rows(comparison)
    if not rows:
        return []
    charts = (
        class_chart(
            COLUMNS[metric],
            {r.name: {c.class_name: c.values[metric] for c in comparison.evaluations[r.name].classes} for r in rows},
        )
        for metric in CLASS_METRICS
    )
    return [chart for chart in charts if chart is not None]


def class_rows(comparison: Comparison) -> list[list[str]]:
    """All metrics of every class and row, class by class."""
    known = [comparison.evaluations[row.name] for row in comparison.rows if row.name in comparison.evaluations]
    by_class = zip(*(evaluation.classes for evaluation in known), strict=True)
    return [
        [result.class_name, evaluation.model, *(format_value(result.values[metric]) for metric in METRICS)]
        for results in by_class
        for evaluation, result in zip(known, results, strict=True)
    ]


def colour_scale(steps: int = 9) -> list[str]:
    """The heatmaps' colours from 0 to 1, as the page's style writes them."""
    colours = matplotlib.colormaps[COLOURS](np.linspace(0, 1, steps))
    return [matplotlib.colors.to_hex(colour) for colour in colours]


def tested_facts(comparison: Comparison, data: TaskData) -> list[tuple[str, str]]:
    """What was tested on, with what."""
    anomalous = sum(record.label for record in data.records)
    facts = [
        ("Dataset", f"{comparison.dataset}, {len(data.records)} images, {anomalous} of them anomalous"),
        ("Classes", ", ".join(data.classes)),
        ("Image list", data.digest[:12]),
        ("Det score", comparison.det_score),
    ]
    if comparison.references is not None:
        facts.append(("Compared with", str(comparison.references)))
    known = [row.config for row in comparison.rows if row.config]
    if known:
        model = known[-1]["model"]
        facts.append(
            ("CLIP", f"{model['model_name']}, {model['img_size']} px, {model['activation']}, {model['weights_digest']}")
        )
    return [*facts, ("Versions", f"Python {platform.python_version()}, torch {torch.__version__}")]


def example_groups(
    comparison: Comparison, models: Mapping[str, Detector], data: TaskData
) -> list[tuple[str, str, list[ShownImage]]]:
    """Title, explanation and images of each kind of example, chosen by the scores of the judged row."""
    name = judged_row(comparison).name
    scores = [(c.class_name, image) for c in comparison.evaluations[name].classes for image in c.scores]
    anomalous = [(class_name, image) for class_name, image in scores if image.anomalous]
    normal = [(class_name, image) for class_name, image in scores if not image.anomalous]
    kinds = (
        ("Best: anomalies it is surest of", anomalous, True),
        ("Worst: anomalies it passes over", anomalous, False),
        ("Worst: normal images it takes for anomalous", normal, True),
    )
    groups = []
    for title, pool, highest in kinds:
        chosen = one_of_each_class(pool, highest)[:EXAMPLES]
        order = f"the {'highest' if highest else 'lowest'} scores of {name} within each class, one image of a class"
        if chosen:
            groups.append((title, order, [make_example(image, models, data) for image in chosen]))
    return groups


def one_of_each_class(pool: Sequence[tuple[str, ImageScore]], highest: bool) -> list[ImageScore]:
    """The image of each class with the highest or lowest score, in that order."""
    found: dict[str, ImageScore] = {}
    for class_name, image in sorted(pool, key=lambda item: item[1].score, reverse=highest):
        found.setdefault(class_name, image)
    return list(found.values())


def make_example(image: ImageScore, models: Mapping[str, Detector], data: TaskData) -> ShownImage:
    """An image with its ground truth and the heatmap of every model, as pictures of one size."""
    record = next(record for record in data.records if record.image_path == image.path)
    picture = read_picture(data, record)
    shown = fitted(picture)
    mask = Image.fromarray(shown.mask)
    pictures = [("Original", picture_uri(shown.image), ""), ("Ground truth", picture_uri(mask), "")]
    for name, model in models.items():
        heatmap = look(model, picture, name)
        coloured = outlined(overlay(shown.image, heatmap.anomaly_map), shown.mask)
        pictures.append((name, picture_uri(coloured), heatmap.caption))
    return ShownImage(picture.title, f"{image.score:.2f} among its class, {image.path}", pictures)


def fitted(picture: Picture) -> Picture:
    """The picture at the size that the page shows, its longer side `SIDE` pixels."""
    scale = SIDE / max(picture.image.size)
    size = tuple(max(1, round(scale * side)) for side in picture.image.size)
    mask = resize_mask(Image.fromarray(picture.mask), size)
    return replace(picture, image=resize_image(picture.image, size), mask=np.array(mask))


def picture_uri(image: Image.Image) -> str:
    """A picture inside the page: masks as they are, photographs compressed."""
    content = io.BytesIO()
    if image.mode == "1":
        image.save(content, format="PNG")
        return data_uri(content.getvalue(), "image/png")
    image.convert("RGB").save(content, format="JPEG", quality=88)
    return data_uri(content.getvalue(), "image/jpeg")


def runs_of(comparison: Comparison) -> list[Run]:
    """The training runs that the rows come from: those beside the loops, and the feedback run by its last loop."""
    loops = [row for row in comparison.rows if row.loop is not None and row.checkpoint]
    others = [row for row in comparison.rows if row.loop is None and row.checkpoint]
    named = [(row.name, row) for row in others] + [("feedback", row) for row in loops[-1:]]
    return [describe_run(name, row) for name, row in named if row.config]


def describe_run(name: str, row: Row) -> Run:
    """What a run was asked for, how it went until the row's checkpoint, and what it said."""
    config, folder = row.config, row.checkpoint.path.parent
    whole = read_history(folder)
    history = until_checkpoint(whole, row.checkpoint)
    feedback = bool(config.get("feedback"))
    header, stages = summary_cells(history, feedback) if history else ([], [])
    facts = run_facts(row, history)
    if len(history) < len(whole):
        facts.append(
            ("Went on", f"to {len(whole)} epochs of both stages; shown are the {len(history)} until this file")
        )
    log = read_log(folder)
    if log.began:
        facts.append(("Log", f"from {log.began} to {log.ended}"))
    given = given_arguments(config)
    arguments = [(argument, words(value), argument in given) for argument, value in config["arguments"].items()]
    advised = advice(history, feedback)
    known = {sentence.lower() for sentence in advised}
    return Run(
        name,
        training_command(config),
        facts,
        arguments,
        training_charts(history) if history else [],
        header,
        stages,
        # The verdicts first: single epochs' warnings may be many.
        [*advised, *gathered([said for said in log.warnings if said.lower() not in known])],
        bool(history or log.began or log.warnings),
    )


def until_checkpoint(history: Sequence[Mapping[str, Any]], checkpoint: Checkpoint) -> list[Mapping[str, Any]]:
    """The epochs of a run that its checkpoint has seen: a run may have gone on since."""
    if checkpoint.loop is not None:
        return [row for row in history if row["loop"] <= checkpoint.loop]
    if checkpoint.epoch is None:
        return list(history)
    return [row for row in history if row["stage"] == "text" or row["epoch"] <= checkpoint.epoch]


def run_facts(row: Row, history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Data, seed, length, time and versions of a run."""
    config = row.config
    known = row.checkpoint.steps or {}
    counts = ", ".join(f"{known.get(side, 'unknown')} {side}" for side in ("text", "image"))
    facts = [
        ("Files", row.checkpoint.path.as_posix()),
        ("Trained on", str(training(row)[DATA])),
        ("Seed", str(config["seed"])),
        ("Optimizer steps", counts),
    ]
    if config.get("processes", 1) > 1:
        facts.append(("Processes", str(config["processes"])))
    if config.get("base") and any(config["base"].values()):
        facts.append(("Started from", "; ".join(filter(None, config["base"].values()))))
    if history:
        seconds = sum(epoch["seconds"] for epoch in history)
        images = sum(epoch["images"] for epoch in history)
        facts.append(
            (
                "Training time",
                f"{readable_time(seconds)} in {len(history)} epochs, {images / seconds:.1f} images per second",
            )
        )
    return [*facts, ("Versions", ", ".join(f"{name} {number}" for name, number in config.get("versions", {}).items()))]


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `history.jsonl`; none where it is not there or cannot be read, which is logged."""
    return read_rows(folder / HISTORY_FILE, "curves")


def read_rows(file: Path, what: str) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; none where it is not there or cannot be read, which is logged.

    what: the report lacks without them.
    """
    if not file.exists():
        return []
    try:
        return [row for _, row in read_json_lines(file) if isinstance(row, dict)]
    except UserError as error:
        logger.warning("%s: the report has no %s of that run", error, what)
        return []


class Log(NamedTuple):
    """When a run's log began and ended (empty: there is none), and the run's warnings in order."""

    began: str = ""
    ended: str = ""
    warnings: tuple[str, ...] = ()


def read_log(folder: Path) -> Log:
    """When a run's log begins and ends, and the run's warnings, which earlier versions kept in `train.log` alone."""
    rows = [row for row in read_rows(folder / WARNINGS_FILE, "warnings") if {"time", "message"} <= row.keys()]
    kept = tuple(str(row["message"]) for row in rows)
    try:
        lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return Log(warnings=kept)
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): the report may lack warnings of that run", folder / LOG_FILE, error)
        return Log(warnings=kept)
    found = [match.groups() for line in lines if (match := LOG_LINE.fullmatch(line))]
    if not found:
        return Log(warnings=kept)
    older = tuple(
        message.strip()
        for time, level, message in found
        if level in ("WARNING", "ERROR") and not (rows and time >= str(rows[0]["time"]))
    )
    return Log(found[0][0], found[-1][0], older + kept)


def gathered(warnings: Sequence[str]) -> list[str]:
    """Warnings that differ in figures alone as one, with their number; `MOST_WARNINGS` at the most."""
    alike: dict[str, list[str]] = {}
    for warning in warnings:
        alike.setdefault(re.sub(r"[0-9][0-9.e+-]*", "0", warning), []).append(warning)
    said = []
    for kind in alike.values():
        differ = ", figures differ" if len(set(kind)) > 1 else ""
        said.append(kind[0] if len(kind) == 1 else f"{kind[0]} ({len(kind)} times{differ})")
    return said if len(said) <= MOST_WARNINGS else [*said[:MOST_WARNINGS], f"and {len(said) - MOST_WARNINGS} more"]


def words(value: Any) -> str:
    """An argument's value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
