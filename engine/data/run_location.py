"""The data location of a run, which is the default for resuming, testing and drawing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataset.locate import locate_dataset
from dataset.prompts import NAMES
from dataset.records import HALF
from engine.data.task import TaskData, load_task
from engine.runtime.run_folder import ARGUMENTS_FILE
from model.config import SavedArguments
from utils.errors import UserError
from utils.reading import read_json

logger = logging.getLogger(__name__)


def arguments_in(folder: Path) -> dict[str, Any]:
    """The arguments of the run in a folder; empty if there is no run, or (with a warning) its file is damaged."""
    file = folder / ARGUMENTS_FILE
    if not file.is_file():
        return {}
    try:
        return read_json(file, SavedArguments)
    except UserError as error:
        logger.warning("%s; it is ignored", error)
        return {}


def load_task_of_run(
    run: Mapping[str, Any],
    dataset: str,
    data_root: Path | None = None,
    metadata: Path | None = None,
    class_names: str | Path | None = None,
    skip_bad_images: bool = False,
    mask_threshold: str | float = HALF,
) -> TaskData:
    """As `load_task`, with the choices of a run for what is not given.

    run: its arguments. Its data root is used if it contains the dataset, its metadata and file of class names for its
    own dataset, and `--class_names published` for every dataset. Paths that no longer exist are ignored with a message.
    """
    if data_root is None and (recorded := _existing(run, "data_root")):
        try:
            locate_dataset(dataset, recorded)
            data_root = recorded
        except UserError:
            logger.info("%s is not under the run's data root %s, which is ignored", dataset, recorded)
    if class_names is None and run.get("class_names") in NAMES:
        class_names = run["class_names"]
        logger.info("--class_names is that of the run: %s", class_names)
    if str(run.get("dataset")).lower() == dataset.lower():
        metadata = metadata or _existing(run, "metadata")
        class_names = class_names or _existing(run, "class_names")
    return load_task(dataset, data_root, metadata, class_names, skip_bad_images, mask_threshold)


def _existing(run: Mapping[str, Any], name: str) -> Path | None:
    """A path among a run's arguments, if it still exists."""
    if not run.get(name):
        return None
    path = Path(run[name])
    exists = path.exists()
    logger.info("--%s of the run: %s%s", name, path, "" if exists else " no longer exists and is ignored")
    return path if exists else None
