"""Cross-attention on the toy world over several seeds: does it beat a base that is trained on for as long?

Every arm starts from the same trained base and takes the same number of steps; one starts from scratch and takes the
base's steps too. An arm that is trained is not trained again; `--arms` and `--seeds` let several processes share it.
"""

from __future__ import annotations

from utils.script import run_script

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.arms import SHORT, Arm, add_short_argument, arms_table, test_arms, train_arms
from engine.demo import CONFIG
from engine.training.arguments import CrossAttentionRunConfig
from engine.training.base import train_base
from engine.training.cross_attention import train_cross_attention
from utils.files import write_text
from utils.logging import set_up_logging

BASE_EPOCHS = {"text_epoch": 6, "image_epoch": 12}
MORE_EPOCHS = {"text_epoch": 4, "image_epoch": 9}
ONE_EPOCH = {"text_epoch": 1, "image_epoch": 1}
CHECKPOINT = "image_adapter.pth"


def train_arm(base_path: Path, changes: dict[str, Any], short: bool, seed: int, folder: Path) -> None:
    """Train with cross-attention from this seed's base, or from scratch, with `changes` to the defaults."""
    same = {**vars(CONFIG), "seed": seed, "save_path": folder, "num_workers": 0, **(SHORT if short else {})}
    base_epochs, more_epochs = (ONE_EPOCH, ONE_EPOCH) if short else (BASE_EPOCHS, MORE_EPOCHS)
    if "from_scratch" in changes:
        epochs = {name: base_epochs[name] + more_epochs[name] for name in base_epochs}
        changes = {name: value for name, value in changes.items() if name != "from_scratch"}
        train_cross_attention(CrossAttentionRunConfig(**{**same, **epochs, **changes}))
        return
    asked = {**same, **more_epochs, **trained_base(base_path, seed, short), **changes}
    train_cross_attention(CrossAttentionRunConfig(**asked))


def trained_base(base_path: Path, seed: int, short: bool = False) -> dict[str, Path]:
    """The arguments that load a seed's base; it is trained where it is not there."""
    base = base_path / f"seed_{seed}"
    changes = {**ONE_EPOCH, **SHORT} if short else BASE_EPOCHS
    image = base / f"image_adapter_{changes['image_epoch']}.pth"
    if not image.is_file():
        train_base(replace(CONFIG, **changes, seed=seed, save_path=base, num_workers=0))
    return {"load_base_text_adapter": base / "text_adapter.pth", "load_base_image_adapter": image}


TRAINED: dict[str, dict[str, Any]] = {
    "base continued": {"text_cross_attn_weight": 0.0, "image_cross_attn_weight": 0.0},
    "cross-attention": {},
    "from scratch": {"from_scratch": True},
    "conditioning batch_mean": {"text_conditioning": "batch_mean"},
    "conditioning none": {"text_conditioning": "none"},
    "text side only": {"image_cross_attn_weight": 0.0},
    "weight 0.5": {"text_cross_attn_weight": 0.5, "image_cross_attn_weight": 0.5},
    "weight 1, raw context": {
        "text_cross_attn_weight": 1.0,
        "image_cross_attn_weight": 1.0,
        "context_norm": "none",
    },
    "no dropout": {"cross_attn_dropout": 0.0},
    "zero init": {"cross_attn_init": "zero"},
}
TESTED: dict[str, dict[str, Any]] = {
    "cross-attention, tested with trained context": {"text_context": "trained"},
    "cross-attention, tested without conditioning": {"text_conditioning": "none"},
}


def make_arm(name: str, base_path: Path, save_path: Path, short: bool = False) -> Arm:
    """One of `TRAINED`."""
    train = partial(train_arm, base_path, TRAINED[name], short)
    return Arm(name, train, CHECKPOINT, save_path / name.replace(" ", "_"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one training run each")
    parser.add_argument("--arms", nargs="+", choices=list(TRAINED), default=list(TRAINED), help="which to train")
    parser.add_argument("--train_only", action="store_true", help="leave the table to another process")
    parser.add_argument("--base_path", type=Path, default=Path("runs/base_on_toy"), help="bases, a folder per seed")
    parser.add_argument("--save_path", type=Path, default=Path("runs/cross_attention_on_toy"), help="a folder per run")
    add_short_argument(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    trained = [make_arm(name, arguments.base_path, arguments.save_path, arguments.short) for name in arguments.arms]
    train_arms(trained, arguments.seeds)
    if arguments.train_only:
        return
    set_up_logging()
    tested = [
        replace(arm, name=name, overrides=overrides)
        for arm in trained
        if arm.name == "cross-attention"
        for name, overrides in TESTED.items()
    ]
    results = test_arms([*trained, *tested], arguments.seeds, arguments.short)
    table = arms_table(results, arguments.seeds, arguments.arms[0])
    write_text(arguments.save_path / "table.md", table)
    print(table)


if __name__ == "__main__":
    run_script(main)
