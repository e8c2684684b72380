"""The loops of a feedback run (docs/method.md, "Feedback")."""

import math
from typing import NamedTuple

from engine.config.training import FeedbackConfig
from model.config import SIDES, LoopForward, check_settings
from utils.errors import UserError
from utils.text import format_table


class LoopPlan(NamedTuple):
    """A loop: epochs and first learning rate of each side, and whether cross-attention is on."""

    loop: int
    epochs: dict[str, int]
    rates: dict[str, float]
    cross_attention: bool


def plan_loops(config: FeedbackConfig) -> list[LoopPlan]:
    """The loops of a run; `UserError` for options that contradict each other."""
    count, start = config.num_feedback_loops, config.cross_attn_start_loop
    check_settings(config)
    if not 1 <= start <= count:
        raise UserError(f"--cross_attn_start_loop {start}: takes 1 to {count}, the number of loops")
    epochs = {side: epochs_of_loops(side, config) for side in SIDES}
    on = config.cross_attention().on
    plan = []
    for loop in range(1, count + 1):
        decay = config.lr_decay_per_loop ** (loop - 1)
        rates = {"text": config.text_lr * decay, "image": config.image_lr * decay}
        plan.append(LoopPlan(loop, {side: epochs[side][loop - 1] for side in SIDES}, rates, on and loop >= start))
    return plan


def epochs_of_loops(side: str, config: FeedbackConfig) -> list[int]:
    """Epochs of a side in each loop: as given, or floor(first x decay^(k-1)), at least 1."""
    count, epochs = config.num_feedback_loops, getattr(config, f"{side}_epochs_per_loop")
    if len(epochs) == 1:
        # A product such as 10 * 0.1 ** 1 may be slightly smaller than the exact whole number.
        decayed = (epochs[0] * config.epochs_decay_rate**loop for loop in range(count))
        return [max(1, math.floor(value + 1e-9)) for value in decayed]
    if len(epochs) < count:
        numbers = " ".join(map(str, epochs))
        raise UserError(
            f"--{side}_epochs_per_loop {numbers} covers {len(epochs)} of {count} loops; "
            "give one number, which decays, or one for each loop"
        )
    return list(epochs[:count])


def loop_forward(config: FeedbackConfig, loop: int) -> LoopForward:
    """A loop's choices for the forward: from loop 2 on, Stage 1 sees the trained image branch."""
    later = {"branch": "trained", "projectors": "projectors"}[config.feedback_features]
    return LoopForward("frozen" if loop == 1 else later, loop >= config.cross_attn_start_loop)


def plan_table(plan: list[LoopPlan]) -> str:
    """The plan as a table for the log."""
    rows = []
    for loop, epochs, rates, crossed in plan:
        numbers = (loop, *epochs.values(), *(f"{rate:.3g}" for rate in rates.values()))
        rows.append([*map(str, numbers), "on" if crossed else "off"])
    return format_table(["Loop", "Text epochs", "Image epochs", "Text lr", "Image lr", "Cross-attention"], rows)
