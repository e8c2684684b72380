"""The log of an epoch, warnings about it, the verdict on a stage, and a run's summary (docs/method.md, "Training")."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.text import format_table, readable_time

logger = logging.getLogger(__name__)

LOSS_PARTS = ("focal", "dice_normal", "dice_abnormal", "classification", "overlap")
LOW_GRADIENT = 0.01
VANISHING_GRADIENT = 0.001
# Mean p_abnormal below this inside and outside the masks: the model calls everything normal.
COLLAPSED_BELOW = 0.02
# A last loss of more than this times the run's first is exploding.
EXPLODED_ABOVE = 1.5
# A stage of at least this many steps whose loss fell by less than this share of the run's first is not learning.
ENOUGH_STEPS = 100
FLAT_WITHIN = 0.01
# If p_abnormal is higher by this inside the masks than outside, the maps show where the anomalies are.
SEPARATES_BY = 0.1

Row = Mapping[str, Any]


class StageVerdict(NamedTuple):
    """Whether a stage learned: the label, the reason for it, and what to try."""

    label: str
    reason: str
    remedies: tuple[str, ...] = ()

    def __str__(self) -> str:
        advice = f". Try {', '.join(self.remedies)}" if self.remedies else ""
        return f"{self.label}: {self.reason}{advice}"


def log_epoch(row: Row, epochs: int) -> None:
    """Log an epoch's loss with its parts, gradient norms, speed, and warnings."""
    parts = ", ".join(f"{name} {row[name]:.4f}" for name in LOSS_PARTS if name in row)
    logger.info("Loop %d - %s loss: %.4f  (%s)", row["loop"], row["stage"], row["loss"], parts)
    norms = {name.removeprefix("grad_norm/"): norm for name, norm in row.items() if name.startswith("grad_norm/")}
    total = norms.pop("total")
    each = ", ".join(f"{name} {norm:.4f}" for name, norm in norms.items())
    logger.info("  Average Grad Norm: %.4f  (%s)", total, each)
    inside, outside = row["abnormal_inside"], row["abnormal_outside"]
    # Both are NaN if no masks are used.
    unwatched = math.isnan(inside) and math.isnan(outside)
    watched = "" if unwatched else f"p_abnormal {inside:.3f} inside masks and {outside:.3f} outside, "
    left = readable_time((epochs - row["epoch"]) * row["seconds"])
    speed = f"{row['images_per_second']:.1f} images/s, {row['memory_gib']:.2f} GiB, {left} left"
    logger.info("  epoch %d of %d, lr %.3g, %s%s", row["epoch"], epochs, row["lr"], watched, speed)
    for warning in epoch_warnings(row):
        logger.warning("  %s", warning)


def undefined_values(row: Row) -> list[str]:
    """The values of an epoch that are not finite; p_abnormal may be undefined inside and outside, without masks."""
    names = ("loss", "opening_loss", "grad_norm/total", "abnormal_inside", "abnormal_outside")
    undefined = [name for name in names if not math.isfinite(row[name])]
    return undefined if undefined != list(names[-2:]) else []


def is_collapsed(row: Row) -> bool:
    """Whether an epoch called everything normal; False for an epoch without anomalous pixels (NaN)."""
    return row["abnormal_inside"] < COLLAPSED_BELOW and row["abnormal_outside"] < COLLAPSED_BELOW


def epoch_warnings(row: Row) -> list[str]:
    """What is unhealthy about an epoch."""
    warnings = [f"undefined: {name}" for name in undefined_values(row)]
    norm = row["grad_norm/total"]
    if norm < VANISHING_GRADIENT:
        warnings.append(f"gradients are vanishing: norm {norm:.2g}, below {VANISHING_GRADIENT}")
    elif norm < LOW_GRADIENT:
        usual = "a guide for ViT-L reports 0.05 to 0.15, the toy CLIP has 0.7 to 13"
        warnings.append(f"gradients are low: norm {norm:.2g}, below {LOW_GRADIENT} ({usual})")
    if is_collapsed(row):
        warnings.append(
            f'collapsed to "all normal": mean p_abnormal is {row["abnormal_inside"]:.3f} inside the masks '
            f"and {row['abnormal_outside']:.3f} outside"
        )
    return warnings


def remedies_for(side: str, feedback: bool) -> dict[str, tuple[str, ...]]:
    """What to try for each verdict on a stage, with the options of its script."""
    higher, lower = f"a higher {_rate(side)}", f"a lower {_rate(side)}"
    later = ("--cross_attn_start_loop 2",) if feedback else ()
    gentler = ("more --warmup_epochs", "a tighter --grad_clip") if feedback else ()
    return {
        'collapsed to "all normal"': (higher, *later, "a look at the masks of the training data"),
        "exploding": (*gentler, lower),
        "vanishing": (higher, *later),
        "not learning": (higher, *later, "more epochs"),
    }


def after_not_finite(state: Path, side: str, feedback: bool) -> str:
    """What to do after a loss that is not finite; state: the file of the last good state."""
    change = f"a lower {_rate(side)}"
    if feedback:
        change = f"--init_from {state}, and {change} or a tighter --grad_clip"
    return f"The last good state is {state}; start with another --save_path{', ' if feedback else ' and '}{change}"


def _rate(side: str) -> str:
    """The options of a stage's learning rate."""
    return "--text_lr and --image_lr" if side == "both" else f"--{side}_lr"


def judge_stage(rows: Sequence[Row], first_loss: float, remedies: Mapping[str, tuple[str, ...]]) -> StageVerdict:
    """The verdict on a stage of one loop, from the rows of its epochs.

    first_loss: the stage's first loss in the run; remedies: by label, the options to try.
    """
    last = rows[-1]
    change = f"its loss went from {first_loss:.4f} to {last['loss']:.4f}"
    fell = last["loss"] <= first_loss * (1 - FLAT_WITHIN)

    def verdict(label: str, reason: str) -> StageVerdict:
        return StageVerdict(label, reason, remedies.get(label, ()))

    if undefined := undefined_values(last):
        return StageVerdict("undefined", f"{', '.join(undefined)} not finite; {change}")
    if is_collapsed(last):
        return verdict('collapsed to "all normal"', f"not learning, it calls every pixel normal; {change}")
    if last["grad_norm/total"] < VANISHING_GRADIENT:
        reason = f"the gradient's norm is {last['grad_norm/total']:.2g}; {change}"
        # A far too high rate first saturates the losses, whose gradient then vanishes.
        return StageVerdict("vanishing", reason, remedies.get("vanishing" if fell else "exploding", ()))
    if sum(row["steps"] for row in rows) < ENOUGH_STEPS:
        return StageVerdict("too short to tell", change)
    if last["loss"] > first_loss * EXPLODED_ABOVE:
        return verdict("exploding", change)
    if not fell:
        apart = last["abnormal_inside"] - last["abnormal_outside"]
        if apart > SEPARATES_BY:
            change += (
                f", but its maps show the anomalies (p_abnormal {last['abnormal_inside']:.3f} inside masks, "
                f"{last['abnormal_outside']:.3f} outside): a start from a trained model that has little left to gain"
            )
        return verdict("not learning", change)
    return StageVerdict("learning", change)


def stage_rows(history: Sequence[Row]) -> dict[tuple[int, str], list[Row]]:
    """The epochs of each (loop, stage) in the order of training; null in JSON becomes NaN again."""
    stages: dict[tuple[int, str], list[Row]] = {}
    for row in history:
        row = {name: math.nan if value is None else value for name, value in row.items()}
        stages.setdefault((row["loop"], row["stage"]), []).append(row)
    return stages


def judge_run(history: Sequence[Row], feedback: bool) -> dict[tuple[int, str], StageVerdict]:
    """The verdict on every stage of every loop."""
    first: dict[str, float] = {}
    verdicts = {}
    for (loop, side), rows in stage_rows(history).items():
        first.setdefault(side, rows[0]["opening_loss"])
        verdicts[loop, side] = judge_stage(rows, first[side], remedies_for(side, feedback))
    return verdicts


def summary_cells(history: Sequence[Row], feedback: bool) -> tuple[list[str], list[list[str]]]:
    """The header and rows of a run's summary, one row for each stage of each loop."""
    verdicts, table = judge_run(history, feedback), []
    for (loop, side), rows in stage_rows(history).items():
        norm = math.fsum(row["grad_norm/total"] for row in rows) / len(rows)
        numbers = (f"{value:.4f}" for value in (rows[0]["opening_loss"], rows[-1]["loss"], norm))
        table.append([str(loop), side, str(len(rows)), *numbers, verdicts[loop, side].label])
    return ["Loop", "Stage", "Epochs", "First loss", "Last loss", "Grad norm", "Verdict"], table


def advice(history: Sequence[Row], feedback: bool) -> list[str]:
    """A sentence for each stage that needs a remedy."""
    verdicts = judge_run(history, feedback)
    return [f"Loop {loop}, {side}: {verdict}" for (loop, side), verdict in verdicts.items() if verdict.remedies]


def run_summary(history: Sequence[Row], feedback: bool) -> str:
    """A table with a row for each stage of each loop, and the advice."""
    return "\n".join([format_table(*summary_cells(history, feedback)), *advice(history, feedback)])


def validated_loop(results: Sequence[Mapping[str, Any]]) -> int | None:
    """The loop with the best mean of pixel and image AUROC on held-out training images, the first of equals.

    results: of each loop, as in the run's state. None if no images were held out.
    """
    scores = []
    for result in results:
        values = [result.get("validation", {}).get(metric) for metric in ("pixel_auroc", "image_auroc")]
        defined = [value for value in values if value is not None]
        if defined:
            scores.append((sum(defined) / len(defined), -result["loop"]))
    return -max(scores)[1] if scores else None
