"""Scoring images that belong to no dataset: `inference.py --image` (docs/testing.md, "Your own images")."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dataset.catalog import readable_name
from dataset.folders import find_images
from dataset.images import read_image
from dataset.prompts import build_prompts
from engine.detector import Detector, Prediction
from engine.device import check_device
from engine.evaluation.arguments import DEFAULT_CLASS, NO_CHECKPOINT
from engine.evaluation.evaluate import det_score_suffix
from engine.evaluation.inference import load_detectors, output_folder
from engine.report.gallery import Gallery
from engine.run_folder import find_checkpoints
from model.text import Prompts
from utils.errors import UserError
from utils.files import check_folder, write_text
from utils.heatmaps import overlay, save_image
from utils.logging import progress_bar
from utils.paths import figure_path, is_file
from utils.regions import Region, worst_region

logger = logging.getLogger(__name__)

SCORES, REPORT, HEATMAPS = "scores", "report", "heatmaps"
CSV_COLUMNS = ("path", "class_name", "score", "decision", *(f"region_{name}" for name in Region._fields))
# Of the scores, how many the log lists.
MOST_LISTED = 20


@dataclass(frozen=True)
class Finding:
    """What a model says of an image: its score in [0, 1], and its worst region in pixels of the original image.

    decision: what a calibrated threshold makes of the score, in a word; empty where there is no calibration.
    """

    path: Path
    class_name: str
    score: float
    region: Region | None
    decision: str = ""


def score_images(
    checkpoint: str,
    image: Path,
    class_name: str | None = None,
    *,
    class_from_folder: bool = False,
    domain: str = "industrial",
    class_names: str | None = None,
    output_dir: Path | None = None,
    device: str = "auto",
    clip_weights: str | None = None,
    **overrides: Any,
) -> list[Finding]:
    """Score an image, or all images in a folder and below: heatmaps, `scores.csv`, and `report.html`.

    class_name: what all of them show, without it "object"; class_from_folder: named by the first folder below `image`
    that an image lies in (`class_of`); class_names: as for `Detector.predict`. Of several checkpoints in a folder the
    last one is used. With another det score than the published one, files have it in their names. A file of a folder
    that cannot be read is left out, with a line; raises `UserError` where none can, and as `evaluate_checkpoints` does.
    """
    if class_from_folder and class_name is not None:
        raise UserError("--class_from_folder names the classes: leave --class_name out")
    device = check_device(device, "fp32")
    folder = output_folder(checkpoint, output_dir)
    found = find_images(image, "--image", (folder, folder / HEATMAPS))
    given = DEFAULT_CLASS if class_name is None else class_name
    named = {path: class_of(path, image) if class_from_folder else given for path in found.images}
    # Names that no prompt can hold are refused before anything is loaded.
    prompts = {name: build_prompts(readable_name(name)) for name in dict.fromkeys(named.values())}
    check_folder(folder, "--output_dir")
    if checkpoint != NO_CHECKPOINT:
        checkpoint = str(find_checkpoints(Path(checkpoint))[-1])
    detector = load_detectors(checkpoint, clip_weights, device, **overrides)[0]
    for pair in prompts.values():
        Prompts.from_texts(detector.clip, [pair])
    problems = list(found.problems)
    for line in problems:
        logger.warning("left out: %s", line)
    findings: list[Finding] = []
    taken: set[str] = set()
    bar = progress_bar(len(named), "scoring")
    with Gallery() as gallery:
        for path, name in named.items():
            bar.update()
            try:
                pixels = read_image(path)
            except UserError as error:
                if is_file(image):
                    raise
                logger.warning("left out: %s", error)
                problems.append(str(error))
                continue
            prediction = detector.predict(pixels, name, domain, class_names=class_names)
            finding = judge(path, name, pixels, prediction)
            below = path.name if path == image else path.relative_to(image).as_posix()
            drawn = overlay(pixels, prediction.anomaly_map)
            save_image(drawn, figure_path(folder / HEATMAPS, below, "_heatmap.png", taken))
            gallery.add(pixels, prediction.anomaly_map, below, name, finding.score, finding.region, finding.decision)
            findings.append(finding)
        bar.close()
        if not findings:
            raise UserError(f"--image {image}: none of its {len(problems)} images can be read")
        kind = det_score_suffix(detector.det_score)
        scores, report = folder / f"{SCORES}{kind}.csv", folder / f"{REPORT}{kind}.html"
        write_scores(findings, scores)
        facts = facts_of(image, detector, domain, findings, problems)
        gallery.write(report, f"Images of {image.resolve().name or image}", facts, problems)
    summarise(findings, problems, found.others, detector, (report, scores, folder / HEATMAPS))
    return findings


def class_of(path: Path, image: Path) -> str:
    """The class that folders give an image: the first folder below `image` on its way, or `image`'s own name.

    So images of `parts/screw/monday/` are screws in `parts` as in `parts/screw`. For a single image it is the folder
    that it lies in.
    """
    parents = [] if path == image else path.relative_to(image).parts[:-1]
    own = (image.resolve().parent if path == image else image.resolve()).name
    return parents[0] if parents else own or DEFAULT_CLASS


def judge(path: Path, class_name: str, image: Image.Image, prediction: Prediction) -> Finding:
    """What a prediction says of an image, in the image's own pixels; `UserError` for one that is not finite.

    A threshold that is known for the model and the class would make a decision here, and be the region's.
    """
    if not math.isfinite(prediction.score):
        raise UserError(f"the score of {path} is not finite: the checkpoint's weights are not fit for use")
    return Finding(path, class_name, prediction.score, worst_region(prediction.anomaly_map, image.size))


def write_scores(findings: Iterable[Finding], path: Path) -> None:
    """A row for each image in the columns of `CSV_COLUMNS`; nothing stands where there is no decision or region."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for found in findings:
        region = found.region or [""] * len(Region._fields)
        writer.writerow([found.path.as_posix(), found.class_name, f"{found.score:.6f}", found.decision, *region])
    write_text(path, text.getvalue())


def facts_of(
    image: Path, detector: Detector, domain: str, findings: Sequence[Finding], problems: Sequence[str]
) -> list[tuple[str, str]]:
    """What stands above the images of the report."""
    classes = list(dict.fromkeys(finding.class_name for finding in findings))
    more = f" and {len(classes) - 10} more" if len(classes) > 10 else ""
    said = f"{len(findings)} scored" + (f", {len(problems)} could not be read" if problems else "")
    return [
        ("Folder", image.as_posix()),
        ("Images", said),
        ("Model", f"{detector.name}, {detector.clip.model_name} at {detector.clip.img_size} pixels"),
        ("Class in prompts", ", ".join(map(readable_name, classes[:10])) + more),
        ("Score", "half the map's maximum, half the whole image's" if domain == "industrial" else "the map's maximum"),
    ]


def summarise(
    findings: Sequence[Finding], problems: Sequence[str], others: int, detector: Detector, written: Sequence[Path]
) -> None:
    """Say which images are the most anomalous, what was left out, and where everything is."""
    ranked = sorted(findings, key=lambda finding: -finding.score)
    for found in ranked[:MOST_LISTED]:
        logger.info("%.4f  %s", found.score, found.path)
    if len(ranked) > MOST_LISTED:
        logger.info("and %d more, less anomalous", len(ranked) - MOST_LISTED)
    left_out = [f"{len(problems)} that cannot be read"] if problems else []
    left_out += [f"{others} files that are no images"] if others else []
    logger.info(
        "%d images scored by %s%s; %s in %s",
        len(findings), detector.name, f", left out: {' and '.join(left_out)}" if left_out else "",
        ", ".join(path.name for path in written), written[0].parent,
    )  # fmt: skip
