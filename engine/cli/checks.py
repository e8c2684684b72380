"""Early checks of what users mistype: datasets, files and folders, before torch is imported, which takes seconds.

Everything is checked again where it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataset.class_names import read_class_names
from dataset.folders import find_images
from dataset.locate import known_dataset, locate_dataset
from dataset.prompts import NAMES
from dataset.toy.classes import TOY_DATASETS
from engine.config.evaluation import ComparisonArguments
from engine.config.tools import ExportArguments
from engine.config.training import RunConfig
from engine.data.run_location import arguments_in
from engine.detector.hub import NO_CHECKPOINT, check_checkpoint
from engine.runtime.run_folder import STATE_FILE, check_same_run, find_latest, find_loops
from utils.arguments import Arguments
from utils.errors import UserError
from utils.files import check_folder
from utils.paths import is_file, is_folder

STARTS = ("init_from", "load_base_text_adapter", "load_base_image_adapter")
FILES = (*STARTS, "metadata", "study")
IMAGES = ("image", "calibrate", "references", "normal", "anomalous")
RUNS = ("base_path", "cross_path")


def check_files(arguments: Arguments) -> None:
    """Raise `UserError` for a dataset, file or folder in the arguments that does not exist or cannot be used."""
    values = vars(arguments)
    for name in FILES:
        if values.get(name) is not None and not is_file(values[name]):
            raise UserError(f"--{name} {values[name]}: no such file")
    checkpoints = values.get("checkpoint") or ()
    for checkpoint in (checkpoints,) if isinstance(checkpoints, (str, Path)) else checkpoints:
        if checkpoint != NO_CHECKPOINT:
            check_checkpoint(checkpoint)
    for name in IMAGES:
        path = values.get(name)
        if path is not None and not is_file(path) and not is_folder(path):
            find_images(path, f"--{name}")
    for name in RUNS:
        if values.get(name) is not None:
            find_latest(values[name], f"--{name}")
    loops = values["save_path"] if isinstance(arguments, ComparisonArguments) else values.get("feedback_path")
    if loops is not None:
        find_loops(loops)
    check_outputs(arguments)
    if values.get("dataset") is not None:
        check_dataset(arguments)


def check_outputs(arguments: Arguments) -> None:
    """Raise `UserError` for a folder that cannot be written, or that contains another run."""
    values = vars(arguments)
    for name in ("save_path", "output_dir", "output", "work"):
        if values.get(name) is not None:
            check_folder(values[name].parent if isinstance(arguments, ExportArguments) else values[name], f"--{name}")
    if isinstance(arguments, RunConfig) and (arguments.save_path / STATE_FILE).is_file():
        before, now = run_arguments(arguments.save_path), arguments.signature()
        # These two may be taken from the run that is resumed or started from.
        known = before.keys() - {"class_names", *(["precision"] if arguments.precision == "auto" else [])}
        check_same_run(arguments.save_path, before, {name: now[name] for name in now if name in known})


def check_dataset(arguments: Any) -> None:
    """Raise `UserError` for an unknown dataset, or one that is not where it is expected."""
    if getattr(arguments, "class_names", None) not in (None, *NAMES):
        read_class_names(Path(arguments.class_names))
    spec = known_dataset(arguments.dataset)
    # A toy dataset is drawn on first use, and a checkpoint or an earlier run may contain the data root.
    elsewhere = arguments.data_root is None and may_know_data_root(arguments)
    if spec is None or not (elsewhere or spec.name in TOY_DATASETS):
        with quiet():
            locate_dataset(arguments.dataset, arguments.data_root)


def may_know_data_root(arguments: Any) -> bool:
    if not isinstance(arguments, RunConfig):
        return True
    starts = any(vars(arguments).get(name) for name in STARTS)
    return starts or bool(run_arguments(arguments.save_path).get("data_root"))


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
