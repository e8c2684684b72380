"""Early checks of what users mistype: datasets, files and folders, before torch is imported, which takes seconds.

Everything is checked again where it is used.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataset.catalog import expand_groups, known_dataset
from dataset.class_names import read_class_names
from dataset.folders import find_images
from dataset.images import allow_megapixels
from dataset.locate import MissingDatasetError, locate_dataset
from dataset.prompts import NAMES
from dataset.toy.classes import TOY_DATASETS
from engine.config.evaluation import ComparisonArguments
from engine.config.tools import ExportArguments
from engine.config.training import RunConfig
from engine.detector.hub import NO_CHECKPOINT, check_checkpoint
from engine.runtime.run_folder import STATE_FILE, arguments_in, check_same_run, find_latest, find_loops
from utils.arguments import Arguments
from utils.errors import UserError
from utils.files import check_folder
from utils.paths import is_file, is_folder

STARTS = ("init_from", "load_base_text_adapter", "load_base_image_adapter")
FILES = (*STARTS, "metadata", "study")
IMAGES = ("image", "calibrate", "references", "normal", "anomalous")
RUNS = ("base_path", "cross_path")
OUTPUTS = ("save_path", "output_dir", "output", "work")


def check_files(arguments: Arguments) -> None:
    """Raise `UserError` for a dataset, file or folder in the arguments that does not exist or cannot be used."""
    values = {name: value for name, value in vars(arguments).items() if value is not None}
    if "max_megapixels" in arguments.changed():
        allow_megapixels(str(values["max_megapixels"]))
    each = [(name, one) for name, value in values.items() for one in (value if isinstance(value, tuple) else [value])]
    for name, value in each:
        if name in FILES and not is_file(value):
            raise UserError(f"--{name} {value}: no such file")
        if name == "checkpoint" and value != NO_CHECKPOINT:
            check_checkpoint(value)
        if name in IMAGES and not is_file(value) and not is_folder(value):
            find_images(value, f"--{name}")
        if name in RUNS:
            find_latest(value, f"--{name}")
        if name == "feedback_path" or (name == "save_path" and isinstance(arguments, ComparisonArguments)):
            find_loops(value)
        if name in OUTPUTS:
            check_folder(value.parent if isinstance(arguments, ExportArguments) else value, f"--{name}")
    if isinstance(arguments, RunConfig) and (arguments.save_path / STATE_FILE).is_file():
        before, now = run_arguments(arguments.save_path), arguments.signature()
        # These two may be taken from the run that is resumed or started from.
        known = before.keys() - {"class_names", *(["precision"] if arguments.precision == "auto" else [])}
        check_same_run(arguments.save_path, before, {name: now[name] for name in now if name in known})
    if "dataset" in values:
        check_dataset(arguments)
    if "eval_dataset" in values and known_dataset(values["eval_dataset"]) is None:
        locate_dataset(values["eval_dataset"])


def check_dataset(arguments: Any) -> None:
    """Raise `UserError` for an unknown dataset, or one that is not where it is expected."""
    if getattr(arguments, "class_names", None) not in (None, *NAMES):
        read_class_names(Path(arguments.class_names))
    # A toy dataset is drawn on first use, and a checkpoint or an earlier run may contain the data root.
    elsewhere = arguments.data_root is None and (
        not isinstance(arguments, RunConfig)
        or any(vars(arguments).get(name) for name in STARTS)
        or run_arguments(arguments.save_path).get("data_root")
    )
    names = [arguments.dataset] if isinstance(arguments.dataset, str) else expand_groups(arguments.dataset)
    missing: list[UserError] = []
    for name in names:
        spec = known_dataset(name)
        if spec is None or not (elsewhere or spec.name in TOY_DATASETS):
            try:
                with quiet():
                    locate_dataset(name, arguments.data_root)
            except MissingDatasetError as error:
                missing.append(error)
    if missing and len(missing) == len(names):
        raise missing[0]


def run_arguments(folder: Path) -> dict[str, Any]:
    """The arguments of the run in a folder, without a message for a damaged file."""
    with quiet():
        return arguments_in(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Log no warnings: the script itself will."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
