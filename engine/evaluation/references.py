"""Normal images to compare with, for models that test: from a folder, or from a dataset's own training images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from dataset.images import read_image
from dataset.normals import normals_of_classes, training_normals
from dataset.options import CATALOG_NAMES
from engine.data.task import TaskData
from engine.detector.detector import Detector
from engine.detector.references import ReferenceChoice, check_apart

logger = logging.getLogger(__name__)


def choose_for_dataset(data: TaskData, choice: ReferenceChoice) -> dict[str, list[Path]]:
    """The normal images that each class of a dataset is compared with; those of the dataset's test are refused."""
    if choice.folder is None:
        images = {name: training_normals(data.located, name) for name in data.classes}
    else:
        images = normals_of_classes(choice.folder, data.classes)
    chosen = choice.choose(images)
    root = data.located.root
    tested = [root / record.image_path for record in data.records]
    check_apart([path for paths in chosen.values() for path in paths], tested)
    return chosen


def remember_for_dataset(detectors: Sequence[Detector], data: TaskData, choice: ReferenceChoice) -> None:
    """Let models compare each class of a dataset with its normal images (`choose_for_dataset`)."""
    for name, paths in choose_for_dataset(data, choice).items():
        # A class's name in prompts is decided already, and several classes may share it.
        _remember(detectors, paths, data.names[name], choice, CATALOG_NAMES, called=name)


def remember_for_images(
    detector: Detector,
    classes: Sequence[str],
    choice: ReferenceChoice,
    class_from_folder: bool = False,
    class_names: str | None = None,
) -> None:
    """Let a model compare images of these classes with normal ones: with all of the folder, or each with its own."""
    folders = normals_of_classes(choice.folder, classes if class_from_folder else [""])
    images = folders if class_from_folder else dict.fromkeys(classes, folders[""])
    for name, paths in choice.choose(images).items():
        _remember([detector], paths, name, choice, class_names)


def _remember(
    detectors: Sequence[Detector],
    paths: Sequence[Path],
    class_name: str,
    choice: ReferenceChoice,
    class_names: str | None,
    called: str | None = None,
) -> None:
    images = [read_image(path) for path in paths]
    how = {"weight": choice.weight, "features": choice.features, "class_names": class_names, "called": called}
    for detector in detectors:
        detector.remember(images, class_name, **how)
    logger.info("%s: compared with %d normal images, such as %s", called or class_name, len(paths), paths[0])
