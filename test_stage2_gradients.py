"""Show whether cross-attention leaves the image adapter its gradient, in length and direction (no pytest module).

Without --checkpoint it is the toy model with fresh weights. Exit status 1 for [CAUTION]: a ratio outside 0.8 to 1.25,
or a cosine below 0.95. A larger weight than the default that a checkpoint or --preset brings along is not judged.
"""

from __future__ import annotations

import sys

from engine.cli.checks import check_data, check_there
from engine.config.common import make_parser
from engine.config.gradients import GradientTest
from utils.cli import Parser
from utils.files import check_folder
from utils.logging import set_up_logging
from utils.script import run_script


def build_parser() -> Parser:
    return make_parser(GradientTest, __doc__)


def main() -> int:
    given = vars(build_parser().parse_args())
    # What a preset decides is not what was given, so that the two can be told apart.
    test = GradientTest(**{**given, "sweep": tuple(given.get("sweep", ()))})
    set_up_logging()
    check_there(test.checkpoint)
    check_data(test.dataset, test.data_root, {}, False)
    if test.sweep:
        check_folder(test.output_dir, "--output_dir")
    # torch takes seconds
    from engine.training.gradients import Bench, component_report, gradient_report, write_sweep

    bench = Bench(test)
    sys.stdout.write(f"{bench.subject}\n")
    if test.sweep:
        measurements = [bench.measure(weight) for weight in test.sweep]
        for found in measurements:
            sys.stdout.write(f"weight {found.weight}\n{gradient_report(found)}\n\n")
        write_sweep(measurements, test.output_dir)
        sys.stdout.write(f"Written to {test.output_dir}\n")
    found = bench.measure(bench.weight)
    sys.stdout.write(gradient_report(found, bench.chosen_by, bench.matched_by) + "\n")
    if test.component:
        sys.stdout.write(component_report(bench) + "\n")
    return 0 if found.is_healthy or bench.chosen_by or bench.matched_by else 1


if __name__ == "__main__":
    run_script(main, "a smaller --batch_size or --img_size")
