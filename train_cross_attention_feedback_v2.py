"""Train with feedback: N loops of text and image training on one persistent model, each loop on what the last learned.

A preset gives the defaults of the arguments marked with v2 and v1; arguments that are given win.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.training.feedback import train_feedback
from engine.training.feedback_arguments import PRESETS, FeedbackConfig
from utils.cli import (
    Parser,
    add_base_arguments,
    add_cross_attention_arguments,
    add_rate_arguments,
    add_shared_arguments,
    count,
    positive_int,
    rate,
    run_script,
)
from utils.logging import set_up_logging


def build_parser() -> Parser:
    # An argument without a default below is left out of the namespace, so that the preset can tell what was given.
    parser = Parser(description=__doc__, argument_default=argparse.SUPPRESS)
    add_shared_arguments(parser)
    group = parser.add_argument_group("feedback")
    group.add_argument("--preset", choices=sorted(PRESETS, reverse=True), help="defaults of the arguments so marked")
    group.add_argument("--num_feedback_loops", type=int, help="loops of Stage 1 and Stage 2, 1 to 10")
    group.add_argument(
        "--text_epochs_per_loop", type=positive_int, nargs="+", help="of loop 1, which decays, or one for each loop"
    )
    group.add_argument(
        "--image_epochs_per_loop", type=positive_int, nargs="+", help="of loop 1, which decays, or one for each loop"
    )
    group.add_argument("--epochs_decay_rate", type=rate, help="epochs of loop k are floor(first x rate^(k-1)), >= 1")
    group.add_argument("--cross_attn_start_loop", type=int, help="both cross-attentions are off in the loops before")
    group.add_argument(
        "--feedback_features",
        choices=("branch", "projectors"),
        help="what Stage 1 sees from loop 2 on: the trained image branch, or its projectors on frozen tokens",
    )
    group.add_argument("--init_from", type=Path, help="checkpoint to take all components from, in place of a base")
    group.add_argument("--eval_dataset", help="dataset to test on after each loop; not for choosing one")
    group.add_argument("--val_fraction", type=rate, help="share of the training images held out to choose a loop by")
    group = parser.add_argument_group("schedule")
    add_rate_arguments(group, " in loop 1")
    group.add_argument("--lr_decay_per_loop", type=rate, help="factor of both rates from loop to loop")
    group.add_argument(
        "--lr_schedule",
        choices=("cosine", "multistep", "constant"),
        help="in each loop: warm-up then cosine to 0; or the image rate halved at 50 %% and 80 %%; or constant",
    )
    group.add_argument("--warmup_epochs", type=count, help="of cosine, at most half the stage")
    group.add_argument("--grad_clip", type=rate, help="largest norm of the gradient; 0 is off")
    group.add_argument("--optimizer", choices=("adam", "adamw"), help="betas 0.5, 0.999 (adam) or 0.9, 0.999 (adamw)")
    group.add_argument(
        "--weight_decay",
        type=rate,
        help="of the optimizer (default: 0.01 for adamw, 0 for adam)",
    )
    group.add_argument(
        "--reset_optimizers",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="forget the optimizers' moments at the start of each loop, as earlier code did",
    )
    add_cross_attention_arguments(parser)
    add_base_arguments(parser)
    left_out = {*PRESETS["v2"], "weight_decay"}
    parser.set_defaults(**{name: value for name, value in vars(FeedbackConfig()).items() if name not in left_out})
    name_preset_values(parser)
    return parser


def name_preset_values(parser: Parser) -> None:
    """Name both presets' values in the help of the arguments that a preset decides."""
    for action in parser._actions:
        if action.dest in PRESETS["v2"]:
            shown = {name: values[action.dest] for name, values in PRESETS.items()}
            texts = {
                name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in shown.items()
            }
            action.help = f"{action.help} (v2: {texts['v2']}, v1: {texts['v1']})"


def main(arguments: Sequence[str] | None = None) -> None:
    config = FeedbackConfig.from_namespace(build_parser().parse_args(arguments))
    set_up_logging()
    train_feedback(config)


if __name__ == "__main__":
    run_script(main)
