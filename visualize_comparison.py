"""Show anomalous images of a class as the base, cross-attention and a feedback loop see them, side by side."""

from __future__ import annotations

from engine.cli.checks import check_testing
from engine.config.common import make_parser
from engine.config.evaluation import VisualizationArguments
from utils.cli import Parser
from utils.logging import set_up_logging
from utils.script import run_script


def build_parser() -> Parser:
    return make_parser(VisualizationArguments, __doc__)


def main() -> None:
    arguments = VisualizationArguments.of(**vars(build_parser().parse_args()))
    set_up_logging()
    check_testing(arguments)
    # torch takes seconds: arguments come first
    from engine.evaluation.side_by_side import visualize_comparison

    visualize_comparison(arguments)


if __name__ == "__main__":
    run_script(main)
