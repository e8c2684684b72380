"""The work of one visitor, in memory: other visitors cannot see it, and no files are written."""

from __future__ import annotations

import copy
import math
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.images import content_digest
from dataset.prompts import build_prompts, readable_name
from engine.app.uploads import Upload
from engine.config.evaluation import DEFAULT_CLASS
from engine.detector.calibration import CALIBRATION_FILE, Entry, add_entry, check_enough
from engine.detector.detector import Detector
from engine.detector.prediction import Prediction, decide
from engine.evaluation.calibrate import calibrate_detector, score_and_peak
from engine.evaluation.gallery import Finding, Gallery
from engine.evaluation.image_heatmaps import attention_heatmaps
from engine.evaluation.own_images import make_finding
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.config import TILES
from model.graph import Thresholds
from model.text import Prompts
from utils.errors import UserError
from utils.files import write_table
from utils.heatmaps import overlay, save_image
from utils.paths import figure_path

# Longer side of displayed images, in pixels; models get the uploaded size.
MAX_SIDE = 1280

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageResult:
    """The result of a model on an image.

    Attributes:
        image: The image, with at most `MAX_SIDE` pixels on its longer side.
        size: Width and height of the uploaded image.
        finding: Score, worst region, and the decision if the model is calibrated.
        entry: The calibration, if any.
        attention: Attention maps by title; 1 is uniform attention.
        references: Number of normal images that the image was compared with.
    """

    name: str
    image: Image.Image
    size: tuple[int, int]
    model: str
    prediction: Prediction
    finding: Finding
    entry: Entry | None
    attention: Mapping[str, np.ndarray]
    references: int


def decide_on(result: ImageResult, manual: Thresholds | None = None) -> tuple[Prediction, Finding]:
    """Decide on an image with manual thresholds, or else with those of the calibration, if any."""
    if manual is None:
        return result.prediction, result.finding
    prediction = decide(result.prediction, *manual, result.size)
    return prediction, make_finding(result.finding.path, result.finding.class_name, result.size, prediction)


@dataclass
class Session:
    """A visitor's images, references and thresholds. The models are shared by all visitors and not changed.

    Attributes:
        uploads: The images to analyze.
        results: Their results, the most anomalous first.
        problems: A message for each image without a result.
        selected: Index of the displayed result.
        manual: Manual thresholds.
        normals: Normal images to compare with, by class.
        tiles: The tiles of images, as for `Detector.predict`.
    """

    models: Mapping[str, Detector]
    domain: str = "industrial"
    uploads: Sequence[Upload] = ()
    results: list[ImageResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    selected: int = 0
    manual: Thresholds | None = None
    normals: dict[str, Sequence[Upload]] = field(default_factory=dict)
    tiles: str = TILES[0]
    _detectors: dict[str, Detector] = field(default_factory=dict)
    _entries: list[Entry] = field(default_factory=list)

    def analyze(self, model: str, class_name: str, progress: Progress = lambda done, total: None) -> None:
        """Analyze the uploads, and set `results` and `problems`; `UserError` for an invalid class name."""
        name = class_name.strip() or DEFAULT_CLASS
        detector = self._prepare(model, name)
        self.results, self.problems, self.selected, self.manual = [], [], 0, None
        for index, upload in enumerate(self.uploads):
            progress(index, len(self.uploads))
            try:
                self.results.append(self._analyze_one(detector, upload, name))
            except UserError as error:
                self.problems.append(str(error))
        self.results.sort(key=lambda result: -result.prediction.score)

    def compare_with(self, images: Sequence[Upload], model: str, class_name: str) -> None:
        """Compare images of a class with these normal images, with every model; without images, stop comparing.

        Raises `UserError`, and changes nothing, if an image cannot be read.
        """
        name = class_name.strip() or DEFAULT_CLASS
        if list(images) == list(self.normals.get(readable_name(name), ())):
            return
        self._prepare(model, name)
        for upload in images:
            upload.read()
        self.normals[readable_name(name)] = images
        for detector in self._detectors.values():
            detector.references.pop(readable_name(name), None)

    def calibrate(
        self,
        images: Sequence[Upload],
        model: str,
        class_name: str,
        false_alarms: float,
        progress: Progress = lambda done, total: None,
    ) -> Entry:
        """Set the thresholds of a model and a class from normal images. Equal images count once.

        Raises `UserError` for too few images, for an image that cannot be read, and for a reference: compared with
        itself, it would look more normal than other images.
        """
        name = class_name.strip() or DEFAULT_CLASS
        check_enough(len(images), false_alarms, f"'{name}'")
        detector = self._prepare(model, name)
        references = _reference_digests(detector, name)
        numbers: dict[str, tuple[float, float]] = {}
        for index, upload in enumerate(images):
            progress(index, len(images))
            pixels = upload.read()
            digest = content_digest(pixels)
            if digest in references:
                raise UserError(f"{upload.name} is one of the images to compare with: use other images")
            if digest not in numbers:
                numbers[digest] = score_and_peak(detector, pixels, name, self.domain)
        check_enough(len(numbers), false_alarms, f"'{name}', without duplicates")
        entry = calibrate_detector(detector, numbers.values(), name, false_alarms, self.domain)
        self._entries = [*(other for other in self._entries if other.key != entry.key), entry]
        return entry

    def write_zip(self, path: Path, opacity: float) -> None:
        """Write scores, heatmaps, a report and the visitor's thresholds to a file."""
        with tempfile.TemporaryDirectory() as temporary, Gallery() as gallery:
            folder = Path(temporary)
            taken: set[str] = set()
            findings = []
            for result in self.results:
                findings.append(decide_on(result, self.manual)[1])
                picture = overlay(result.image, result.prediction.anomaly_map, opacity=opacity)
                save_image(picture, figure_path(folder / "heatmaps", result.name, "_heatmap.png", taken))
                gallery.add(result.image, result.prediction.anomaly_map, findings[-1], result.name, result.size)
            write_table(folder / "scores.csv", [finding.to_dict() for finding in findings])
            facts = [("Model", ", ".join({result.model for result in self.results}))]
            gallery.write(folder / "report.html", "Results", facts, [], None)
            for entry in self._entries:
                add_entry(folder / CALIBRATION_FILE, entry)
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in sorted(filter(Path.is_file, folder.rglob("*"))):
                    archive.write(file, file.relative_to(folder).as_posix())

    def _prepare(self, model: str, class_name: str) -> Detector:
        """The visitor's copy of a model, with the references of a class; `UserError` for an invalid class name."""
        if model not in self._detectors:
            self._detectors[model] = copy.copy(self.models[model])
            self._detectors[model].references = {}
        detector = self._detectors[model]
        detector.tiles = self.tiles
        Prompts.from_texts(detector.clip, [build_prompts(detector.name_in_prompts(class_name))])
        key = readable_name(class_name)
        references = detector.references.get(key)
        if self.normals.get(key) and (references is None or references.tiles != self.tiles):
            detector.add_references([upload.read() for upload in self.normals[key]], class_name)
        return detector

    def _analyze_one(self, detector: Detector, upload: Upload, class_name: str) -> ImageResult:
        pixels = upload.read()
        references = _reference_digests(detector, class_name)
        if content_digest(pixels) in references:
            raise UserError(f"{upload.name} is one of the images to compare with: no result")
        attention: Mapping[str, np.ndarray] = {}
        crossed = isinstance(detector.model, AdaptedCLIPWithCrossAttention)
        prediction = detector.predict(pixels, class_name, self.domain, return_attention=crossed)
        if prediction.attention is not None:
            normal = build_prompts(detector.name_in_prompts(class_name))[0]
            attention = attention_heatmaps(prediction.attention, len(normal))
        # Displayed only, so that a pixel for each one on the screen is enough.
        step = math.ceil(max(prediction.anomaly_map.shape) / MAX_SIDE)
        prediction = replace(prediction, level_maps=prediction.level_maps[:, ::step, ::step].copy())
        thumbnail = pixels.copy()
        thumbnail.thumbnail((MAX_SIDE, MAX_SIDE))
        return ImageResult(
            name=upload.name,
            image=thumbnail,
            size=pixels.size,
            model=detector.name,
            prediction=prediction,
            finding=make_finding(Path(upload.name), class_name, pixels.size, prediction),
            entry=detector.thresholds(detector.calibration_key(class_name, self.domain)),
            attention=attention,
            references=len(references),
        )


def _reference_digests(detector: Detector, class_name: str) -> Sequence[str]:
    references = detector.references.get(readable_name(class_name))
    return () if references is None else references.images
