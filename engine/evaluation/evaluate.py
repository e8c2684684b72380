"""Zero-shot evaluation: published scores and metrics per class, for one or several models on the same images."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset.catalog import readable_name
from engine.data import evaluation_loader, make_dataset
from engine.detector import Detector
from engine.device import choose_precision
from engine.task import TaskData
from model.config import DET_SCORES
from model.frozen import SharedStreams
from model.references import joined_anomaly_map
from model.scoring import Outputs, anomaly_map, class_image_scores, det_scores
from utils.files import write_text
from utils.logging import progress_bar
from utils.metrics import PixelCounter, image_metrics
from utils.tables import format_table

logger = logging.getLogger(__name__)

METRICS = {
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1_max": "Pixel F1-max",
    "aupro": "AUPRO",
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "image_f1_max": "Image F1-max",
}
# What stands in tables for a metric that is undefined.
UNDEFINED = "n/a"
CSV_COLUMNS = ("model", "dataset", "class", "images", "anomalous", "det_score", *METRICS)


@dataclass(frozen=True)
class ImageScore:
    """An image's path under the dataset's root, whether it is anomalous, and its score among those of its class."""

    path: str
    anomalous: bool
    score: float


@dataclass(frozen=True)
class ClassResult:
    """Metrics of one class in percent, None where undefined, and its images in the order of evaluation."""

    class_name: str
    values: dict[str, float | None]
    scores: tuple[ImageScore, ...]

    @property
    def images(self) -> int:
        return len(self.scores)

    @property
    def anomalous(self) -> int:
        return sum(image.anomalous for image in self.scores)


@dataclass(frozen=True)
class Evaluation:
    """A model's metrics on a dataset, per class and averaged over the classes in which they are defined.

    det_score: which one took part in the image scores.
    """

    model: str
    dataset: str
    classes: list[ClassResult]
    det_score: str = DET_SCORES[0]

    def average(self, metric: str) -> tuple[float | None, int]:
        """The mean of a metric in percent, and over how many classes."""
        values = [value for result in self.classes if (value := result.values[metric]) is not None]
        return (sum(values) / len(values) if values else None), len(values)


@dataclass
class _ClassScores:
    """What is kept of one class's images until its metrics are taken: counts of pixels, a few numbers per image.

    masked: whether all anomalous images have a mask, without which nothing can be said of pixels.
    """

    domain: str
    det_score: str
    masked: bool = True
    pixels: PixelCounter = field(default_factory=PixelCounter)
    paths: list[str] = field(default_factory=list)
    numbers: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    def add(self, outputs: Outputs, batch: Mapping[str, Any], joined: Tensor | None = None) -> None:
        """Count a batch: the published maps, or those that were joined with references', (B, S, S)."""
        maps = (anomaly_map(outputs, batch["mask"].shape[-1], self.domain) if joined is None else joined).float()
        if self.masked:
            self.pixels.update(maps, batch["mask"].flatten(0, 1), batch["image_path"])
        self.paths += batch["image_path"]
        low, high = torch.aminmax(maps.flatten(1), dim=1)
        det = det_scores(outputs, self.det_score).float()
        # Fetched when the class is complete: each batch would wait for the device.
        self.numbers.append(torch.stack([high, low, det]))
        self.labels.append(batch["label"])

    def result(self, class_name: str) -> ClassResult:
        """The class's metrics, once all its images are in."""
        maxima, minima, det = torch.cat(self.numbers, dim=1).cpu()
        labels = torch.cat(self.labels).to(det)
        scores = class_image_scores(maxima, minima, det, self.domain)
        of_images = image_metrics(labels.numpy(), scores.numpy(), self.paths)
        if labels.all():
            # AP and F1-max would be 100, whatever the model says.
            of_images = dict.fromkeys(of_images)
        pairs = zip(self.paths, labels.tolist(), scores.tolist(), strict=True)
        images = tuple(ImageScore(path, bool(label), score) for path, label, score in pairs)
        return ClassResult(class_name, {**self.pixels.result(), **of_images}, images)


@torch.inference_mode()
def evaluate(
    models: Mapping[str, Detector],
    data: TaskData,
    device: torch.device | str,
    batch_size: int = 8,
    num_workers: int = 0,
    precision: str = "auto",
) -> dict[str, Evaluation]:
    """Evaluate models that share one CLIP on all images of `data`, which are loaded once.

    Frozen features of an image are computed once for all models that look at the same ones. Image scores take the det
    score that each detector says. A class that a detector has references of is scored by maps joined with theirs
    (docs/method.md, "References").
    Scores are normalised per class (docs/method.md, "Scores"), so a class's metrics are taken when it is complete. Maps
    are counted and not kept.
    Raises `UserError` for images that cannot be read, and names the first image whose map is not finite.
    """
    clip = next(iter(models.values())).clip
    prompts = data.prompts(clip).to(device)
    domain = data.located.spec.domain
    text_sides = {name: detector.text_side(prompts) for name, detector in models.items()}
    results: dict[str, list[ClassResult]] = {name: [] for name in models}
    samples = make_dataset(data, clip)
    loader = evaluation_loader(samples, batch_size, num_workers, torch.device(device).type == "cuda")
    bar = progress_bar(len(samples), f"evaluating on {data.located.spec.name}")
    for class_name, batches in groupby(loader, key=lambda batch: batch["class_name"][0]):
        masked = not data.lacking_masks(class_name)
        scores = {name: _ClassScores(domain, detector.det_score, masked) for name, detector in models.items()}
        for batch in batches:
            images = batch["image"].to(device, non_blocking=True)
            rows = torch.full((len(images),), data.classes.index(class_name), device=device)
            shared = SharedStreams()
            for name, kept in scores.items():
                with autocast(device, precision):
                    outputs = models[name].model(images, text_sides[name], rows, shared)
                    joined = joined_map_of(models[name], class_name, outputs, images, domain)
                kept.add(outputs, batch, joined)
            bar.update(len(images))
        for name, kept in scores.items():
            results[name].append(kept.result(class_name))
    bar.close()
    dataset = data.located.spec.name
    return {name: Evaluation(name, dataset, rows, models[name].det_score) for name, rows in results.items()}


def joined_map_of(detector: Detector, class_name: str, outputs: Outputs, images: Tensor, domain: str) -> Tensor | None:
    """Published maps joined with the references that a detector has of a class, (B, S, S); None without any."""
    references = detector.references.get(readable_name(class_name))
    if references is None:
        return None
    distances = detector.reference_maps(references, outputs, images)
    return joined_anomaly_map(outputs, distances, references.weight, domain)


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Half precision where it is asked for, a context that changes nothing otherwise."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choose_precision(device, precision))
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None)


def said_of_det_score(det_score: str) -> str:
    """What is added to a heading where image scores are not the published ones."""
    return "" if det_score == DET_SCORES[0] else f", image scores with det score {det_score}"


def det_score_suffix(det_score: str) -> str:
    """What is added to a file's name for the same reason, so that it does not take the place of the published one's."""
    return "" if det_score == DET_SCORES[0] else f"_det_{det_score}"


def format_value(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.2f}"


def evaluation_table(evaluation: Evaluation) -> str:
    """One model's metrics: a row per class and the average, which says how many classes it averages."""
    rows = [
        [result.class_name, str(result.images), *(format_value(result.values[metric]) for metric in METRICS)]
        for result in evaluation.classes
    ]
    averages = [evaluation.average(metric) for metric in METRICS]
    images = sum(result.images for result in evaluation.classes)
    rows.append([f"average of {len(evaluation.classes)}", str(images), *(format_value(value) for value, _ in averages)])
    counts = [count for _, count in averages]
    if min(counts) < len(evaluation.classes):
        rows.append(["  defined in", "", *(f"{count} classes" for count in counts)])
    return format_table(["Class", "Images", *METRICS.values()], rows)


def summary_table(evaluations: Sequence[Evaluation]) -> str:
    """Averages of several models, a row each."""
    rows = [[e.model, *(format_value(e.average(metric)[0]) for metric in METRICS)] for e in evaluations]
    return format_table(["Model", *METRICS.values()], rows)


def csv_rows(evaluation: Evaluation) -> list[list[object]]:
    """A row per class and one for the average, in the columns of `CSV_COLUMNS`; undefined values are `n/a`."""
    e = evaluation
    rows = [
        [
            e.model, e.dataset, r.class_name, r.images, r.anomalous, e.det_score,
            *(format_exact(r.values[m]) for m in METRICS),
        ]
        for r in e.classes
    ]  # fmt: skip
    images, anomalous = (sum(getattr(result, name) for result in e.classes) for name in ("images", "anomalous"))
    averages = [format_exact(e.average(metric)[0]) for metric in METRICS]
    return [*rows, [e.model, e.dataset, "average", images, anomalous, e.det_score, *averages]]


def write_csv(evaluations: Sequence[Evaluation], path: Path) -> None:
    """A row per model and class and one for each average; undefined values are `n/a`."""
    write_csv_rows([row for evaluation in evaluations for row in csv_rows(evaluation)], path)


def write_csv_rows(rows: Sequence[Sequence[object]], path: Path) -> None:
    """Write rows of `csv_rows` under their header, whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([CSV_COLUMNS, *rows])
    write_text(path, text.getvalue())


def format_exact(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.6f}"
