"""`inference.py --calibrate`: thresholds of a model from normal images (docs/testing.md, "A decision")."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from dataset.images import content_digest
from dataset.prompts import readable_name
from engine.config.evaluation import InferenceArguments
from engine.detector.calibration import FALSE_ALARMS, Entry, add_entry, check_enough, make_entry, read_calibration
from engine.detector.detector import Detector
from engine.detector.hub import calibration_files
from engine.evaluation.own_images import OwnImages, find_own_images, load_last_detector
from engine.evaluation.references import ReferenceChoice, check_disjoint, image_references
from utils.errors import UserError
from utils.files import check_folder

logger = logging.getLogger(__name__)


def calibrate_images(arguments: InferenceArguments) -> list[Entry]:
    """Find the thresholds of a model on a folder of normal images, and add them to `calibration.json`.

    Args:
        arguments: The arguments of `inference.py`, with `calibrate`. With `class_from_folder` each class gets its own
            thresholds.

    Returns:
        One entry for each class.

    Raises:
        UserError: Before anything is written, for too few images of a class, with the number that is needed.
    """
    folder, class_names = arguments.calibrate, arguments.class_names
    if folder is None:
        raise UserError("--calibrate is needed: a folder of normal images")
    rate = FALSE_ALARMS if arguments.false_alarms is None else arguments.false_alarms
    file = arguments.calibration or calibration_files(arguments.checkpoint)[0]
    check_folder(file.parent, "--calibration")
    if file.exists():
        read_calibration(file)  # fails now, not after all images have been scored
    images = find_own_images([folder], "--calibrate", arguments.class_name, arguments.class_from_folder)
    classes = images.classes
    references = image_references(ReferenceChoice.of(arguments), classes, arguments.class_from_folder)
    chosen = {path for paths in references.values() for path in paths}
    images.names = {path: name for path, name in images.names.items() if path not in chosen}
    check_disjoint(chosen, images.names)
    for name in classes:
        check_enough(list(images.names.values()).count(name), rate, f"--calibrate {folder}: '{name}'")
    detector = load_last_detector(arguments, classes, references)
    numbers: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, pixels in different_images(images, detector):
        numbers[name].append(score_and_peak(detector, pixels, name, arguments.domain, class_names))
    for name in classes:
        check_enough(len(numbers[name]), rate, f"--calibrate {folder}: '{name}'")
    entries = []
    for name in classes:
        entry = calibrate_detector(detector, numbers[name], name, rate, arguments.domain, class_names)
        entries.append(entry)
        add_entry(file, entry)
        logger.info("%s, %s: anomalous %s", detector.name, name, entry)
    logger.info("Written to %s", file)
    return entries


def different_images(images: OwnImages, detector: Detector) -> Iterator[tuple[str, Image.Image]]:
    """Each image with its class, without duplicates; `UserError` for one that is also a reference."""
    seen: dict[tuple[str, str], Path] = {}
    for path, name, pixels in images.read("calibrating"):
        # Duplicates would make the thresholds look more certain than they are.
        digest = content_digest(pixels)
        references = detector.references.get(readable_name(name))
        if references and digest in references.images:
            raise UserError(
                f"--calibrate {path} is also a reference, so it would be compared with itself: use other images"
            )
        first = seen.setdefault((name, digest), path)
        if first != path:
            logger.warning("left out: %s is the same image as %s", path, first)
            continue
        yield name, pixels


def score_and_peak(
    detector: Detector, image: Image.Image, class_name: str, domain: str = "industrial", class_names: str | None = None
) -> tuple[float, float]:
    """An image's score and its map's maximum."""
    prediction = detector.predict(image, class_name, domain, class_names=class_names)
    return prediction.score, float(prediction.anomaly_map.max())


def calibrate_detector(
    detector: Detector,
    numbers: Iterable[tuple[float, float]],
    class_name: str,
    false_alarms: float = FALSE_ALARMS,
    domain: str = "industrial",
    class_names: str | None = None,
) -> Entry:
    """Thresholds from `score_and_peak` normal images of a class, which the detector decides by from now on."""
    scores, peaks = zip(*numbers, strict=True)
    key = detector.calibration_key(class_name, domain, class_names=class_names)
    entry = make_entry(key, detector.name, scores, peaks, false_alarms)
    detector.calibration = [*(other for other in detector.calibration if other.key != key), entry]
    return entry
