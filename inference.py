"""Evaluate checkpoints on a dataset, zero-shot, score images that belong to none, or find thresholds to decide by."""

from __future__ import annotations

from utils.script import importing, run_script

from engine.cli.checks import check_testing
from engine.config.common import make_parser
from engine.config.evaluation import DEFAULT_CLASS, LESS_MEMORY, REFERENCES, InferenceArguments
from utils.cli import Parser
from utils.logging import set_up_logging
from utils.processes import check_alone

# Arguments that say which images, where these belong to no dataset.
OWN_IMAGES = (
    "image",
    "calibrate",
    "false_alarms",
    "calibration",
    "normal",
    "anomalous",
    "class_name",
    "class_from_folder",
    "domain",
)
# What changes nothing where images are scored one by one.
NOT_OF_IMAGES = (
    "dataset",
    "data_root",
    "metadata",
    "mask_threshold",
    "batch_size",
    "num_workers",
    "cache_images",
    "precision",
    "tf32",
    "compile",
    "skip_bad_images",
    "visualize",
)


def build_parser() -> Parser:
    return make_parser(InferenceArguments, __doc__)


def main() -> None:
    arguments = InferenceArguments.of(**vars(build_parser().parse_args()))
    set_up_logging()
    mode = arguments.mode()
    if mode == "image":
        check_alone("--image")
    check_testing(arguments)
    # torch takes seconds: arguments come first
    with importing():
        from engine.detector.references import ReferenceChoice
        from engine.evaluation.calibrate import calibrate_images
        from engine.evaluation.inference import TwoFolders, evaluate_checkpoints
        from engine.evaluation.own_images import score_images

    values = {name: value for name, value in vars(arguments).items() if name not in (*OWN_IMAGES, *REFERENCES)}
    values["references"] = ReferenceChoice.of(arguments)
    if mode in ("image", "calibrate"):
        own = ("class_name", "class_from_folder", "domain", "calibration")
        values = {name: value for name, value in values.items() if name not in NOT_OF_IMAGES}
        values |= {name: getattr(arguments, name) for name in own}
        if mode == "image":
            score_images(image=arguments.image, **values)
        else:
            values.pop("output_dir")
            calibrate_images(calibrate=arguments.calibrate, false_alarms=arguments.false_alarms, **values)
    elif mode == "two folders":
        class_name = DEFAULT_CLASS if arguments.class_name is None else arguments.class_name
        folders = TwoFolders(arguments.normal, arguments.anomalous, class_name, arguments.domain)
        evaluate_checkpoints(**values, two_folders=folders)
    else:
        evaluate_checkpoints(**values)


if __name__ == "__main__":
    run_script(main, LESS_MEMORY, shared=True)
