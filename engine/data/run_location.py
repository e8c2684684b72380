"""Where a run's data were, as the default of whatever goes on with it, tests it or draws it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataset.locate import locate_dataset
from dataset.options import HALF, NAMES
from engine.data.task import TaskData, load_task
from engine.runtime.run_folder import ARGUMENTS_FILE
from model.config import SavedArguments
from utils.errors import UserError
from utils.schema import check

logger = logging.getLogger(__name__)


def arguments_in(folder: Path) -> dict[str, Any]:
    """What the run in a folder was asked for; nothing where no run is there, or its file cannot be read."""
    file = folder / ARGUMENTS_FILE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        check(found, SavedArguments, file)
    except (OSError, ValueError, RecursionError, UserError) as error:
        reason = error if isinstance(error, UserError) else f"{file}: cannot be read ({type(error).__name__})"
        logger.warning("%s; it is ignored", reason)
        return {}
    return found


def load_task_of_run(
    run: Mapping[str, Any],
    dataset: str,
    data_root: Path | None = None,
    metadata: Path | None = None,
    class_names: str | Path | None = None,
    skip_bad_images: bool = False,
    mask_threshold: str | float = HALF,
) -> TaskData:
    """As `load_task`, with what a run was asked for in place of what is not given.

    run: its arguments. Its data root counts for every dataset that is found there, its metadata and file of class names
    for its own dataset, published class names for every one. A path that is gone is ignored with a line.
    """
    if data_root is None:
        data_root = _still_there(run, "data_root")
        if data_root is not None and not _is_found(dataset, data_root):
            logger.info("%s is not under the run's data root %s, which is ignored", dataset, data_root)
            data_root = None
    if class_names is None and run.get("class_names") in NAMES:
        class_names = run["class_names"]
        logger.info("--class_names is that of the run: %s", class_names)
    if str(run.get("dataset")).lower() == dataset.lower():
        metadata = metadata or _still_there(run, "metadata")
        class_names = class_names or _still_there(run, "class_names")
    return load_task(dataset, data_root, metadata, class_names, skip_bad_images, mask_threshold)


def _still_there(run: Mapping[str, Any], name: str) -> Path | None:
    recorded = run.get(name)
    if not isinstance(recorded, str) or not recorded:
        return None
    path = Path(recorded)
    if path.exists():
        logger.info("--%s is that of the run: %s", name, path)
        return path
    logger.info("the run's --%s %s is not there any more, and is ignored", name, path)
    return None


def _is_found(dataset: str, data_root: Path) -> bool:
    try:
        locate_dataset(dataset, data_root)
    except UserError:
        return False
    return True
