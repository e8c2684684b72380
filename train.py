"""Train the base method: text adapters (Stage 1), then image adapters (Stage 2), on a frozen CLIP."""

from __future__ import annotations

from engine.base import train_base
from engine.config import BaseConfig
from utils.cli import (
    Parser,
    add_adapter_arguments,
    add_data_arguments,
    add_model_arguments,
    add_output_arguments,
    add_run_arguments,
    add_training_arguments,
    run_script,
)
from utils.logging import set_up_logging


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    add_adapter_arguments(parser)
    add_data_arguments(parser, "dataset to train on: a catalog name, or a folder in MVTec's layout")
    add_training_arguments(parser)
    add_run_arguments(parser)
    add_output_arguments(parser)
    parser.set_defaults(**vars(BaseConfig()))
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    set_up_logging()
    train_base(BaseConfig.from_namespace(arguments))


if __name__ == "__main__":
    run_script(main)
