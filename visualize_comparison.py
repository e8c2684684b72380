"""Show anomalous images of a class as the base, cross-attention and a feedback loop see them, side by side."""

from __future__ import annotations

from pathlib import Path

from engine.evaluation.side_by_side import run_visualization
from utils.cli import Parser, positive_int, run_script
from utils.logging import set_up_logging


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("images")
    group.add_argument("--dataset", help="catalog name or folder; None is the one trained on")
    group.add_argument("--class_name", required=True, help="class of the dataset")
    group.add_argument("--image_idx", nargs="+", default=["0"], help="among the class's anomalous images, or all")
    group.add_argument("--worst", type=positive_int, help="the N that the last of the models gives the lowest scores")
    group.add_argument("--list_images", action="store_true", help="list the class's anomalous images, and stop")
    group.add_argument("--data_root", type=Path, help="folder of the datasets; None is $ANOMALY_DATA_ROOT, then data")
    group.add_argument("--metadata", type=Path, help="JSON lines made elsewhere")
    group.add_argument("--class_names", type=Path, help='JSON file {"class": "readable name"} for the prompts')
    group = parser.add_argument_group("models")
    group.add_argument("--base_path", type=Path, help="folder or image checkpoint of a base run")
    group.add_argument("--cross_path", type=Path, help="folder or image checkpoint of a cross-attention run")
    group.add_argument("--feedback_path", type=Path, help="folder of a feedback run")
    group.add_argument("--feedback_loop", type=positive_int, help="loop of it; None is the last")
    group.add_argument("--attention", action="store_true", help="add what the cross-attentions look at")
    group.add_argument("--clip_weights", help="weights file; None is the one trained with, then the hub")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument("--output_dir", type=Path, help="folder of the pictures; None is results/visualize")
    return parser


def main() -> None:
    arguments = vars(build_parser().parse_args())
    set_up_logging()
    run_visualization(arguments)


if __name__ == "__main__":
    run_script(main)
