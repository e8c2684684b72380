"""Evaluate checkpoints on a dataset, zero-shot, or score images that belong to no dataset."""

from __future__ import annotations

from utils.script import run_script

from dataset.options import NAMES
from engine.arguments import make_parser
from engine.evaluation.arguments import LESS_MEMORY, InferenceArguments
from engine.evaluation.inference import evaluate_checkpoints, score_images
from utils.cli import Parser
from utils.errors import UserError
from utils.logging import set_up_logging


def build_parser() -> Parser:
    return make_parser(InferenceArguments, __doc__)


def main() -> None:
    arguments = dict(vars(InferenceArguments.of(**vars(build_parser().parse_args()))))
    set_up_logging()
    image, class_name, domain = (arguments.pop(name) for name in ("image", "class_name", "domain"))
    if image is None:
        evaluate_checkpoints(arguments.pop("checkpoint"), arguments.pop("dataset"), **arguments)
        return
    if arguments["dataset"] is not None:
        raise UserError("--image scores images that belong to no dataset: leave --dataset out")
    if arguments.pop("visualize") is not None:
        raise UserError("--image draws a heatmap over each image as it is: leave --visualize out")
    if arguments["class_names"] not in (None, *NAMES):
        raise UserError("--image takes the class's name by --class_name: --class_names FILE is for a dataset")
    unused = ("dataset", "data_root", "metadata", "mask_threshold", "batch_size", "num_workers", "precision")
    rest = {name: value for name, value in arguments.items() if name not in unused}
    score_images(rest.pop("checkpoint"), image, class_name, domain=domain, **rest)


if __name__ == "__main__":
    run_script(main, LESS_MEMORY)
