"""Arguments of the feedback script, its presets, and the plan of loops that follows from them.

A preset is in the fields' `under`. v1 is the first version as mended, both weights at 0.1; v1_original as it was; v3
is what studies on the toy world found best (docs/results.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine.config.common import decided_by
from engine.config.evaluation import TestingArguments
from engine.config.training import MOST_EPOCHS, CrossAttentionArguments, RunConfig
from model.config import DET_SCORES, LoopForward, check_settings
from utils.errors import UserError
from utils.fields import changed, setting
from utils.text import format_table

MOST_LOOPS = 10
ORDERS = ("stages", "joint")
WEIGHT_DECAY = {"adamw": 0.01, "adam": 0.0}


def presets(v1: Any, **others: Any) -> dict[str, Any]:
    """A value of V1, mended and unmended, and those of other presets."""
    return {"v1": v1, "v1_original": v1, **others}


@dataclass(frozen=True)
class FeedbackConfig(CrossAttentionArguments):
    """Arguments of `train_cross_attention_feedback_v2.py`, with V2's defaults."""

    preset: str = setting(
        "v2", "defaults of the arguments that name it", "feedback", choices=("v3", "v2", "v1", "v1_original"), free=True
    )
    num_feedback_loops: int = setting(
        5, "loops of Stage 1 and Stage 2", "feedback", between=(1, MOST_LOOPS), free=True, under=presets(3, v3=3)
    )
    text_epochs_per_loop: tuple[int, ...] = setting(
        (5,),
        "epochs of Stage 1 in loop 1, which decay, or one number for each loop",
        "feedback",
        between=(1, MOST_EPOCHS),
        several=True,
        free=True,
        under=presets((5, 3, 2), v3=(2,)),
    )
    image_epochs_per_loop: tuple[int, ...] = setting(
        (15,),
        "epochs of Stage 2 in loop 1, which decay, or one number for each loop",
        "feedback",
        between=(1, MOST_EPOCHS),
        several=True,
        free=True,
        under=presets((20, 10, 5), v3=(7,)),
    )
    epochs_decay_rate: float = setting(
        0.8,
        "r: loop k has floor(first * r^(k - 1)) epochs, at least 1",
        "feedback",
        between=(1e-6, 1),
        free=True,
        under=presets(0.5, v3=1.0),
    )
    text_cross_attn_weight: float = changed(CrossAttentionArguments, "text_cross_attn_weight", under={"v3": 0.0})
    image_cross_attn_weight: float = changed(CrossAttentionArguments, "image_cross_attn_weight", under={"v3": 1.0})
    context_norm: str = changed(CrossAttentionArguments, "context_norm", "layer")
    cross_attn_residual: str = changed(
        CrossAttentionArguments, "cross_attn_residual", "matched", under=presets("add", v3="add"), before="add"
    )
    cross_attn_init: str = changed(CrossAttentionArguments, "cross_attn_init", under={"v3": "zero"})
    cross_attn_start_loop: int = setting(
        1, "first loop with cross-attention; both are off before", "feedback", between=(1, MOST_LOOPS)
    )
    feedback_features: str = setting(
        "branch",
        "what Stage 1 sees from loop 2 on: the trained image branch, or its projectors on frozen tokens",
        "feedback",
        choices=("branch", "projectors"),
    )
    order: str = setting(
        "stages",
        "stages: Stage 1 trains the text side, then Stage 2 the image side; joint: Stage 2 trains both sides",
        "feedback",
        choices=ORDERS,
        under={"v3": "joint"},
    )
    init_from: Path | None = setting(
        None, "checkpoint to take all components from, in place of a base", "base", free=True, unset="none"
    )
    eval_dataset: str | None = setting(
        None, "dataset to test on after each loop, to watch and not to choose by", "feedback", free=True, unset="none"
    )
    det_score: str = changed(
        TestingArguments,
        "det_score",
        DET_SCORES[0],
        unset=None,
        group="feedback",
        help="in the image scores of these tests: likeness to the abnormal anchor, or its difference from that to the "
        "normal one",
    )
    val_fraction: float = setting(
        0.0, "share of the training images held out to choose a loop by", "feedback", between=(0, 0.99)
    )
    text_lr: float = changed(
        RunConfig, "text_lr", 2e-5, help="learning rate of Stage 1 in loop 1", under=presets(1e-5, v3=1e-5)
    )
    image_lr: float = changed(
        RunConfig, "image_lr", 5e-3, help="learning rate of Stage 2 in loop 1", under=presets(5e-4, v3=5e-4)
    )
    lr_decay_per_loop: float = setting(
        0.8, "factor of both rates from loop to loop", "schedule", between=(1e-6, 1), under=presets(0.5, v3=1.0)
    )
    lr_schedule: str = setting(
        "cosine",
        "in each loop: warm-up then cosine to 0; the image rate halved at 50 % and 80 %; or constant",
        "schedule",
        choices=("cosine", "multistep", "constant"),
        under=presets("multistep", v3="constant"),
    )
    warmup_epochs: int = setting(
        2,
        "epochs of warm-up of cosine, at most half the stage",
        "schedule",
        between=(0, MOST_EPOCHS),
        under=presets(0, v3=0),
    )
    grad_clip: float = setting(
        1.0, "largest norm of the gradient; 0 is off", "schedule", between=(0, 1e6), under=presets(0.0, v3=0.0)
    )
    optimizer: str = setting(
        "adamw",
        "betas 0.9, 0.999 (adamw) or 0.5, 0.999 (adam)",
        "schedule",
        choices=("adam", "adamw"),
        under=presets("adam", v3="adam"),
    )
    weight_decay: float = setting(
        WEIGHT_DECAY["adamw"], "weight decay of the optimizer; 0 for adam unless given", "schedule", between=(0, 10)
    )
    reset_optimizers: bool = setting(
        False,
        "forget the optimizers' moments at the start of each loop, as earlier code did",
        "schedule",
        under=presets(True),
    )
    save_path: Path = changed(RunConfig, "save_path", Path("ckpt/feedback"))

    @classmethod
    def of(cls, **given: Any) -> FeedbackConfig:
        """As `Arguments.of`; the weight decay follows the optimizer unless it is given."""
        optimizer = super().of(**given).optimizer
        return super().of(**{"weight_decay": WEIGHT_DECAY.get(optimizer, 0.0), **given})

    def check_processes(self, processes: int) -> None:
        super().check_processes(processes)
        if processes == 1 or self.order == "stages":
            return
        if self.text_cross_attn_weight:
            raise UserError(
                "--order joint with text cross-attention trains in one process: leave accelerate launch out, or give "
                "--text_cross_attn_weight 0"
            )


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
    check_settings(config)
    if not 1 <= start <= count:
        raise UserError(f"--cross_attn_start_loop {start}: takes 1 to {count}, the number of loops")
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
        of_preset = decided_by(FeedbackConfig, config.preset).get(f"{side}_epochs_per_loop")
        whose = f" (those of --preset {config.preset})" if epochs == of_preset else ""
        raise UserError(
            f"--{side}_epochs_per_loop {given}{whose} covers {len(epochs)} loops, {count} are asked for; "
            "give one number, which decays, or one for each loop"
        )
    return list(epochs[:count])


def loop_forward(config: FeedbackConfig, loop: int) -> LoopForward:
    """A loop's choices for the forward: from loop 2 on, Stage 1 sees the trained image branch."""
    later = {"branch": "trained", "projectors": "projectors"}[config.feedback_features]
    return LoopForward("frozen" if loop == 1 else later, loop >= config.cross_attn_start_loop)


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
