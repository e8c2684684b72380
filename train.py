"""Train the base method: text adapters (Stage 1), then image adapters (Stage 2), on a frozen CLIP."""

from __future__ import annotations

from engine.training.arguments import BaseConfig
from engine.training.base import train_base
from utils.cli import Parser, add_epoch_arguments, add_shared_arguments, run_script
from utils.logging import set_up_logging


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_shared_arguments(parser)
    add_epoch_arguments(parser)
    parser.set_defaults(**vars(BaseConfig()))
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    set_up_logging()
    train_base(BaseConfig.from_namespace(arguments))


if __name__ == "__main__":
    run_script(main)
