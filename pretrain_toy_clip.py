"""Pre-train the toy CLIP on drawn image-caption pairs (docs/toy_world.md) and write it as an open_clip model folder."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from engine.toy_clip import PretrainConfig, pretrain_toy_clip


def parse_arguments() -> argparse.Namespace:
    """The command line, defaults from PretrainConfig."""
    default = PretrainConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_argument_group("what is learned")
    what.add_argument("--drawings", type=int, default=default.drawings, help="image-caption pairs to draw")
    what.add_argument("--epochs", type=int, default=default.epochs, help="passes over the drawings")
    what.add_argument("--patch_dropout", type=float, default=default.patch_dropout, help="share of patches left out")
    what.add_argument("--full_share", type=float, default=default.full_share, help="last share of steps, all patches")
    what.add_argument("--batch_size", type=int, default=default.batch_size, help="pairs contrasted with one another")
    what.add_argument("--lr", type=float, default=default.lr, help="highest learning rate (warm-up, then cosine)")
    what.add_argument("--seed", type=int, default=default.seed, help="seed of drawings, weights and order")
    where = parser.add_argument_group("where")
    where.add_argument("--output", type=Path, default=Path("ckpt/toy_clip"), help="folder of the exported model")
    where.add_argument("--work", type=Path, default=Path("runs/toy_clip"), help="folder of drawings and training state")
    where.add_argument("--device", default="cpu", help="torch device")
    where.add_argument("--threads", type=int, default=None, help="CPU threads of torch (default: all)")
    return parser.parse_args()


def main() -> None:
    """Declare arguments, set up the log, pre-train."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(args.output / "pretrain.log", encoding="utf-8")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    if args.threads:
        torch.set_num_threads(args.threads)
    config = PretrainConfig(
        drawings=args.drawings,
        epochs=args.epochs,
        patch_dropout=args.patch_dropout,
        full_share=args.full_share,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
    )
    pretrain_toy_clip(config, args.output, args.work, args.device)


if __name__ == "__main__":
    main()
