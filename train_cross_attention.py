"""Train bidirectional cross-attention on top of a trained base: text sees image patches, the image sees words."""

from __future__ import annotations

from engine.training.arguments import CrossAttentionRunConfig
from engine.training.cross_attention import train_cross_attention
from utils.cli import (
    Parser,
    add_base_arguments,
    add_cross_attention_arguments,
    add_epoch_arguments,
    add_shared_arguments,
    run_script,
)
from utils.logging import set_up_logging


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_shared_arguments(parser)
    add_epoch_arguments(parser)
    add_cross_attention_arguments(parser)
    add_base_arguments(parser)
    parser.set_defaults(**vars(CrossAttentionRunConfig()))
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    set_up_logging()
    train_cross_attention(CrossAttentionRunConfig.from_namespace(arguments))


if __name__ == "__main__":
    run_script(main)
