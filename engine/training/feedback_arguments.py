"""Arguments of the feedback script, its presets, and the plan of loops that follows from them."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine.training.arguments import CrossAttentionArguments, free
from utils.errors import UserError
from utils.tables import format_table

MOST_LOOPS = 10

# V1's column of docs/method.md, "Training": what earlier code did, kept so that it can be measured.
V1: dict[str, Any] = {
    "num_feedback_loops": 3,
    "text_epochs_per_loop": (5, 3, 2),
    "image_epochs_per_loop": (20, 10, 5),
    "epochs_decay_rate": 0.5,
    "text_lr": 1e-5,
    "image_lr": 5e-4,
    "lr_decay_per_loop": 0.5,
    "lr_schedule": "multistep",
    "warmup_epochs": 0,
    "grad_clip": 0.0,
    "optimizer": "adam",
    "reset_optimizers": True,
    "text_cross_attn_weight": 1.0,
    "image_cross_attn_weight": 1.0,
    "context_norm": "none",
}
ADAMW_WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class FeedbackConfig(CrossAttentionArguments):
    """Arguments of `train_cross_attention_feedback_v2.py`, by the same names, with V2's defaults.

    text_epochs_per_loop, image_epochs_per_loop: epochs of loop 1, which decay, or one number for each loop.
    """

    preset: str = free("v2")
    num_feedback_loops: int = free(5)
    text_epochs_per_loop: tuple[int, ...] = free((5,))
    image_epochs_per_loop: tuple[int, ...] = free((15,))
    epochs_decay_rate: float = free(0.8)
    text_lr: float = 2e-5
    image_lr: float = 5e-3
    lr_decay_per_loop: float = 0.8
    lr_schedule: str = "cosine"
    warmup_epochs: int = 2
    grad_clip: float = 1.0
    optimizer: str = "adamw"
    weight_decay: float = ADAMW_WEIGHT_DECAY
    reset_optimizers: bool = False
    cross_attn_start_loop: int = 1
    feedback_features: str = "branch"
    init_from: Path | None = free(None)
    eval_dataset: str | None = free(None)
    val_fraction: float = 0.0
    save_path: Path = free(Path("ckpt/feedback"))

    @classmethod
    def from_preset(cls, preset: str, **explicit: Any) -> FeedbackConfig:
        """The defaults of a preset, changed where asked for; Adam takes no weight decay unless that is asked for."""
        values = {**PRESETS[preset], **explicit}
        if "weight_decay" not in explicit:
            values["weight_decay"] = ADAMW_WEIGHT_DECAY if values["optimizer"] == "adamw" else 0.0
        return cls(**{**values, "preset": preset})

    @classmethod
    def from_namespace(cls, arguments: Namespace) -> FeedbackConfig:
        """From a namespace that holds the preset's arguments only where they were given."""
        values = dict(vars(arguments))
        for name in ("levels", "text_epochs_per_loop", "image_epochs_per_loop"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls.from_preset(values.pop("preset"), **values)


# What each preset decides: the same arguments for both, V2's values being the defaults above.
PRESETS: dict[str, dict[str, Any]] = {"v2": {name: getattr(FeedbackConfig, name) for name in V1}, "v1": V1}


class LoopPlan(NamedTuple):
    """What one loop does: epochs and first learning rate of each stage, and whether cross-attention is on."""

    loop: int
    text_epochs: int
    image_epochs: int
    text_lr: float
    image_lr: float
    cross_attention: bool


def plan_loops(config: FeedbackConfig) -> list[LoopPlan]:
    """The loops that a run asks for; `UserError` for numbers that make none."""
    count, start = config.num_feedback_loops, config.cross_attn_start_loop
    if not 1 <= count <= MOST_LOOPS:
        raise UserError(f"--num_feedback_loops {count}: takes 1 to {MOST_LOOPS}")
    if not 1 <= start <= count:
        raise UserError(f"--cross_attn_start_loop {start}: takes 1 to {count}, the number of loops")
    if not 0 < config.epochs_decay_rate <= 1:
        raise UserError(f"--epochs_decay_rate {config.epochs_decay_rate}: takes more than 0, and at most 1")
    if not 0 < config.lr_decay_per_loop <= 1:
        raise UserError(f"--lr_decay_per_loop {config.lr_decay_per_loop}: takes more than 0, and at most 1")
    if not 0 <= config.val_fraction < 1:
        raise UserError(f"--val_fraction {config.val_fraction}: takes 0 to below 1")
    text = epochs_of_loops("text", config.text_epochs_per_loop, config)
    image = epochs_of_loops("image", config.image_epochs_per_loop, config)
    on = config.cross_attention().on
    return [
        LoopPlan(
            loop,
            text[loop - 1],
            image[loop - 1],
            config.text_lr * config.lr_decay_per_loop ** (loop - 1),
            config.image_lr * config.lr_decay_per_loop ** (loop - 1),
            on and loop >= start,
        )
        for loop in range(1, count + 1)
    ]


def epochs_of_loops(side: str, epochs: tuple[int, ...], config: FeedbackConfig) -> list[int]:
    """Epochs of each loop: as given, or floor(first x decay^(k-1)), at least 1."""
    count = config.num_feedback_loops
    if len(epochs) == 1:
        # A product such as 10 * 0.1 ** 1 may fall a hair below the whole number that is meant.
        decayed = (epochs[0] * config.epochs_decay_rate**loop for loop in range(count))
        return [max(1, math.floor(value + 1e-9)) for value in decayed]
    if len(epochs) < count:
        given = " ".join(map(str, epochs))
        raise UserError(
            f"--{side}_epochs_per_loop {given} covers {len(epochs)} loops, {count} are asked for"
            f"{' (these are the preset v1 epochs)' if epochs == PRESETS['v1'][f'{side}_epochs_per_loop'] else ''}; "
            "give one number, which decays, or one for each loop"
        )
    return list(epochs[:count])


def plan_table(plan: list[LoopPlan]) -> str:
    """The plan as a table for the log."""
    rows = [
        [
            str(loop.loop),
            str(loop.text_epochs),
            str(loop.image_epochs),
            f"{loop.text_lr:.3g}",
            f"{loop.image_lr:.3g}",
            "on" if loop.cross_attention else "off",
        ]
        for loop in plan
    ]
    return format_table(["Loop", "Text epochs", "Image epochs", "Text lr", "Image lr", "Cross-attention"], rows)
