"""Pre-train the toy CLIP on drawn image-caption pairs (docs/toy_world.md) and write it as an open_clip model folder."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from engine.toy_clip import PretrainConfig, pretrain_toy_clip
from utils.cli import Parser, positive_int, run_script
from utils.logging import set_up_logging


def parse_arguments() -> argparse.Namespace:
    """The command line, defaults from PretrainConfig."""
    default = PretrainConfig()
    parser = Parser(description=__doc__)
    what = parser.add_argument_group("what is learned")
    what.add_argument("--drawings", type=positive_int, default=default.drawings, help="image-caption pairs to draw")
    what.add_argument("--epochs", type=positive_int, default=default.epochs, help="passes over the drawings")
    what.add_argument(
        "--patch_dropout", type=float, default=default.patch_dropout, help="share of patches left out in the first half"
    )
    what.add_argument(
        "--last_patch_dropout",
        type=float,
        default=default.last_patch_dropout,
        help="what that share falls to at the end",
    )
    what.add_argument(
        "--careful_epochs",
        type=int,
        default=default.careful_epochs,
        help="epochs whose captions mention damage only where there is some",
    )
    what.add_argument(
        "--batch_size", type=positive_int, default=default.batch_size, help="pairs contrasted with one another"
    )
    what.add_argument("--lr", type=float, default=default.lr, help="highest learning rate (warm-up, then cosine)")
    what.add_argument("--seed", type=int, default=default.seed, help="seed of drawings, weights and order")
    where = parser.add_argument_group("where")
    where.add_argument("--output", type=Path, default=Path("ckpt/toy_clip"), help="folder of the exported model")
    where.add_argument("--work", type=Path, default=Path("runs/toy_clip"), help="folder of drawings and training state")
    where.add_argument("--device", default="cpu", help="torch device")
    where.add_argument("--threads", type=positive_int, default=None, help="CPU threads of torch (default: all)")
    return parser.parse_args()


def main() -> None:
    """Declare arguments, set up the log, pre-train."""
    args = parse_arguments()
    set_up_logging(args.output / "pretrain.log")
    if args.threads:
        torch.set_num_threads(args.threads)
    config = PretrainConfig(
        drawings=args.drawings,
        epochs=args.epochs,
        patch_dropout=args.patch_dropout,
        last_patch_dropout=args.last_patch_dropout,
        careful_epochs=args.careful_epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
    )
    pretrain_toy_clip(config, args.output, args.work, args.device)


if __name__ == "__main__":
    run_script(main)
