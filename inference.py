"""Evaluate checkpoints on a dataset, zero-shot, score images that belong to none, or find thresholds to decide by."""

from __future__ import annotations

from engine.cli.checks import check_testing
from engine.config.common import make_parser
from engine.config.evaluation import LESS_MEMORY, InferenceArguments
from utils.cli import Parser
from utils.logging import set_up_logging
from utils.processes import check_single_process
from utils.script import run_script


def build_parser() -> Parser:
    return make_parser(InferenceArguments, __doc__)


def main() -> None:
    arguments = InferenceArguments.of(**vars(build_parser().parse_args()))
    set_up_logging()
    mode = arguments.mode()
    if mode == "image":
        check_single_process("--image")
    check_testing(arguments)
    # torch takes seconds: arguments come first
    from engine.evaluation.calibrate import calibrate_images
    from engine.evaluation.inference import evaluate_checkpoints
    from engine.evaluation.own_images import score_images

    if mode == "image":
        score_images(arguments)
    elif mode == "calibrate":
        calibrate_images(arguments)
    else:
        evaluate_checkpoints(arguments)


if __name__ == "__main__":
    run_script(main, LESS_MEMORY, shared=True)
