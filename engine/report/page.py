"""`report.html`: one self-contained page with the results, example heatmaps and training runs of a comparison.

It contains every picture, loads nothing and runs no script.
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from dataset.images import resize_mask
from engine.data.task import TaskData
from engine.detector.detector import Detector
from engine.evaluation.image_heatmaps import predict_heatmap, read_dataset_image
from engine.evaluation.pages import write_page
from engine.evaluation.results import UNDEFINED, Evaluation, ImageScore, format_value
from engine.report.comparison import UNREADABLE, Comparison, Row, best_lines, gains_of_last_loop, panel_of, table_cells
from engine.report.runs import describe_runs
from model.config import limits_of
from utils.heatmaps import outlined, overlay
from utils.svg_charts import Chart, class_chart, loop_chart, picture_uri

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("report.html")
CLASS_METRICS = ("pixel_auroc", "aupro", "image_auroc")
# Examples of each kind, at most one of a class.
EXAMPLES = 3
# Longer side of the pictures, in pixels.
SIDE = 288


# Title, score, and pictures (name, address, caption) of an image of the dataset.
ExampleImage = tuple[str, str, list[tuple[str, str, str]]]


def write_report(
    comparison: Comparison, models: Mapping[str, Detector], data: TaskData, save_path: Path, path: Path, command: str
) -> None:
    """Write the page of a comparison.

    models: those whose heatmaps the examples show, by the name of their row (`example_rows`). command: the command that
    repeats the comparison.
    """
    header, rows = table_cells(comparison)
    write_page(
        TEMPLATE,
        path,
        title=f"Feedback loops of {save_path.as_posix()}",
        comparison=comparison,
        lines=best_lines(comparison),
        gains=gains_of_last_loop(comparison),
        header=header,
        rows=[(row, marks) for row, marks in zip(rows, best_of_columns(comparison), strict=True)],
        loop_charts=[loop_chart(title, panel_of(comparison, metric)) for metric, title in comparison.columns.items()],
        class_charts=class_charts(comparison),
        class_rows=class_rows(comparison),
        tested=tested_facts(comparison, data),
        groups=example_groups(comparison, models, data),
        runs=describe_runs(comparison),
        command=command,
    )
    logger.info("Report written to %s", path)


def example_rows(comparison: Comparison) -> list[Row]:
    """The rows in examples and class charts: the other models, and the main row last."""
    main = comparison.main_row
    return [row for row in comparison.others if row is not main] + ([main] if main else [])


def best_of_columns(comparison: Comparison) -> list[list[bool]]:
    """For each row and metric of the table, whether no row has a higher printed value."""
    printed = [cells[1:] for cells in table_cells(comparison)[1]]
    values = [[-math.inf if cell in (UNDEFINED, UNREADABLE) else float(cell) for cell in row] for row in printed]
    best = [max(column) for column in zip(*values, strict=True)]
    return [[value == top > -math.inf for value, top in zip(row, best, strict=True)] for row in values]


def class_charts(comparison: Comparison) -> list[Chart]:
    """Some metrics of every class, a marker for each of the shown rows."""
    charts = []
    for metric in CLASS_METRICS:
        values = {
            row.name: {each.class_name: each.values[metric] for each in comparison.evaluations[row.name].classes}
            for row in example_rows(comparison)
        }
        charts.append(class_chart(comparison.columns[metric], values))
    return [chart for chart in charts if chart is not None]


def class_rows(comparison: Comparison) -> list[list[str]]:
    """All metrics of every class and row, class by class."""
    evaluations = [comparison.evaluations[row.name] for row in comparison.rows if row.name in comparison.evaluations]
    by_class = zip(*(evaluation.classes for evaluation in evaluations), strict=True)
    return [
        [result.class_name, evaluation.model, *(format_value(result.values[metric]) for metric in comparison.columns)]
        for results in by_class
        for evaluation, result in zip(evaluations, results, strict=True)
    ]


def tested_facts(comparison: Comparison, data: TaskData) -> list[tuple[str, str]]:
    """The dataset, CLIP and versions of the comparison."""
    anomalous = sum(record.label for record in data.records)
    facts = [
        ("Dataset", f"{comparison.dataset}, {len(data.records)} images, {anomalous} of them anomalous"),
        ("Classes", ", ".join(data.classes)),
        ("Image list", data.digest[:12]),
        ("Det score", comparison.det_score),
        ("Versions", f"Python {platform.python_version()}, torch {torch.__version__}"),
    ]
    if comparison.references is not None:
        facts.append(("Compared with", str(comparison.references)))
    for model in [row.config["model"] for row in comparison.rows if row.config][-1:]:
        names = ("model_name", "img_size", "activation", "weights_digest")
        facts.append(("CLIP", ", ".join(str(model[name]) for name in names)))
        if limits := limits_of(model["model_name"]):
            facts.append(("Limits", limits))
    return facts


def example_groups(
    comparison: Comparison, models: Mapping[str, Detector], data: TaskData
) -> list[tuple[str, list[ExampleImage]]]:
    """Title and images of each kind of example, selected by the scores of the main row."""
    main = comparison.main_row
    if main is None or not models:
        return []
    kinds = (
        ("Best: anomalous images with the highest scores", True, True),
        ("Worst: anomalous images with the lowest scores", True, False),
        ("Worst: normal images with the highest scores", False, True),
    )
    groups = []
    for title, anomalous, highest in kinds:
        images = extreme_images(comparison.evaluations[main.name], anomalous, highest)[:EXAMPLES]
        if images:
            groups.append((title, [make_example(image, models, data) for image in images]))
    return groups


def extreme_images(evaluation: Evaluation, anomalous: bool, highest: bool) -> list[ImageScore]:
    """The anomalous or normal image of each class with the highest or lowest score, in that order."""
    images = []
    for result in evaluation.classes:
        pool = [image for image in result.scores if image.anomalous == anomalous]
        images += sorted(pool, key=lambda image: image.score, reverse=highest)[:1]
    return sorted(images, key=lambda image: image.score, reverse=highest)


def make_example(image: ImageScore, models: Mapping[str, Detector], data: TaskData) -> ExampleImage:
    """An image with its ground truth and the heatmap of every model, as pictures of one size."""
    record = next(record for record in data.records if record.image_path == image.path)
    sample = read_dataset_image(data, record)
    photo = ImageOps.contain(sample.image, (SIDE, SIDE))
    mask = resize_mask(Image.fromarray(sample.mask), photo.size)
    pictures = [("Original", picture_uri(photo), ""), ("Ground truth", picture_uri(mask), "")]
    for name, model in models.items():
        heatmap = predict_heatmap(model, sample, name)
        coloured = outlined(overlay(photo, heatmap.anomaly_map), np.array(mask))
        pictures.append((name, picture_uri(coloured), heatmap.caption))
    return sample.title, f"{image.score:.2f}, {image.path}", pictures
