"""Thresholds of a model from normal images: `inference.py --calibrate` (docs/testing.md, "A decision")."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from dataset.catalog import readable_name
from dataset.images import content_digest
from engine.detector.calibration import (
    FALSE_ALARMS,
    Entry,
    add_entry,
    check_enough,
    in_words,
    make_entry,
    read_calibration,
)
from engine.detector.detector import Detector
from engine.detector.hub import calibration_files
from engine.detector.references import ReferenceChoice
from engine.evaluation.own_images import find_own_images, load_last_detector
from engine.evaluation.references import remember_for_images
from engine.runtime.device import check_device
from utils.errors import UserError
from utils.files import check_folder

logger = logging.getLogger(__name__)


def calibrate_images(
    checkpoint: str,
    calibrate: Path,
    class_name: str | None = None,
    *,
    false_alarms: float | None = None,
    calibration: Path | None = None,
    class_from_folder: bool = False,
    domain: str = "industrial",
    class_names: str | None = None,
    references: ReferenceChoice | None = None,
    device: str = "auto",
    clip_weights: str | None = None,
    **overrides: Any,
) -> list[Entry]:
    """Find the thresholds of a model on a folder of normal images, and keep them in `calibration.json` beside it.

    false_alarms: the share of normal images that may be called anomalous, 0.01 unless given; calibration: another file
    for the thresholds; references: normal images to compare with, none of which may be calibrated on. With
    `class_from_folder` each class gets its own. The rest as for `score_images`. Raises `UserError` for too few images
    of a class, with the number that is needed, before anything is written.
    """
    rate = FALSE_ALARMS if false_alarms is None else false_alarms
    device = check_device(device, "fp32")
    file = calibration or calibration_files(checkpoint)[0]
    check_folder(file.parent, "--calibration")
    if file.exists():
        # One that cannot be added to is refused before the images are looked at.
        read_calibration(file)
    images = find_own_images(calibrate, "--calibrate", class_name, class_from_folder)
    by_class: dict[str, list[Path]] = defaultdict(list)
    for path, name in images.names.items():
        by_class[name].append(path)
    for name, paths in by_class.items():
        check_enough(len(paths), rate, f"--calibrate {calibrate}: '{name}'")
    detector = load_last_detector(checkpoint, clip_weights, device, **overrides)
    images.check_prompts(detector)
    if references is not None:
        remember_for_images(detector, images.classes, references, class_from_folder, class_names)
    seen: dict[tuple[str, str], Path] = {}
    predictions: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for path, name, pixels in images.read("calibrating"):
        # An image that counts twice would promise more than there is to see.
        digest = content_digest(pixels)
        references = detector.references.get(readable_name(name))
        if references and digest in references.images:
            raise UserError(
                f"--calibrate {path} is one of the references, which it would be compared with: take others"
            )
        first = seen.setdefault((name, digest), path)
        if first != path:
            logger.warning("left out: %s is the same image as %s", path, first)
            continue
        predictions[name].append(numbers_of(detector, pixels, name, path, domain, class_names))
    for name in by_class:
        check_enough(len(predictions[name]), rate, f"--calibrate {calibrate}: '{name}'")
    entries = [calibrate_detector(detector, predictions[name], name, rate, domain, class_names) for name in by_class]
    for name, entry in zip(by_class, entries, strict=True):
        add_entry(file, entry)
        logger.info("%s, %s: anomalous %s", detector.name, name, in_words(entry))
    logger.info("Written to %s", file)
    return entries


def numbers_of(
    detector: Detector,
    image: Image.Image,
    class_name: str,
    path: Path,
    domain: str = "industrial",
    class_names: str | None = None,
) -> tuple[float, float]:
    """What calibration needs of an image: its score, and its map's maximum; `UserError` where one is not finite."""
    prediction = detector.predict(image, class_name, domain, class_names=class_names)
    numbers = (prediction.score, float(prediction.anomaly_map.max()))
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"the score of {path} is not finite: the checkpoint's weights are not fit for use")
    return numbers


def calibrate_detector(
    detector: Detector,
    numbers: Iterable[tuple[float, float]],
    class_name: str,
    false_alarms: float = FALSE_ALARMS,
    domain: str = "industrial",
    class_names: str | None = None,
) -> Entry:
    """Thresholds from `numbers_of` normal images of a class, which the detector decides by from now on."""
    scores, peaks = zip(*numbers, strict=True)
    subject = detector.subject(class_name, domain, class_names=class_names)
    entry = make_entry(subject, detector.name, scores, peaks, false_alarms)
    detector.calibration = [*(kept for kept in detector.calibration if kept.subject != subject), entry]
    return entry
