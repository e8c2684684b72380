"""Train bidirectional cross-attention on top of a trained base: text sees image patches, the image sees words."""

from __future__ import annotations

from pathlib import Path

from engine.cross_attention import CrossAttentionRunConfig, train_cross_attention
from utils.cli import (
    Parser,
    add_adapter_arguments,
    add_cross_attention_arguments,
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
    add_cross_attention_arguments(parser)
    group = parser.add_argument_group("base")
    group.add_argument("--load_base_text_adapter", type=Path, help="text_adapter.pth of a trained base")
    group.add_argument("--load_base_image_adapter", type=Path, help="image_adapter.pth of a trained base")
    group.add_argument("--reset_base_optimizer", action="store_true", help="leave the base's optimizer moments behind")
    group.add_argument("--allow_partial_base", action="store_true", help="start from one trained side only")
    group.add_argument("--freeze_base", action="store_true", help="train the cross-attentions only")
    add_data_arguments(parser, "dataset to train on: a catalog name, or a folder in MVTec's layout")
    add_training_arguments(parser)
    add_run_arguments(parser)
    add_output_arguments(parser)
    parser.set_defaults(**vars(CrossAttentionRunConfig()))
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    set_up_logging()
    train_cross_attention(CrossAttentionRunConfig.from_namespace(arguments))


if __name__ == "__main__":
    run_script(main)
