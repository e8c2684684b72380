"""Compare the loops of a feedback run on a dataset, zero-shot, with each other and with the runs it should beat."""

from __future__ import annotations

from pathlib import Path

from engine.report.compare_loops import compare_feedback_loops
from utils.cli import Parser, add_data_arguments, add_model_arguments, add_run_arguments, positive_int, run_script
from utils.logging import set_up_logging


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("what to compare")
    group.add_argument(
        "--save_path", type=Path, required=True, help="folder of the feedback run, with its loop_*_final.pth"
    )
    group.add_argument("--base_path", type=Path, help="folder or image checkpoint of a base run")
    group.add_argument("--cross_path", type=Path, help="folder or image checkpoint of a cross-attention run")
    group.add_argument("--unadapted", action="store_true", help="evaluate unadapted CLIP as well")
    group.add_argument("--report", action="store_true", help="also write report.html: all of it on one page")
    group.add_argument("--batch_size", type=positive_int, default=8, help="images per forward")
    group.add_argument("--output_dir", type=Path, help="folder of the results; None is the save path")
    add_data_arguments(parser, "dataset to test on, other than the one trained on")
    add_model_arguments(parser)
    add_run_arguments(parser)
    return parser


def main() -> int:
    arguments = vars(build_parser().parse_args())
    set_up_logging()
    return compare_feedback_loops(**arguments)


if __name__ == "__main__":
    run_script(main)
