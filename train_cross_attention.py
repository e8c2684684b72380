"""Train bidirectional cross-attention on top of a trained base: text sees image patches, the image sees words."""

from __future__ import annotations

from engine.cli.checks import check_training
from engine.config.common import make_parser
from engine.config.training import CrossAttentionRunConfig
from engine.data.run_location import forward_of_older_run
from engine.training.advice import LESS_MEMORY
from utils.cli import Parser
from utils.logging import set_up_logging
from utils.script import run_script


def build_parser() -> Parser:
    return make_parser(CrossAttentionRunConfig, __doc__)


def main() -> None:
    given = vars(build_parser().parse_args())
    config = CrossAttentionRunConfig.of(**{**forward_of_older_run(CrossAttentionRunConfig, given), **given})
    set_up_logging()
    check_training(config)
    # torch takes seconds: arguments come first
    from engine.training.cross_attention import train_cross_attention

    train_cross_attention(config)


if __name__ == "__main__":
    run_script(main, LESS_MEMORY, shared=True)
