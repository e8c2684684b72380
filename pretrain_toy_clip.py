"""Pre-train the toy CLIP on drawn image-caption pairs (docs/toy_world.md) and write it as an open_clip model folder."""

from __future__ import annotations

from dataset.toy.options import PretrainArguments
from utils.arguments import make_parser
from utils.cli import Parser
from utils.logging import set_up_logging
from utils.script import run_script


def build_parser() -> Parser:
    return make_parser(PretrainArguments, __doc__)


def main() -> None:
    arguments = PretrainArguments.of(**vars(build_parser().parse_args()))
    set_up_logging()
    # torch takes seconds: arguments come first
    import torch

    from dataset.toy.pretraining import pretrain_toy_clip
    from engine.runtime.device import check_device

    device = check_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pretrain_toy_clip(arguments, device)


if __name__ == "__main__":
    run_script(main)
