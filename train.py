"""Train the base method: text adapters (Stage 1), then image adapters (Stage 2), on a frozen CLIP."""

from __future__ import annotations

from engine.cli.checks import check_training
from engine.config.common import make_parser
from engine.config.training import BaseConfig
from engine.training.advice import LESS_MEMORY
from utils.cli import Parser
from utils.logging import set_up_logging
from utils.script import run_script


def build_parser() -> Parser:
    return make_parser(BaseConfig, __doc__)


def main() -> None:
    config = BaseConfig.of(**vars(build_parser().parse_args()))
    set_up_logging()
    check_training(config)
    # torch takes seconds: arguments come first
    from engine.training.base import train_base

    train_base(config)


if __name__ == "__main__":
    run_script(main, LESS_MEMORY, shared=True)
