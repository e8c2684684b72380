"""Test whether cross-attention preserves the image adapter's gradient in length and direction (not a pytest module).

Without --checkpoint, the toy model with new adapters is tested, with the cross-attention of train_cross_attention.py.
The exit status is 1 for [CAUTION], a ratio outside 0.8 to 1.25 or a cosine below 0.95, unless --allow is given.
"""

from __future__ import annotations

from engine.cli.checks import check_data, check_there
from engine.config.common import make_parser
from engine.config.gradients import GradientTest
from utils.cli import Parser
from utils.logging import set_up_logging
from utils.script import run_script


def build_parser() -> Parser:
    return make_parser(GradientTest, __doc__)


def main() -> int:
    # The preset's values are not options, so that options can be told from them.
    test = GradientTest(**vars(build_parser().parse_args()))
    set_up_logging()
    check_there(test.checkpoint)
    check_data(test.dataset, test.data_root, {}, False)
    # torch takes seconds
    from engine.training.gradients import run_gradient_test

    return run_gradient_test(test)


if __name__ == "__main__":
    run_script(main, "a smaller --batch_size or --img_size")
