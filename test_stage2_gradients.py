"""Show whether cross-attention leaves the image adapter its gradient (a script, not a pytest module).

Exit status 1 where the ratio is below 0.8.
"""

from __future__ import annotations

from utils.script import run_script

import sys
from pathlib import Path

from engine.gradients import HEALTHY_RATIO, Bench, GradientTest, component_report, ratio_report, write_sweep
from utils.cli import Parser, number
from utils.files import check_folder
from utils.logging import set_up_logging

positive_int, rate = number(int, (1, 1_000_000)), number(float, (0, 1e6))


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--model_name", help="open_clip model name, local-dir:FOLDER, or toy")
    group.add_argument("--clip_weights", help="weights file")
    group.add_argument("--activation", choices=("gelu", "quick_gelu"), help="None follows the weights")
    group.add_argument("--img_size", type=positive_int, help="pixels; None is the model's default")
    group.add_argument("--checkpoint", type=Path, help="trained adapters, of a base or with cross-attention")
    group.add_argument("--image_cross_attn_weight", type=rate, help="weight of the image side's residual")
    group.add_argument("--text_cross_attn_weight", type=rate, help="weight of the text side's residual")
    group.add_argument("--context_norm", choices=("unit", "none"), help="none is the old behaviour: raw context")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", help="catalog name, or folder in MVTec's layout")
    group.add_argument("--data_root", type=Path, help="folder of the datasets")
    group.add_argument("--batches", type=positive_int, help="batches to average over")
    group.add_argument("--batch_size", type=positive_int, help="images in each")
    group.add_argument("--seed", type=int, help="of fresh weights and of the batches")
    group.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps")
    group = parser.add_argument_group("more")
    group.add_argument("--component", action="store_true", help="list every component's gradient norm in both stages")
    group.add_argument("--sweep", type=rate, nargs="+", help="measure these weights, and write a plot and CSV")
    group.add_argument("--output_dir", type=Path, default=Path("runs/gradients"), help="folder of plot and CSV")
    parser.set_defaults(**vars(GradientTest()))
    return parser


def main() -> int:
    arguments = vars(build_parser().parse_args())
    set_up_logging()
    component, sweep, folder = (arguments.pop(name) for name in ("component", "sweep", "output_dir"))
    if sweep:
        check_folder(folder, "--output_dir")
    test = GradientTest(**arguments)
    bench = Bench(test)
    if sweep:
        measurements = [bench.measure(weight) for weight in sweep]
        for found in measurements:
            sys.stdout.write(f"weight {found.weight}\n{ratio_report(found)}\n\n")
        write_sweep(measurements, folder)
        sys.stdout.write(f"Written to {folder}\n")
    found = bench.measure(test.image_cross_attn_weight)
    sys.stdout.write(ratio_report(found) + "\n")
    if component:
        sys.stdout.write(component_report(bench) + "\n")
    return 0 if found.ratio >= HEALTHY_RATIO else 1


if __name__ == "__main__":
    run_script(main)
