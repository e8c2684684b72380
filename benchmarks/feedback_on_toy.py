"""Feedback on the toy world over several seeds: V2 and V1 against a base, and cross-attention, trained as long.

Every arm takes V2's number of optimizer steps, from the same trained base or from scratch, with the toy world's
learning rates where it does not say otherwise; "base continued" and "cross-attention" are those of
`cross_attention_on_toy`. V1's arms change one thing at a time. An arm that is trained is not trained again; `--arms`
and `--seeds` let several processes share the work.
"""

from __future__ import annotations

from utils.script import run_script

import argparse
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.arms import SHORT, Arm, add_short_argument, arms_table, test_arms, train_arms
from benchmarks.cross_attention_on_toy import make_arm as cross_attention_arm
from benchmarks.cross_attention_on_toy import trained_base
from engine.demo import CONFIG
from engine.run_folder import FINAL_FILE
from engine.training.feedback import train_feedback
from engine.training.feedback_arguments import FeedbackConfig
from utils.files import write_text
from utils.logging import set_up_logging

LOOPS = {"text_epochs_per_loop": (2, 1, 1), "image_epochs_per_loop": (4, 3, 2), "num_feedback_loops": 3}
ONE_LOOP = {"text_epochs_per_loop": (4,), "image_epochs_per_loop": (9,), "num_feedback_loops": 1}
OFF = {"text_cross_attn_weight": 0.0, "image_cross_attn_weight": 0.0}
TOY_RATES = {"text_lr": CONFIG.text_lr, "image_lr": CONFIG.image_lr}

SMALL_WEIGHT = {"text_cross_attn_weight": 0.1, "image_cross_attn_weight": 0.1}


class Recipe(NamedTuple):
    """A preset and what differs from it."""

    preset: str
    changes: Mapping[str, Any] = MappingProxyType({})
    from_base: bool = True


RECIPES = {
    "V2's recipe, one loop, no cross-attention": Recipe("v2", {**ONE_LOOP, **OFF}),
    "V2's recipe, one loop": Recipe("v2", ONE_LOOP),
    "feedback V2": Recipe("v2"),
    "feedback V2, no cross-attention": Recipe("v2", OFF),
    "feedback V2, projectors": Recipe("v2", {"feedback_features": "projectors"}),
    "feedback V1": Recipe("v1_original"),
    "scratch: V2": Recipe("v2", {}, False),
    "scratch: base": Recipe("v2", {**ONE_LOOP, **OFF, "optimizer": "adam", "lr_schedule": "constant"}, False),
    "scratch: V1": Recipe("v1_original", {}, False),
    "scratch: V1, published rates": Recipe("v1_original", {"text_lr": 1e-5, "image_lr": 5e-4}, False),
    "scratch: V1, weight 0.1": Recipe("v1_original", SMALL_WEIGHT, False),
    "scratch: V1, unit context": Recipe("v1_original", {"context_norm": "unit"}, False),
    "scratch: V1, optimizers kept": Recipe("v1_original", {"reset_optimizers": False}, False),
    "scratch: V1, decay 0.8": Recipe("v1_original", {"lr_decay_per_loop": 0.8}, False),
}
FROM_CROSS_ATTENTION = ("base continued", "cross-attention")
ARMS = (*FROM_CROSS_ATTENTION, *RECIPES)


def make_arm(name: str, arguments: argparse.Namespace) -> Arm:
    """One of `ARMS`."""
    if name in FROM_CROSS_ATTENTION:
        return cross_attention_arm(name, arguments.base_path, arguments.cross_path, arguments.short)
    folder = arguments.save_path / re.sub(r"[^\w.]+", "_", name)
    return Arm(name, partial(train_arm, arguments.base_path, RECIPES[name], arguments.short), FINAL_FILE, folder)


def train_arm(base_path: Path, recipe: Recipe, short: bool, seed: int, folder: Path) -> None:
    """Train one arm, from this seed's base or from scratch."""
    preset, changes, from_base = recipe
    common = {key: value for key, value in vars(CONFIG).items() if key not in ("text_epoch", "image_epoch")}
    base = trained_base(base_path, seed, short) if from_base else {}
    asked = {**common, **LOOPS, **TOY_RATES, **base, **changes}
    if short:
        one_each = {name: (1,) * len(asked[name]) for name in ("text_epochs_per_loop", "image_epochs_per_loop")}
        asked |= {**SHORT, **one_each}
    train_feedback(FeedbackConfig.of(preset=preset, **{**asked, "seed": seed, "save_path": folder, "num_workers": 0}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one training run each")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="which to train")
    parser.add_argument("--train_only", action="store_true", help="leave the table to another process")
    parser.add_argument("--base_path", type=Path, default=Path("runs/base_on_toy"), help="bases, a folder per seed")
    parser.add_argument(
        "--cross_path", type=Path, default=Path("runs/cross_attention_on_toy"), help="runs of cross_attention_on_toy"
    )
    parser.add_argument("--save_path", type=Path, default=Path("runs/feedback_on_toy"), help="a folder per run")
    add_short_argument(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arms = [make_arm(name, arguments) for name in arguments.arms]
    train_arms(arms, arguments.seeds)
    if arguments.train_only:
        return
    set_up_logging()
    table = arms_table(test_arms(arms, arguments.seeds, arguments.short), arguments.seeds, arguments.arms[0])
    write_text(arguments.save_path / "table.md", table)
    print(table)


if __name__ == "__main__":
    run_script(main)
