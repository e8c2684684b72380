"""Evaluate checkpoints on a dataset, zero-shot, or score pictures that belong to no dataset."""

from __future__ import annotations

from pathlib import Path

from engine.evaluation.image_heatmaps import ALL
from engine.evaluation.inference import evaluate_checkpoints, score_pictures
from model.config import TEXT_CONDITIONINGS, TEXT_CONTEXTS
from utils.cli import Parser, add_data_arguments, add_model_arguments, add_run_arguments, positive_int, run_script
from utils.errors import UserError
from utils.logging import set_up_logging


def all_or_number(text: str) -> str | int:
    """The word all, or a positive number."""
    return text if text == ALL else positive_int(text)


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("what to evaluate")
    group.add_argument(
        "--checkpoint", required=True, help="file, folder (all its epochs, in order), or none for unadapted CLIP"
    )
    group.add_argument("--image", type=Path, help="picture, or folder of pictures, to score in place of a dataset")
    group.add_argument("--class_name", default="object", help='what the pictures show, such as "metal screw"')
    group.add_argument(
        "--domain", choices=("industrial", "medical"), default="industrial", help="how pictures are scored"
    )
    group.add_argument("--batch_size", type=positive_int, default=8, help="images per forward")
    group.add_argument(
        "--visualize", nargs="?", const=ALL, type=all_or_number, metavar="N",
        help="draw every image with its heatmap, or N of each class; of several checkpoints, as the last sees them",
    )  # fmt: skip
    group.add_argument("--output_dir", type=Path, help="folder of the results; None is results beside the checkpoint")
    group = parser.add_argument_group("cross-attention", "None tests what was trained; anything else is logged")
    group.add_argument("--text_conditioning", choices=TEXT_CONDITIONINGS, help="whether anchors see the image")
    group.add_argument("--text_context", choices=TEXT_CONTEXTS, help="image features that they see")
    add_data_arguments(parser, "dataset to test on; None is the one trained on, which is not zero-shot")
    add_model_arguments(parser)
    add_run_arguments(parser)
    return parser


def main() -> None:
    arguments = vars(build_parser().parse_args())
    set_up_logging()
    image, class_name, domain = (arguments.pop(name) for name in ("image", "class_name", "domain"))
    if image is None:
        evaluate_checkpoints(arguments.pop("checkpoint"), arguments.pop("dataset"), **arguments)
        return
    if arguments["dataset"] is not None:
        raise UserError("--image scores pictures that belong to no dataset: leave --dataset out")
    if arguments.pop("visualize") is not None:
        raise UserError("--image draws a heatmap over each picture as it is: leave --visualize out")
    unused = ("dataset", "data_root", "metadata", "class_names", "batch_size", "num_workers", "precision")
    rest = {name: value for name, value in arguments.items() if name not in unused}
    score_pictures(rest.pop("checkpoint"), image, class_name, domain=domain, **rest)


if __name__ == "__main__":
    run_script(main)
