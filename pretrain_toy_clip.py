"""Pre-train the toy CLIP on drawn image-caption pairs (docs/toy_world.md) and write it as an open_clip model folder."""

from __future__ import annotations

import torch

from engine.arguments import make_parser
from engine.device import check_device
from engine.toy_clip import PretrainArguments, pretrain_toy_clip
from utils.cli import Parser, run_script
from utils.logging import set_up_logging


def build_parser() -> Parser:
    return make_parser(PretrainArguments, __doc__)


def main() -> None:
    arguments = PretrainArguments.of(**vars(build_parser().parse_args()))
    device = check_device(arguments.device, "fp32")
    set_up_logging(arguments.output / "pretrain.log")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pretrain_toy_clip(arguments.pretraining(), arguments.output, arguments.work, device)


if __name__ == "__main__":
    run_script(main)
