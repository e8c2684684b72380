"""Train with feedback: N loops of text and image training on one persistent model, each on what the last learned."""

from __future__ import annotations

from collections.abc import Sequence

from engine.cli.checks import check_training
from engine.config.common import make_parser
from engine.config.feedback import FeedbackConfig
from engine.data.run_location import forward_of_older_run
from engine.training.advice import LESS_MEMORY
from utils.cli import Parser
from utils.logging import set_up_logging
from utils.script import run_script


def build_parser() -> Parser:
    return make_parser(FeedbackConfig, __doc__)


def main(arguments: Sequence[str] | None = None, **defaults: object) -> None:
    """Parse and train; defaults: of arguments, where the command line names no preset and does not give them."""
    given = vars(build_parser().parse_args(arguments))
    older = forward_of_older_run(FeedbackConfig, given)
    config = FeedbackConfig.of(**{**older, **({} if "preset" in given else defaults), **given})
    set_up_logging()
    check_training(config)
    # torch takes seconds: arguments come first
    from engine.training.feedback import train_feedback

    train_feedback(config)


if __name__ == "__main__":
    run_script(main, LESS_MEMORY, shared=True)
