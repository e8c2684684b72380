"""`inference.py --image`: score images outside of datasets (docs/testing.md, "Your own images")."""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from dataset.folders import find_images
from dataset.images import content_digest, read_image
from dataset.prompts import build_prompts, readable_name
from engine.config.evaluation import DEFAULT_CLASS, InferenceArguments
from engine.detector.calibration import ANOMALOUS, CALIBRATION_FILE, Entry, mismatch_reason
from engine.detector.detector import Detector
from engine.detector.hub import NO_CHECKPOINT, local_path
from engine.detector.prediction import Prediction
from engine.evaluation.gallery import Finding, Gallery
from engine.evaluation.inference import load_detectors, output_folder
from engine.evaluation.references import (
    ReferenceChoice,
    add_image_references,
    image_references,
    maps_suffix,
    scoring_suffix,
)
from engine.runtime.device import check_device
from engine.runtime.run_folder import find_checkpoints
from model.text import Prompts
from utils.errors import UserError
from utils.files import check_folder, write_table
from utils.heatmaps import overlay, save_image
from utils.logging import with_progress
from utils.paths import common_folder, figure_path, is_file
from utils.regions import worst_region
from utils.text import list_names

logger = logging.getLogger(__name__)

# Images of a class, and level of the test, for a warning of scores that differ from those of the calibration.
LEAST_FOR_DRIFT, DRIFT_LEVEL = 20, 0.001
# Scores listed in the log.
MOST_LISTED = 20


@dataclass
class OwnImages:
    """The images of one or several files and folders, and the class of each.

    place: the only one of these, or the folder that contains all; problems: a line for each file that cannot be read,
    including those that `read` finds.
    """

    place: Path
    names: dict[Path, str]
    problems: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return list(dict.fromkeys(self.names.values()))

    def short_name(self, path: Path) -> str:
        """The path of an image below `place`."""
        if path == self.place:
            return path.name
        return (path.relative_to(self.place) if path.is_relative_to(self.place) else path).as_posix()

    def read(self, doing: str) -> Iterator[tuple[Path, str, Image.Image]]:
        """Each readable image with its class; others are skipped with a warning, unless there is only one image."""
        for path, name in with_progress(list(self.names.items()), doing):
            try:
                pixels = read_image(path)
            except UserError as error:
                if is_file(self.place):
                    raise
                logger.warning("left out: %s", error)
                self.problems.append(str(error))
                continue
            yield path, name, pixels


def find_own_images(places: Sequence[Path], flag: str, class_name: str | None, class_from_folder: bool) -> OwnImages:
    """Images, or all images in folders and their subfolders, with their classes.

    class_name: the class of all images, by default "object"; class_from_folder: the class is a folder's name
    (`class_of`). Raises `UserError`, naming `flag`, if there are no images, and for names that do not fit a prompt.
    """
    if class_from_folder and class_name is not None:
        raise UserError("--class_from_folder names the classes: leave --class_name out")
    common = DEFAULT_CLASS if class_name is None else class_name
    images = OwnImages(places[0], {})
    if len(places) > 1:
        # An image of a folder that is given too is one image.
        places = [Path(os.path.abspath(place)) for place in places]  # noqa: PTH100
        images.place = common_folder([place.parent if is_file(place) else place for place in places])
    for place in places:
        found = find_images(place, flag)
        images.problems += found.problems
        images.names |= {path: class_of(path, place) if class_from_folder else common for path in found.images}
    for name in images.classes:
        build_prompts(readable_name(name))
    return images


def load_last_detector(
    arguments: InferenceArguments, classes: Sequence[str], references: Mapping[str, Sequence[Path]]
) -> Detector:
    """The model of `--checkpoint`, the last one of a folder, with its references (`image_references`).

    Raises `UserError` for class names that are too long for CLIP.
    """
    checkpoint, device = arguments.checkpoint, check_device(arguments.device, "fp32")
    if checkpoint != NO_CHECKPOINT:
        checkpoint = str(find_checkpoints(local_path(checkpoint))[-1])
    (detector,) = load_detectors(checkpoint, arguments.clip_weights, device, **arguments.overrides())
    for name in classes:
        Prompts.from_texts(detector.clip, [build_prompts(detector.name_in_prompts(name))])
    add_image_references(detector, references, ReferenceChoice.of(arguments), arguments.class_names)
    return detector


def score_images(arguments: InferenceArguments) -> list[Finding]:
    """Score an image, or all images in a folder and below: heatmaps, `scores.csv`, and `report.html`.

    Of several checkpoints in a folder the last one is used. File names contain the det score if it is not the published
    one, tiles, and the number of normal references. A file of a folder that cannot be read is left out, with a line.

    Args:
        arguments: The arguments of `inference.py`, with `image`.

    Returns:
        One finding for each image.

    Raises:
        UserError: If no image can be read, and as `evaluate_checkpoints` does.
    """
    class_names = arguments.class_names
    if arguments.image is None:
        raise UserError("--image is needed: an image, or a folder of images")
    folder = output_folder(arguments.checkpoint, arguments.output_dir)
    images = find_own_images(arguments.image, "--image", arguments.class_name, arguments.class_from_folder)
    check_folder(folder, "--output_dir")
    choice = ReferenceChoice.of(arguments)
    references = image_references(choice, images.classes, arguments.class_from_folder)
    detector = load_last_detector(arguments, images.classes, references)
    detector.find_calibration(arguments.checkpoint, arguments.calibration)
    entries = thresholds_of(detector, images.classes, arguments.domain, class_names)
    kind = scoring_suffix(detector, choice)
    scores, report = folder / f"scores{kind}.csv", folder / f"report{kind}.html"
    heatmaps = folder / f"heatmaps{maps_suffix(detector, choice)}"
    with Gallery() as gallery:
        findings = score_each(arguments, images, detector, gallery, heatmaps)
        write_table(scores, [finding.to_dict() for finding in findings], arguments.json)
        facts = facts_of(images.place, detector, arguments.domain, findings, images.problems)
        for name, entry in entries.items():
            facts.append(("Decision" if len(entries) == 1 else f"Decision, {name}", f"anomalous {entry}"))
        for note in [*filter(None, [detector.clip.limits]), *drift_notes(findings, entries)]:
            logger.warning("%s", note)
            facts.append(("Note", note))
        # Several classes have different thresholds, so that the slider has no common start.
        common = {entry.image_threshold for entry in entries.values()} if len(images.classes) == 1 else set()
        start = next(iter(common), None)
        gallery.write(report, f"Images of {images.place.resolve().name or images.place}", facts, images.problems, start)
    summarise(findings, images.problems, detector, (report, scores, heatmaps))
    return findings


def score_each(
    arguments: InferenceArguments, images: OwnImages, detector: Detector, gallery: Gallery, heatmaps: Path
) -> list[Finding]:
    """Score each image, write its heatmap, and add it to the gallery; `UserError` if none can be read."""
    findings: list[Finding] = []
    taken: set[str] = set()
    reference_digests = {digest for references in detector.references.values() for digest in references.images}
    duplicates = 0
    for path, name, pixels in images.read("scoring"):
        prediction = detector.predict(pixels, name, arguments.domain, class_names=arguments.class_names)
        finding = make_finding(path, name, pixels.size, prediction)
        duplicates += bool(reference_digests) and content_digest(pixels) in reference_digests
        name_in_report = images.short_name(path)
        drawn = overlay(pixels, prediction.anomaly_map)
        save_image(drawn, figure_path(heatmaps, name_in_report, "_heatmap.png", taken))
        gallery.add(pixels, prediction.anomaly_map, finding, name_in_report, pixels.size)
        findings.append(finding)
    if not findings:
        raise UserError(f"--image {images.place}: none of its {len(images.problems)} images can be read")
    if duplicates:
        logger.warning("%d images are also references, and so compared with themselves: use others", duplicates)
    return findings


def thresholds_of(
    detector: Detector, classes: Sequence[str], domain: str, class_names: str | None
) -> Mapping[str, Entry]:
    """The thresholds of each class; logged, as well as classes without any if the model is calibrated for others."""
    entries = {}
    for name in classes if detector.calibration else ():
        key = detector.calibration_key(name, domain, class_names=class_names)
        entry = detector.thresholds(key)
        if entry is not None:
            entries[name] = entry
            logger.info("%s: anomalous %s", name, entry)
        else:
            why = mismatch_reason(detector.calibration, key)
            logger.warning("%s: %s; no decision for %s without --calibrate", CALIBRATION_FILE, why, name)
    return entries


def drift_notes(findings: Sequence[Finding], entries: Mapping[str, Entry]) -> list[str]:
    """A sentence for each class whose scores differ from those of its calibration images, in either direction.

    By a two-sample Kolmogorov-Smirnov test, for at least `LEAST_FOR_DRIFT` images.
    """
    notes = []
    for name, entry in entries.items():
        scores = [finding.score for finding in findings if finding.class_name == name]
        if len(scores) < LEAST_FOR_DRIFT:
            continue
        from scipy.stats import ks_2samp  # slow to import, and needed after a calibration only

        p = ks_2samp(scores, entry.scores).pvalue
        if p < DRIFT_LEVEL:
            medians = (statistics.median(scores), statistics.median(entry.scores))
            direction = "higher" if medians[0] > medians[1] else "lower"
            notes.append(
                f"{name}: scores are {direction} than those of the calibration images (medians {medians[0]:.4f} and "
                f"{medians[1]:.4f}, Kolmogorov-Smirnov p = {p:.1g}): many are anomalous, or camera, light or product "
                "changed; in that case, calibrate again"
            )
    return notes


def class_of(path: Path, image: Path) -> str:
    """The class of an image by its folder: the first folder below `image`, or `image` itself.

    Images in `parts/screw/monday/` are screws for `image` `parts` and `parts/screw`. For a single image it is the
    folder of the image.
    """
    parents = [] if path == image else path.relative_to(image).parts[:-1]
    own = (image.resolve().parent if path == image else image.resolve()).name
    return parents[0] if parents else own or DEFAULT_CLASS


def make_finding(path: Path, class_name: str, size: tuple[int, int], prediction: Prediction) -> Finding:
    """The result for an image of a size (width, height), with its worst region.

    That is the region above the pixel threshold, or else around the map's maximum.
    """
    found = prediction.regions
    if found is None:
        return Finding(path, class_name, prediction.score, worst_region(prediction.anomaly_map, size))
    decision = (prediction.decision or "", prediction.rank, len(found))
    return Finding(path, class_name, prediction.score, found[0] if found else None, *decision)


def facts_of(
    image: Path, detector: Detector, domain: str, findings: Sequence[Finding], problems: Sequence[str]
) -> list[tuple[str, str]]:
    """The facts at the top of the report."""
    classes = list(dict.fromkeys(readable_name(finding.class_name) for finding in findings))
    count = f"{len(findings)} scored" + (f", {len(problems)} could not be read" if problems else "")
    facts = [
        ("Folder", image.as_posix()),
        ("Images", count),
        ("Model", f"{detector.name}, {detector.clip.model_name} at {detector.clip.img_size} pixels"),
        ("Class in prompts", list_names(classes, 10)),
        ("Tiles", detector.tiles),
        ("Score", "half the map's maximum, half the whole image's" if domain == "industrial" else "the map's maximum"),
    ]
    counts = sorted({len(references.images) for references in detector.references.values()})
    if counts:
        facts.append(("Compared with", f"{' to '.join(map(str, counts))} normal images of each class"))
    return facts


def summarise(
    findings: Sequence[Finding], problems: Sequence[str], detector: Detector, written: Sequence[Path]
) -> None:
    """Log the most anomalous images, the number of skipped files, and the written files."""
    ranked = sorted(findings, key=lambda finding: -finding.score)
    for finding in ranked[:MOST_LISTED]:
        decision = f"{finding.decision:<9}  " if finding.decision else ""
        logger.info("%.4f  %s%s", finding.score, decision, finding.path)
    decisions = [finding.decision for finding in findings if finding.decision]
    if decisions:
        logger.info("%d of %d anomalous", decisions.count(ANOMALOUS), len(decisions))
    skipped = f", {len(problems)} could not be read" if problems else ""
    names = ", ".join(path.name for path in written)
    logger.info("%d images scored by %s%s; %s in %s", len(findings), detector.name, skipped, names, written[0].parent)
