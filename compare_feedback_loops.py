"""Compare the loops of a feedback run on a dataset, zero-shot, with each other and with the runs it should beat."""

from __future__ import annotations

from engine.cli.checks import check_testing
from engine.config.common import make_parser
from engine.config.evaluation import LESS_MEMORY, ComparisonArguments
from utils.cli import Parser
from utils.logging import set_up_logging
from utils.script import run_script


def build_parser() -> Parser:
    return make_parser(ComparisonArguments, __doc__)


def main() -> int:
    arguments = ComparisonArguments.of(**vars(build_parser().parse_args()))
    set_up_logging()
    check_testing(arguments)
    # torch takes seconds: arguments come first
    from engine.report.compare import compare_feedback_loops

    return compare_feedback_loops(arguments)


if __name__ == "__main__":
    run_script(main, LESS_MEMORY, shared=True)
