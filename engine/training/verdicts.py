"""What training says about itself in plain words: warnings of an epoch, the verdict on a stage, a run's summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engine.training.advice import remedies_for
from utils.tables import format_table

LOW_GRADIENT = 0.01
VANISHING_GRADIENT = 0.001
# Mean p_abnormal below this inside and outside the masks: the model calls everything normal.
COLLAPSED_BELOW = 0.02
# A loss that ends this much above the run's first is exploding.
EXPLODED_ABOVE = 1.5
# "Not learning" is said of a stage of at least this many steps that ends within this share of the run's first loss.
ENOUGH_STEPS = 100
FLAT_WITHIN = 0.01
# A mean p_abnormal higher by this inside the masks than outside: the maps show where the anomalies are.
SEPARATES_BY = 0.1

Row = Mapping[str, Any]


class Verdict(NamedTuple):
    """What became of a stage: `label`, what it rests on, and what to try."""

    label: str
    reason: str
    remedies: tuple[str, ...] = ()

    def __str__(self) -> str:
        advice = f". Try {', '.join(self.remedies)}" if self.remedies else ""
        return f"{self.label}: {self.reason}{advice}"


def is_collapsed(row: Row) -> bool:
    """Whether an epoch called everything normal; an epoch without anomalous pixels tells nothing."""
    return row["abnormal_inside"] < COLLAPSED_BELOW and row["abnormal_outside"] < COLLAPSED_BELOW


def epoch_warnings(row: Row) -> list[str]:
    """What is unhealthy about an epoch, in plain words (docs/method.md, "Training")."""
    warnings = []
    norm = row["grad_norm/total"]
    if norm < VANISHING_GRADIENT:
        warnings.append(f"gradients are vanishing: norm {norm:.2g}, below {VANISHING_GRADIENT}")
    elif norm < LOW_GRADIENT:
        warnings.append(f"gradients are low: norm {norm:.2g}, below {LOW_GRADIENT}; 0.05 to 0.15 is healthy")
    if is_collapsed(row):
        warnings.append(
            f'collapsed to "all normal": mean p_abnormal is {row["abnormal_inside"]:.3f} inside the masks '
            f"and {row['abnormal_outside']:.3f} outside"
        )
    return warnings


def judge_stage(rows: Sequence[Row], first_loss: float, remedies: Mapping[str, tuple[str, ...]]) -> Verdict:
    """The verdict on a stage of one loop, from the rows of its epochs.

    first_loss: the run's first, of this stage in its first loop; remedies: by label, what this kind of run can change.
    """
    last = rows[-1]
    went = f"its loss went from {first_loss:.4f} to {last['loss']:.4f}"

    def verdict(label: str, reason: str) -> Verdict:
        return Verdict(label, reason, remedies.get(label, ()))

    if is_collapsed(last):
        return verdict('collapsed to "all normal"', f"not learning, it calls every pixel normal; {went}")
    if last["grad_norm/total"] < VANISHING_GRADIENT:
        return verdict("vanishing", f"the gradient's norm is {last['grad_norm/total']:.2g}; {went}")
    if sum(row["steps"] for row in rows) < ENOUGH_STEPS:
        return Verdict("too short to tell", went)
    if last["loss"] > first_loss * EXPLODED_ABOVE:
        return verdict("exploding", went)
    if last["loss"] > first_loss * (1 - FLAT_WITHIN):
        apart = last["abnormal_inside"] - last["abnormal_outside"]
        if apart > SEPARATES_BY:
            went += (
                f", but its maps do tell anomalies apart (p_abnormal {last['abnormal_inside']:.3f} inside masks, "
                f"{last['abnormal_outside']:.3f} outside): a start from a trained model that has little left to gain"
            )
        return verdict("not learning", went)
    return Verdict("learning", went)


def stage_rows(history: Sequence[Row]) -> dict[tuple[int, str], list[Row]]:
    """The epochs of each (loop, stage), in the order in which they were trained."""
    found: dict[tuple[int, str], list[Row]] = {}
    for row in history:
        found.setdefault((row["loop"], row["stage"]), []).append(row)
    return found


def judge_run(history: Sequence[Row], feedback: bool) -> dict[tuple[int, str], Verdict]:
    """The verdict on every stage of every loop."""
    first: dict[str, float] = {}
    verdicts = {}
    for (loop, side), rows in stage_rows(history).items():
        first.setdefault(side, rows[0]["opening_loss"])
        verdicts[loop, side] = judge_stage(rows, first[side], remedies_for(side, feedback))
    return verdicts


def summary_cells(history: Sequence[Row], feedback: bool) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a run's summary, a row for each stage of each loop."""
    verdicts = judge_run(history, feedback)
    table = [
        [
            str(loop),
            side,
            str(len(rows)),
            f"{rows[0]['opening_loss']:.4f}",
            f"{rows[-1]['loss']:.4f}",
            f"{math.fsum(row['grad_norm/total'] for row in rows) / len(rows):.4f}",
            verdicts[loop, side].label,
        ]
        for (loop, side), rows in stage_rows(history).items()
    ]
    return ["Loop", "Stage", "Epochs", "First loss", "Last loss", "Grad norm", "Verdict"], table


def advice(history: Sequence[Row], feedback: bool) -> list[str]:
    """What to try for each stage with which something is wrong, a sentence each."""
    verdicts = judge_run(history, feedback)
    return [f"Loop {loop}, {side}: {verdict}" for (loop, side), verdict in verdicts.items() if verdict.remedies]


def run_summary(history: Sequence[Row], feedback: bool) -> str:
    """A table with a row for each stage of each loop, and what to try where something is wrong."""
    return "\n".join([format_table(*summary_cells(history, feedback)), *advice(history, feedback)])
