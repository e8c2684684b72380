"""What one visitor of the page does with the models, in memory: no other visitor sees it, and no file is written."""

from __future__ import annotations

import copy
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dataset.catalog import readable_name
from dataset.images import content_digest
from dataset.prompts import build_prompts
from engine.app.dropped import Dropped
from engine.config.evaluation import DEFAULT_CLASS
from engine.detector.calibration import ANOMALOUS, CALIBRATION_FILE, NORMAL, Entry, add_entry, check_enough
from engine.detector.detector import Detector, Prediction
from engine.evaluation.calibrate import calibrate_detector, numbers_of
from engine.evaluation.image_heatmaps import attention_heatmaps
from engine.evaluation.own_images import Finding, judge, write_scores
from model.adapter_cross_attention import AdaptedCLIPWithCrossAttention
from model.scoring import decisions
from model.text import Prompts
from utils.errors import UserError
from utils.heatmaps import overlay, save_image
from utils.paths import figure_path
from utils.regions import Region, regions_of

# Longer side of the images that are kept to be shown, in pixels; models get them as they were dropped.
SIDE = 1280

Progress = Callable[[int, int], None]


class Thresholds(NamedTuple):
    """From where on an image, and a pixel, is anomalous, where somebody has set it by hand."""

    image: float
    pixel: float


@dataclass(frozen=True)
class Seen:
    """An image as a model sees it: `image` at most `SIDE` pixels long, `size` the original's (width, height).

    entry: the thresholds that it was calibrated to, if any; attention: maps by their title, 1 is even
    (`attention_heatmaps`); references: how many normal images it was compared with.
    """

    name: str
    image: Image.Image
    size: tuple[int, int]
    class_name: str
    model: str
    prediction: Prediction
    region: Region | None
    entry: Entry | None
    attention: Mapping[str, np.ndarray]
    references: int


class Verdict(NamedTuple):
    """What thresholds make of an image. decision: empty where there are none; mask, regions: None then.

    worst: the region that counts most, also without thresholds.
    """

    decision: str
    mask: np.ndarray | None
    regions: tuple[Region, ...] | None
    worst: Region | None


def verdict(seen: Seen, by_hand: Thresholds | None = None) -> Verdict:
    """The decision on an image: by thresholds that are set by hand, else by those that were calibrated, if any."""
    found = seen.prediction
    if by_hand is None:
        return Verdict(found.decision or "", found.mask, found.regions, seen.region)
    score, anomaly_map = torch.tensor([found.score]), torch.from_numpy(found.anomaly_map)[None]
    anomalous, masks = decisions(score, anomaly_map, *by_hand)
    regions = regions_of(masks[0].numpy(), found.anomaly_map, seen.size)
    return Verdict(ANOMALOUS if anomalous else NORMAL, masks[0].numpy(), regions, regions[0] if regions else None)


@dataclass
class Session:
    """A visitor's images, references and thresholds, for all `models`, which are shared and left as they are.

    dropped: the images to look at. seen: what was found, most anomalous first; problems: a line for each image that
    was left out. normals: images to compare with, by class.
    """

    models: Mapping[str, Detector]
    domain: str = "industrial"
    dropped: Sequence[Dropped] = ()
    seen: list[Seen] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    chosen: int = 0
    by_hand: Thresholds | None = None
    normals: dict[str, Sequence[Dropped]] = field(default_factory=dict)
    _own: dict[str, Detector] = field(default_factory=dict)
    _found: list[Entry] = field(default_factory=list)

    def look(self, model: str, class_name: str, progress: Progress | None = None) -> None:
        """Look at what was dropped; fills `seen` and `problems`. Raises `UserError` where nothing can be looked at."""
        name = self._class(class_name)
        detector = self._prepared(model, name)
        self.seen, self.problems, self.chosen, self.by_hand = [], [], 0, None
        for index, image in enumerate(self.dropped):
            if progress is not None:
                progress(index, len(self.dropped))
            try:
                self.seen.append(self._see(detector, image, name))
            except UserError as error:
                self.problems.append(str(error))
        self.seen.sort(key=lambda seen: -seen.prediction.score)

    def compare_with(self, images: Sequence[Dropped], model: str, class_name: str) -> int:
        """Compare images of a class with these normal ones from now on, with every model; with none, no longer.

        Returns how many. Raises `UserError` for an image that cannot be read: all stays as it was.
        """
        name = self._class(class_name)
        key, before = readable_name(name), self.normals.get(readable_name(name))
        self.normals.pop(key, None)
        if images:
            self.normals[key] = images
        for detector in self._own.values():
            detector.references.pop(key, None)
        try:
            self._prepared(model, name)
        except UserError:
            self.normals.pop(key, None)
            if before:
                self.normals[key] = before
            raise
        return len(images)

    def calibrate(
        self,
        images: Sequence[Dropped],
        model: str,
        class_name: str,
        false_alarms: float,
        progress: Progress | None = None,
    ) -> Entry:
        """Find thresholds for a model and a class from normal images, and decide by them from now on.

        An image that is there twice counts once. Raises `UserError` for too few, for one that cannot be read, and for
        one that is a reference: compared with itself, it would look more normal than any other.
        """
        name = self._class(class_name)
        check_enough(len(images), false_alarms, f"'{name}'")
        detector = self._prepared(model, name)
        references = self._references(detector, name)
        numbers: dict[str, tuple[float, float]] = {}
        for index, image in enumerate(images):
            if progress is not None:
                progress(index, len(images))
            pixels = image.read()
            digest = content_digest(pixels)
            if digest in references:
                raise UserError(f"{image.name} is one of the normal images that are compared with: take others")
            if digest not in numbers:
                numbers[digest] = numbers_of(detector, pixels, name, Path(image.name), self.domain)
        check_enough(len(numbers), false_alarms, f"'{name}', without those that are there twice")
        entry = calibrate_detector(detector, numbers.values(), name, false_alarms, self.domain)
        self._found = [*(found for found in self._found if found.subject != entry.subject), entry]
        return entry

    def write_zip(self, path: Path, opacity: float) -> Path:
        """Scores, heatmaps and, where the visitor has found any, thresholds, in a file of the server's own."""
        with tempfile.TemporaryDirectory() as temporary:
            folder, taken = Path(temporary), set()
            findings = []
            for seen in self.seen:
                found = verdict(seen, self.by_hand)
                regions = None if found.regions is None else len(found.regions)
                prediction = seen.prediction
                findings.append(
                    Finding(
                        Path(seen.name),
                        seen.class_name,
                        prediction.score,
                        found.worst,
                        found.decision,
                        prediction.rank,
                        regions,
                    )
                )
                picture = overlay(seen.image, prediction.anomaly_map, opacity=opacity)
                save_image(picture, figure_path(folder / "heatmaps", seen.name, "_heatmap.png", taken))
            write_scores(findings, folder / "scores.csv")
            for entry in self._found:
                add_entry(folder / CALIBRATION_FILE, entry)
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in sorted(folder.rglob("*")):
                    if file.is_file():
                        archive.write(file, file.relative_to(folder).as_posix())
        return path

    def _class(self, class_name: str) -> str:
        return class_name.strip() or DEFAULT_CLASS

    def _prepared(self, model: str, class_name: str) -> Detector:
        """A model as this visitor has it, ready for a class; `UserError` for a name that no prompt can hold."""
        if model not in self._own:
            detector = copy.copy(self.models[model])
            detector.references = {}
            self._own[model] = detector
        detector = self._own[model]
        Prompts.from_texts(detector.clip, [build_prompts(detector.name_in_prompts(class_name))])
        key = readable_name(class_name)
        if key in self.normals and key not in detector.references:
            detector.remember([image.read() for image in self.normals[key]], class_name)
        return detector

    def _references(self, detector: Detector, class_name: str) -> Sequence[str]:
        found = detector.references.get(readable_name(class_name))
        return () if found is None else found.images

    def _see(self, detector: Detector, image: Dropped, class_name: str) -> Seen:
        pixels = image.read()
        references = self._references(detector, class_name)
        if content_digest(pixels) in references:
            raise UserError(f"{image.name} is one of the normal images that are compared with: no result")
        attention: Mapping[str, np.ndarray] = {}
        if isinstance(detector.model, AdaptedCLIPWithCrossAttention):
            prediction, weights = detector.predict(pixels, class_name, self.domain, return_attention=True)
            normal = build_prompts(detector.name_in_prompts(class_name))[0]
            attention = attention_heatmaps(weights, len(normal))
        else:
            prediction = detector.predict(pixels, class_name, self.domain)
        region = judge(Path(image.name), class_name, pixels, prediction).region
        entry = detector.thresholds(detector.subject(class_name, self.domain))
        shown = pixels.copy()
        shown.thumbnail((SIDE, SIDE))
        return Seen(
            image.name,
            shown,
            pixels.size,
            class_name,
            detector.name,
            prediction,
            region,
            entry,
            attention,
            len(references),
        )
