"""What a comparison of a run's loops says: table, best loop, gains, what is unfair about it, and its files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from engine.detector.references import ReferenceChoice, said_of_references
from engine.evaluation.evaluate import (
    METRICS,
    UNDEFINED,
    Evaluation,
    csv_rows,
    format_value,
    said_of_det_score,
    write_csv_rows,
)
from model.checkpoint import Checkpoint
from model.config import CrossAttentionConfig
from model.scoring import DET_SCORES
from utils.curves import Panel, loop_curves
from utils.files import write_text
from utils.text import format_table, markdown_table

logger = logging.getLogger(__name__)

# Column titles of the tables, in which names are a little shorter.
COLUMNS = {metric: title.replace("AUROC", "AUC").removesuffix("-max") for metric, title in METRICS.items()}
# The panels of `comparison.png`, row by row: pixels to the left, images to the right.
PANELS = tuple(
    metric
    for pair in zip_longest(
        [metric for metric in METRICS if not metric.startswith("image")],
        [metric for metric in METRICS if metric.startswith("image")],
    )
    for metric in pair
    if metric
)
# The rows beside the loops.
BASE, CROSS_ATTENTION = "base", "cross-attention"
UNREADABLE = "unreadable"
# What makes a comparison unfair where it differs.
TRAINING_FACTS = (DATA, HELD_OUT, SEED, TEXT_STEPS, IMAGE_STEPS) = (
    "training data",
    "share of the training images held out",
    "seed",
    "optimizer steps of the text side",
    "optimizer steps of the image side",
)


@dataclass(frozen=True)
class Row:
    """A row of the comparison.

    loop: None beside the loops; checkpoint: None for unadapted CLIP, and where `problem` says why there is none.
    """

    name: str
    loop: int | None = None
    checkpoint: Checkpoint | None = None
    problem: str | None = None

    @property
    def config(self) -> dict[str, Any] | None:
        return self.checkpoint.config if self.checkpoint else None


@dataclass(frozen=True)
class Comparison:
    """What was found: rows in the order of the table, metrics by a row's name, and what a reader must know.

    references: the normal images that all rows were compared with, None for none.
    """

    dataset: str
    rows: list[Row]
    evaluations: dict[str, Evaluation]
    notes: list[str]
    det_score: str = DET_SCORES[0]
    references: ReferenceChoice | None = None

    @property
    def said(self) -> str:
        """What is added to headings where figures are not the published, zero-shot ones."""
        return said_of_det_score(self.det_score) + said_of_references(self.references)

    def file(self, name: str) -> str:
        """A file of results: one with references does not take the place of the one without."""
        path = Path(name)
        return name if self.references is None else path.stem + self.references.suffix + path.suffix

    @property
    def loops(self) -> list[Row]:
        """The loops that have figures, in order."""
        return [row for row in self.rows if row.loop is not None and row.name in self.evaluations]

    @property
    def others(self) -> list[Row]:
        """The rows beside the loops that have figures."""
        return [row for row in self.rows if row.loop is None and row.name in self.evaluations]

    def average(self, row: Row, metric: str) -> float | None:
        """A metric of a row that has figures, averaged over classes, in percent."""
        return self.evaluations[row.name].average(metric)[0]


def unfair_notes(rows: Sequence[Row]) -> list[str]:
    """In what the last loop's training differs from that of the base, of cross-attention, and of the other loops."""
    loops = [row for row in rows if row.loop is not None and row.checkpoint]
    if not loops:
        return []
    *others, last = loops
    beside = [row for row in rows if row.loop is None and row.checkpoint]
    # Loops of one run differ in steps by nature.
    return [
        *(note for row in beside for note in differences(last, row, {**training(row), **steps(row)})),
        *(note for row in others for note in differences(last, row, training(row))),
    ]


def differences(last: Row, other: Row, facts: Mapping[str, Any]) -> list[str]:
    """The facts of `other` that are not those of the last loop, each in a sentence with both values."""
    mine = {**training(last), **steps(last)}
    notes = []
    for fact, value in facts.items():
        if None in (value, mine[fact]):
            said = " against ".join("unknown" if item is None else str(item) for item in (mine[fact], value))
            notes.append(f"Perhaps an unfair comparison: {last.name} and {other.name} may differ in {fact}: {said}")
        elif value != mine[fact]:
            notes.append(
                f"Unfair comparison: {last.name} and {other.name} differ in {fact}: {mine[fact]} against {value}"
            )
    return notes


def training(row: Row) -> dict[str, Any]:
    """On what, and from which seed, a row was trained, by names of `TRAINING_FACTS`; None where its file is silent."""
    config = row.config
    if config is None:
        return dict.fromkeys((DATA, HELD_OUT, SEED))
    shot = config.get("shot")
    images = config["training_mode"] if shot is None else f"{config['training_mode']} with {shot} images per class"
    return {
        DATA: f"{config['dataset']} (image list {config['metadata_digest'][:12]}), {images}",
        HELD_OUT: config["arguments"].get("val_fraction") or 0.0,
        SEED: config["seed"],
    }


def steps(row: Row) -> dict[str, Any]:
    """Optimizer steps that a row's weights have seen, those of the run that it started from included."""
    known = row.checkpoint.steps or {}
    return {TEXT_STEPS: known.get("text"), IMAGE_STEPS: known.get("image")}


def setting_notes(rows: Sequence[Row], used: Mapping[str, Any]) -> list[str]:
    """Rows that are not what their name says, or were trained at another image size or activation than `used`."""
    notes = []
    for row in rows:
        if row.config is None:
            continue
        # A base that went on under the same script, with both cross-attentions at weight 0, is a base.
        trained_with = row.config.get("cross_attention")
        crossed = bool(trained_with) and CrossAttentionConfig(**trained_with).on
        if row.loop is None and crossed != (row.name == CROSS_ATTENTION):
            has = "has" if crossed else "has no"
            notes.append(f"{row.name} is not what its name says: {row.checkpoint.path} {has} cross-attention")
        for name in ("img_size", "activation"):
            trained = row.config["model"][name]
            if trained != used[name]:
                notes.append(
                    f"{row.name} was trained with {name} {trained}, and is tested with {used[name]} as all are"
                )
    return notes


def write_comparison(comparison: Comparison, save_path: Path, folder: Path) -> None:
    """Say what was found, and write `comparison.csv`, `comparison.md` and `comparison.png` to `folder`.

    With references, files have them in their names.
    """
    table, page, picture = (comparison.file(f"comparison.{kind}") for kind in ("csv", "md", "png"))
    cells = table_cells(comparison)
    lines = [*best_lines(comparison), *improvement_lines(comparison)]
    on = comparison.dataset + ", in percent" + comparison.said
    logger.info("\nFeedback loops of %s on %s\n\n%s\n", save_path, on, format_table(*cells))
    for line in lines:
        logger.info("%s", line)
    for note in comparison.notes:
        logger.warning("%s", note)
    write_csv_rows([line for row in comparison.rows for line in csv_lines(comparison, row)], folder / table)
    write_text(folder / page, markdown(comparison, cells, lines, save_path))
    draw(comparison, folder / picture)
    logger.info("Written to %s, %s and %s", folder / table, page, picture)


def table_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The header and rows of the summary: averages over classes in percent."""
    rows = []
    for row in comparison.rows:
        figures = [UNREADABLE] * len(METRICS)
        if row.name in comparison.evaluations:
            figures = [format_value(comparison.average(row, metric)) for metric in METRICS]
        rows.append([row.name, *figures])
    return ["Loop", *(COLUMNS[metric] for metric in METRICS)], rows


def csv_lines(comparison: Comparison, row: Row) -> list[Sequence[object]]:
    """A row's lines in `comparison.csv`: each class, then the average; one line for a row that cannot be read."""
    if row.name in comparison.evaluations:
        return csv_rows(comparison.evaluations[row.name])
    unknown = [UNDEFINED, UNDEFINED, comparison.det_score]
    return [[row.name, comparison.dataset, "average", *unknown, *[UNREADABLE] * len(METRICS)]]


def best_lines(comparison: Comparison) -> list[str]:
    """The loop with the highest pixel and image AUC, the earliest of equals."""
    lines = []
    for metric in ("pixel_auroc", "image_auroc"):
        best = best_loop(comparison, metric)
        said = f"{best.name} ({format_value(comparison.average(best, metric))})" if best else UNDEFINED
        lines.append(f"Best {COLUMNS[metric]}: {said}")
    return lines


def best_loop(comparison: Comparison, metric: str) -> Row | None:
    """The loop with the highest average of a metric, the earliest of equals; None where no loop has one."""
    known = [row for row in comparison.loops if comparison.average(row, metric) is not None]
    return max(known, key=lambda row: comparison.average(row, metric), default=None)


def improvement_lines(comparison: Comparison) -> list[str]:
    """What the last loop has gained on the first, and on each of the other rows, in points."""
    lines = []
    for name, points in gains_of_last_loop(comparison):
        said = ", ".join(f"{COLUMNS[metric]} {value}" for metric, value in zip(METRICS, points, strict=True))
        lines.append(f"Improvement from {name} to {comparison.loops[-1].name}: {said} points")
    return lines


def gains_of_last_loop(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """The names of the first loop and of the other rows, each with the last loop's gain on it by metric, in points."""
    loops = comparison.loops
    starts = [*loops[:1], *comparison.others] if len(loops) > 1 else comparison.others if loops else []
    return [(row.name, [gain(comparison, row, loops[-1], metric) for metric in METRICS]) for row in starts]


def gain(comparison: Comparison, before: Row, after: Row, metric: str) -> str:
    """The difference of a metric between two rows, in points."""
    old, new = (comparison.average(row, metric) for row in (before, after))
    # Adding 0 takes the sign from a zero that was negative before it was rounded.
    return UNDEFINED if old is None or new is None else f"{round(new - old, 2) + 0:+.2f}"


def markdown(
    comparison: Comparison, cells: tuple[list[str], list[list[str]]], lines: Sequence[str], save_path: Path
) -> str:
    """The comparison as a page: the table, what follows from it, and what a reader must know before believing it."""
    facts = [[row.name, *trained_in_words(row)] for row in comparison.rows if row.checkpoint]
    parts = [
        f"# Feedback loops of `{save_path.as_posix()}` on {comparison.dataset}",
        f"Metrics in percent, averaged over classes; of each class in `{comparison.file('comparison.csv')}`"
        f"{comparison.said}.",
        markdown_table(*cells),
        "\n".join(f"- {line}" for line in lines),
    ]
    if comparison.notes:
        parts += ["## Before comparing", "\n".join(f"- {note}" for note in comparison.notes)]
    if facts:
        parts += ["## Training", markdown_table(["", *TRAINING_FACTS], facts)]
    return "\n\n".join(parts) + "\n"


def trained_in_words(row: Row) -> list[str]:
    """The values of `TRAINING_FACTS` of a row that has a checkpoint."""
    facts = {**training(row), **steps(row)}
    return ["unknown" if facts[name] is None else str(facts[name]) for name in TRAINING_FACTS]


def panel_of(comparison: Comparison, metric: str) -> Panel:
    """A metric of the loops by their number, and of the other rows by name."""
    return (
        {row.loop: comparison.average(row, metric) for row in comparison.loops},
        {row.name: comparison.average(row, metric) for row in comparison.others},
    )


def draw(comparison: Comparison, path: Path) -> None:
    """`comparison.png`: a panel per metric."""
    panels = {}
    for metric in PANELS:
        best, title = best_loop(comparison, metric), COLUMNS[metric]
        heading = title if best is None else f"{title} (best: {best.name}, {comparison.average(best, metric):.2f})"
        panels[heading] = panel_of(comparison, metric)
    loop_curves(panels, path, f"Feedback loops on {comparison.dataset}, in percent{comparison.said}")
