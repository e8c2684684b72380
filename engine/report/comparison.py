"""The result of a comparison of feedback loops: table, best loop, gains, notes on unfair comparisons, and files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.evaluation.inference import CROSS_ATTENTION
from engine.evaluation.references import ReferenceChoice, references_suffix, scoring_note
from engine.evaluation.results import CSV_COLUMNS, METRICS, UNDEFINED, Evaluation, csv_rows, format_value
from model.checkpoint import Checkpoint
from model.clip import FrozenCLIP
from model.config import SIDES, CrossAttentionConfig
from model.scoring import DET_SCORES
from utils.curves import Panel, loop_curves
from utils.files import write_text
from utils.text import csv_table, format_table, markdown_table

logger = logging.getLogger(__name__)

# Short names of the metrics, for column titles.
COLUMNS = {metric: title.removesuffix("-max") for metric, title in METRICS.items()}
UNREADABLE = "unreadable"
STEPS = "optimizer steps"


@dataclass(frozen=True)
class Row:
    """A row of the comparison.

    loop: None for models other than loops. checkpoint: None for unadapted CLIP, and if there is a `problem`.
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
    """Rows in the order of the table, metrics by a row's name, and notes on their interpretation.

    references: the normal images that all rows were compared with, if any. selected: the loop that held-out training
    images selected; None for the last loop. No loop is selected by the metrics of the comparison.
    """

    dataset: str
    rows: list[Row]
    evaluations: dict[str, Evaluation]
    notes: list[str]
    det_score: str = DET_SCORES[0]
    references: ReferenceChoice | None = None
    selected: int | None = None

    @property
    def columns(self) -> dict[str, str]:
        """Column titles of the reported metrics."""
        reported = next(iter(self.evaluations.values())).metrics if self.evaluations else METRICS
        return {metric: COLUMNS[metric] for metric in reported}

    @property
    def main_row(self) -> Row | None:
        """The selected loop, or the last row with metrics."""
        selected = [row for row in self.loops if row.loop == self.selected]
        return next(reversed([*self.others, *self.loops, *selected]), None)

    @property
    def heading_note(self) -> str:
        """Added to headings if image scores use another det score, or if images are compared with references."""
        return scoring_note(self.det_score, self.references)

    def file(self, name: str) -> str:
        """The name of a result file, which contains the references if there are any."""
        path = Path(name)
        return path.stem + references_suffix(self.references) + path.suffix

    @property
    def loops(self) -> list[Row]:
        """The loops with metrics, in order."""
        return [row for row in self.rows if row.loop is not None and row.name in self.evaluations]

    @property
    def others(self) -> list[Row]:
        """The other rows with metrics."""
        return [row for row in self.rows if row.loop is None and row.name in self.evaluations]

    def average(self, row: Row, metric: str) -> float | None:
        """A metric of a row, averaged over classes, in percent."""
        return self.evaluations[row.name].average(metric)[0]


def unfair_notes(rows: Sequence[Row]) -> list[str]:
    """Notes on differences between the training of the last loop and that of the other rows."""
    loops = [row for row in rows if row.loop is not None and row.checkpoint]
    if not loops:
        return []
    *others, last = loops
    other_models = [row for row in rows if row.loop is None and row.checkpoint]
    return [note for row in (*other_models, *others) for note in differences(last, row)]


def differences(last: Row, other: Row) -> list[str]:
    """A sentence for each fact about the training of `other` that differs from the last loop's."""
    notes = []
    others = training_facts(other)
    for fact, expected in training_facts(last).items():
        value = others[fact]
        values = f"{last.name} {expected or 'unknown'}, {other.name} {value or 'unknown'}"
        if other.loop is not None and fact.startswith(STEPS):
            continue  # the loops of one run have different numbers of steps
        if not expected or not value:
            notes.append(f"Possibly unfair comparison: different {fact}? ({values})")
        elif value != expected:
            notes.append(f"Unfair comparison: different {fact} ({values})")
    return notes


def training_facts(row: Row) -> dict[str, str | None]:
    """What makes a comparison unfair if it differs; None if unknown.

    Steps include those of the run that a run started from.
    """
    config = row.config or {}
    steps = (row.checkpoint and row.checkpoint.steps) or {}
    facts = {
        "training data": describe_training_data(config) if config else None,
        "share of the training images held out": config["arguments"].get("val_fraction") or 0.0 if config else None,
        "seed": config.get("seed"),
        **{f"{STEPS} of the {side} side": steps.get(side) for side in SIDES},
    }
    return {fact: None if value is None else str(value) for fact, value in facts.items()}


def describe_training_data(config: Mapping[str, Any]) -> str:
    """Dataset, image list and number of images of a checkpoint's `config`."""
    shot = config.get("shot")
    images = config["training_mode"] if shot is None else f"{config['training_mode']} with {shot} images per class"
    return f"{config['dataset']} (image list {config['metadata_digest'][:12]}), {images}"


def forward_notes(rows: Sequence[Row], clip: FrozenCLIP) -> list[str]:
    """Notes on rows of another kind than their name says, or trained at another image size or activation."""
    notes = []
    for row in rows:
        if row.config is None or row.checkpoint is None:
            continue
        # A base that was trained further with both cross-attentions at weight 0 is a base.
        cross = row.config.get("cross_attention")
        crossed = cross is not None and CrossAttentionConfig(**cross).on
        if row.loop is None and crossed != (row.name == CROSS_ATTENTION):
            has = "has" if crossed else "has no"
            notes.append(f"The row {row.name} has the wrong kind of model: {row.checkpoint.path} {has} cross-attention")
        for name in ("img_size", "activation"):
            trained, used = row.config["model"][name], getattr(clip, name)
            if trained != used:
                notes.append(f"{row.name} was trained with {name} {trained}; all models are tested with {used}")
    return notes


def write_comparison(comparison: Comparison, save_path: Path, folder: Path) -> None:
    """Log the results, and write `comparison.csv`, `comparison.md` and `comparison.png` to `folder`."""
    table, page, picture = (comparison.file(f"comparison.{kind}") for kind in ("csv", "md", "png"))
    lines = [*best_lines(comparison), *improvement_lines(comparison)]
    subject = comparison.dataset + ", in percent" + comparison.heading_note
    logger.info("\nFeedback loops of %s on %s\n\n%s\n", save_path, subject, format_table(*table_cells(comparison)))
    for line in lines:
        logger.info("%s", line)
    for note in comparison.notes:
        logger.warning("%s", note)
    rows = [line for row in comparison.rows for line in csv_lines(comparison, row)]
    write_text(folder / table, csv_table([CSV_COLUMNS, *rows]))
    write_text(folder / page, markdown(comparison, lines, save_path))
    draw(comparison, folder / picture)
    logger.info("Written to %s, %s and %s", folder / table, page, picture)


def table_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the summary table: averages over classes in percent."""
    rows = []
    for row in comparison.rows:
        values = [UNREADABLE] * len(comparison.columns)
        if row.name in comparison.evaluations:
            values = [format_value(comparison.average(row, metric)) for metric in comparison.columns]
        rows.append([row.name, *values])
    return ["Loop", *comparison.columns.values()], rows


def csv_lines(comparison: Comparison, row: Row) -> list[list[object]]:
    """A row's lines in `comparison.csv`: each class, then the average; only the average for an unreadable row."""
    if row.name in comparison.evaluations:
        return csv_rows(comparison.evaluations[row.name])
    counts = [UNDEFINED, UNDEFINED, comparison.det_score]
    unreadable = [UNREADABLE] * (len(CSV_COLUMNS) - 6)
    return [[row.name, comparison.dataset, "average", *counts, *unreadable]]


def best_lines(comparison: Comparison) -> list[str]:
    """The loop with the highest pixel and image AUROC on these test images, the first of equals."""
    lines = []
    for metric in ("pixel_auroc", "image_auroc"):
        best = best_loop(comparison, metric)
        value = f"{best.name} ({format_value(comparison.average(best, metric))})" if best else UNDEFINED
        lines.append(f"Best {COLUMNS[metric]}: {value}")
    return lines


def best_loop(comparison: Comparison, metric: str) -> Row | None:
    """The loop with the highest average of a metric, the first of equals; None if it is undefined in all loops."""
    defined = [row for row in comparison.loops if comparison.average(row, metric) is not None]
    return max(defined, key=lambda row: comparison.average(row, metric) or 0.0, default=None)


def improvement_lines(comparison: Comparison) -> list[str]:
    """The gains of the last loop, one line for each row that it is compared with."""
    lines = []
    for name, gains in gains_of_last_loop(comparison):
        values = ", ".join(f"{title} {value}" for title, value in zip(comparison.columns.values(), gains, strict=True))
        lines.append(f"Improvement from {name} to {comparison.loops[-1].name}: {values} percentage points")
    return lines


def gains_of_last_loop(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """The first loop and the other rows by name, each with the last loop's gain by metric, in percentage points."""
    if not comparison.loops:
        return []
    *earlier, last = comparison.loops
    return [
        (row.name, [gain(comparison.average(row, name), comparison.average(last, name)) for name in comparison.columns])
        for row in (*earlier[:1], *comparison.others)
    ]


def gain(before: float | None, after: float | None) -> str:
    """A difference in percentage points."""
    # Adding 0 turns -0.0 into 0.0.
    return UNDEFINED if before is None or after is None else f"{round(after - before, 2) + 0:+.2f}"


def markdown(comparison: Comparison, lines: Sequence[str], save_path: Path) -> str:
    """The comparison in Markdown: the table, best loops, gains, notes, and the training of each row."""
    facts = {row.name: training_facts(row) for row in comparison.rows if row.checkpoint}
    parts = [
        f"# Feedback loops of `{save_path.as_posix()}` on {comparison.dataset}",
        f"Metrics in percent, averaged over classes{comparison.heading_note}. Each class is in "
        f"`{comparison.file('comparison.csv')}`.",
        markdown_table(*table_cells(comparison)),
        "\n".join(f"- {line}" for line in lines),
    ]
    if comparison.notes:
        parts += ["## Before comparing", "\n".join(f"- {note}" for note in comparison.notes)]
    if facts:
        rows = [[name, *(value or "unknown" for value in values.values())] for name, values in facts.items()]
        parts += ["## Training", markdown_table(["", *next(iter(facts.values()))], rows)]
    return "\n\n".join(parts) + "\n"


def panel_of(comparison: Comparison, metric: str) -> Panel:
    """A metric of the loops by their number, and of the other rows by name."""
    return (
        {row.loop: comparison.average(row, metric) for row in comparison.loops if row.loop is not None},
        {row.name: comparison.average(row, metric) for row in comparison.others},
    )


def draw(comparison: Comparison, path: Path) -> None:
    """`comparison.png`: a panel per metric."""
    panels = {}
    for metric, title in comparison.columns.items():
        best = best_loop(comparison, metric)
        heading = title if best is None else f"{title} (best: {best.name}, {comparison.average(best, metric):.2f})"
        panels[heading] = panel_of(comparison, metric)
    loop_curves(panels, path, f"Feedback loops on {comparison.dataset}, in percent{comparison.heading_note}")
