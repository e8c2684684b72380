"""Which normal images to compare with: from a folder, or from a dataset's own training images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from PIL import Image

from dataset.images import read_image
from dataset.normals import choose_normals, normals_of_classes, training_normals
from engine.config.evaluation import REFERENCES
from engine.data.task import TaskData
from engine.detector.detector import Detector
from model.config import DET_SCORES, REFERENCE_FEATURES, REFERENCE_WEIGHT, TILES
from utils.errors import UserError
from utils.paths import is_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceChoice:
    """The options `REFERENCES`, in their order.

    folder: without one, images come from a dataset's own training images, or from the folder of `--calibrate`; shots:
    how many of each class, None for all of the folder; seed: which ones. weight, features: as for
    `Detector.add_references`.
    """

    folder: Path | None = None
    shots: int | None = None
    seed: int = 0
    weight: float = REFERENCE_WEIGHT
    features: str = REFERENCE_FEATURES[0]

    @classmethod
    def of(cls, arguments: object) -> ReferenceChoice | None:
        """The choice of a script's arguments; None if they give neither a folder nor a number of images."""
        choice = cls(*(getattr(arguments, name) for name in REFERENCES))
        if choice.folder is None and choice.shots is None:
            return None
        return replace(choice, folder=choice.folder or getattr(arguments, "calibrate", None))

    def __str__(self) -> str:
        count = "the" if self.shots is None else f"{self.shots}"
        source = "of the dataset's training images" if self.folder is None else f"in {self.folder.as_posix()}"
        seed = "" if self.shots is None else f" (seed {self.seed})"
        return f"{count} normal images of each class {source}{seed}, {self.features} features, weight {self.weight:g}"

    def choose(self, images: Mapping[str, Sequence[Path]]) -> dict[str, list[Path]]:
        """The images to compare with, among the normal images of each class."""
        return {name: choose_normals(paths, self.shots, self.seed, name) for name, paths in images.items()}


def scoring_note(det_score: str, choice: ReferenceChoice | None, tiles: str = TILES[0]) -> str:
    """Added to a heading for another det score, for tiles, and if images are compared with references."""
    note = "" if det_score == DET_SCORES[0] else f", image scores with det score {det_score}"
    note += "" if tiles == TILES[0] else f", tiles {tiles}"
    return note if choice is None else f"{note}, compared with normal references"


def scoring_suffix(detector: Detector, choice: ReferenceChoice | None) -> str:
    """Added to file names if image scores use another det score, tiles, or references."""
    return ("" if detector.det_score == DET_SCORES[0] else f"_det_{detector.det_score}") + maps_suffix(detector, choice)


def maps_suffix(detector: Detector, choice: ReferenceChoice | None) -> str:
    """Added to the names of heatmaps with tiles or references."""
    return ("" if detector.tiles == TILES[0] else f"_tiles_{detector.tiles}") + references_suffix(choice)


def references_suffix(choice: ReferenceChoice | None) -> str:
    """Added to the names of result files, so that they do not replace those without references."""
    if choice is None:
        return ""
    return "_references" if choice.shots is None else f"_{choice.shots}_references"


def add_dataset_references(detectors: Sequence[Detector], data: TaskData, choice: ReferenceChoice | None) -> None:
    """Let models compare each class of a dataset with normal images; images that are also tested are rejected."""
    if choice is None:
        return
    if choice.folder is None:
        images = {name: training_normals(data.located, name) for name in data.classes}
    else:
        images = normals_of_classes(choice.folder, data.classes)
    chosen = choice.choose(images)
    tested = (data.located.root / record.image_path for record in data.records)
    check_disjoint(chain.from_iterable(chosen.values()), tested)
    for name, paths in chosen.items():
        pictures = _read(name, paths)
        for detector in detectors:
            detector.add_references(pictures, name, choice.weight, choice.features, data.names)


def image_references(
    choice: ReferenceChoice | None, classes: Sequence[str], class_from_folder: bool = False
) -> dict[str, list[Path]]:
    """The references of each class: normal images of the choice's folder, or of the class's subfolder."""
    if choice is None or choice.folder is None:
        return {}
    folders = normals_of_classes(choice.folder, classes if class_from_folder else [""])
    return choice.choose(folders if class_from_folder else dict.fromkeys(classes, folders[""]))


def add_image_references(
    detector: Detector, images: Mapping[str, Sequence[Path]], choice: ReferenceChoice | None, class_names: str | None
) -> None:
    """Let a model compare images of each class with its references (`image_references`)."""
    choice = choice or ReferenceChoice()
    for name, paths in images.items():
        detector.add_references(_read(name, paths), name, choice.weight, choice.features, class_names)


def _read(class_name: str, paths: Sequence[Path]) -> list[Image.Image]:
    logger.info("%s: compared with %d normal images, such as %s", class_name, len(paths), paths[0])
    return [read_image(path) for path in paths]


def check_disjoint(references: Iterable[Path], tested: Iterable[Path]) -> None:
    """Raise `UserError` if a reference and a tested image are the same file content."""
    by_size: dict[int, list[Path]] = {}
    for path in references:
        by_size.setdefault(path.stat().st_size, []).append(path)
    for path in tested:
        for reference in by_size.get(path.stat().st_size, ()) if is_file(path) else ():
            if reference.read_bytes() == path.read_bytes():
                raise UserError(f"the reference {reference} is also the image {path}: use other references")
