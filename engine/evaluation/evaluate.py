"""Zero-shot evaluation: scores and metrics per class, for one or several models on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dataset.catalog import CATALOG
from dataset.prompts import readable_name
from engine.data.loaders import batches_of_classes, evaluation_loader, make_dataset
from engine.data.task import TaskData
from engine.detector.detector import Detector
from engine.runtime.device import choose_precision
from engine.runtime.distributed import from_main_process, gather_in_order, is_distributed, rank_and_world_size
from model.config import DET_SCORES
from model.frozen import SharedStreams
from model.references import joined_anomaly_map, joined_calibrated_maps
from model.scoring import Outputs, anomaly_map, calibrated_maps, calibrated_scores, class_image_scores, det_scores
from utils.logging import progress_bar
from utils.metrics import PixelCounter, Pixels, image_metrics, pixels_of
from utils.text import format_table

METRICS = {
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1_max": "Pixel F1-max",
    "aupro": "AUPRO",
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "image_f1_max": "Image F1-max",
    "published_image_auroc": "Published AUROC",
    "published_image_ap": "Published AP",
    "published_image_f1_max": "Published F1-max",
}
PUBLISHED = "published_"
# Table cell of an undefined metric.
UNDEFINED = "n/a"
CSV_COLUMNS = ("model", "dataset", "class", "images", "anomalous", "det_score", *METRICS)


@dataclass(frozen=True)
class ImageScore:
    """An image's path under the dataset's root, whether it is anomalous, and its score as in `Detector.predict`."""

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
    """A model's metrics on a dataset, per class and averaged over the classes in which they are defined."""

    model: str
    dataset: str
    classes: list[ClassResult]
    det_score: str = DET_SCORES[0]

    @property
    def metrics(self) -> dict[str, str]:
        """Titles of the metrics that are reported: those of published scores only if they are defined in a class."""
        return {
            name: title for name, title in METRICS.items() if not name.startswith(PUBLISHED) or self.average(name)[1]
        }

    def average(self, metric: str) -> tuple[float | None, int]:
        """The mean of a metric in percent, and the number of classes in which it is defined."""
        values = [value for result in self.classes if (value := result.values[metric]) is not None]
        return (sum(values) / len(values) if values else None), len(values)

    @property
    def total(self) -> ClassResult:
        """The averages, with the images of all classes."""
        values = {metric: self.average(metric)[0] for metric in METRICS}
        return ClassResult("average", values, tuple(image for result in self.classes for image in result.scores))


class _BatchScores(NamedTuple):
    """A model's result for a batch.

    pixels: None without masks; numbers: image score, maximum and minimum of the published map, det score, (4, B).
    """

    pixels: Pixels | None
    numbers: Tensor

    def to(self, device: torch.device | str) -> _BatchScores:
        return _BatchScores(self.pixels and self.pixels.to(device), self.numbers.to(device))


class _Batch(NamedTuple):
    """A batch of one class's images, with the result of each model."""

    class_name: str
    paths: list[str]
    labels: Tensor
    of_models: dict[str, _BatchScores]


@dataclass
class _ClassScores:
    """Pixel counts and image numbers of one class, from which its metrics follow.

    published: whether metrics of the published image scores, which need all images of a class, are computed too.
    """

    domain: str
    published: bool
    pixels: PixelCounter = field(default_factory=PixelCounter)
    paths: list[str] = field(default_factory=list)
    numbers: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    def add(self, scores: _BatchScores, paths: Sequence[str], labels: Tensor) -> None:
        if scores.pixels is not None:
            self.pixels.add(scores.pixels)
        self.paths += paths
        self.numbers.append(scores.numbers)
        self.labels.append(labels)

    def result(self, class_name: str) -> ClassResult:
        """The class's metrics, after all its images have been added."""
        scores, maxima, minima, det = torch.cat(self.numbers, dim=1).cpu()
        labels = torch.cat(self.labels).to(det)
        of_images = image_metrics(labels.numpy(), scores.numpy(), self.paths)
        published = dict.fromkeys(of_images)
        if self.published:
            normalised = class_image_scores(maxima, minima, det, self.domain)
            published = image_metrics(labels.numpy(), normalised.numpy(), self.paths)
        of_images |= {PUBLISHED + name: value for name, value in published.items()}
        if labels.all():
            # AP and F1-max would be 100 for any model.
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

    Image scores are those of `Detector.predict`. Datasets of the catalog also get the metrics of the published image
    scores, which are normalised over all images of a class, and their pixel metrics are those of the published maps;
    other images use the maps of `predict` (docs/method.md, "Scores"). Frozen features are computed once for all models
    that use the same ones, and maps are counted, not kept. Several processes share the batches, and return the results
    of one process.

    Args:
        models: the models by name, with their det scores and references.
        data: the images and class names.
        device: where the models are.
        batch_size: images in a forward pass, all of one class.
        num_workers: processes that load images.
        precision: "fp32", "bf16", "fp16", or "auto" (bf16 on a GPU that has it, for a dataset of the catalog).

    Returns:
        The evaluation of each model by its name.

    Raises:
        UserError: an image cannot be read, or its map is not finite.
    """
    results: dict[str, list[ClassResult]] = {name: [] for name in models}
    samples = make_dataset(data, next(iter(models.values())).clip)
    loader = evaluation_loader(
        samples, batch_size, num_workers, torch.device(device).type == "cuda", *rank_and_world_size()
    )
    bar = progress_bar(len(samples), f"evaluating on {data.located.spec.name}")
    batches = gather_in_order(
        _scored(models, data, loader, device, precision), len(batches_of_classes(samples, batch_size))
    )
    for class_name, of_class in groupby(batches, key=lambda batch: batch.class_name):
        scores = {name: _ClassScores(data.located.spec.domain, in_catalog(data)) for name in models}
        for batch in of_class:
            for name, class_scores in scores.items():
                of_batch = batch.of_models[name]
                class_scores.add(of_batch.to(device) if is_distributed() else of_batch, batch.paths, batch.labels)
            bar.update(len(batch.paths))
        for name, class_scores in scores.items():
            results[name].append(class_scores.result(class_name))
    bar.close()
    results = from_main_process(lambda: results)
    dataset = data.located.spec.name
    return {name: Evaluation(name, dataset, rows, models[name].det_score) for name, rows in results.items()}


def in_catalog(data: TaskData) -> bool:
    """Whether these are the images of a dataset of the catalog, which papers report results on."""
    return CATALOG.get(data.located.spec.name) is data.located.spec


def _anomaly_maps(
    detector: Detector, class_name: str, outputs: Outputs, images: Tensor, domain: str
) -> tuple[Tensor, Tensor]:
    """The published maps and those of `Detector.predict`, (B, S, S) each, with the references of the class."""
    size, references = images.shape[-1], detector.references.get(readable_name(class_name))
    if references is None:
        return anomaly_map(outputs, size, domain), calibrated_maps(outputs, size).mean(dim=0)
    distances = references.maps(detector.model, outputs, images)
    published = joined_anomaly_map(outputs, distances, references.weight, domain)
    return published, joined_calibrated_maps(outputs, distances, references.weight).mean(dim=0)


def _scored(
    models: Mapping[str, Detector], data: TaskData, loader: DataLoader, device: torch.device | str, precision: str
) -> Iterator[_Batch]:
    """The models' results for this process's batches, on the CPU if another process counts them."""
    prompts = data.prompts(next(iter(models.values())).clip).to(device)
    text_sides = {name: detector.text_side(prompts) for name, detector in models.items()}
    domain = data.located.spec.domain
    masked = {name: not data.lacking_masks(name) for name in data.classes}
    published = in_catalog(data)
    if precision == "auto" and not published:
        precision = "fp32"  # as in `predict`, so that the same scores are reported
    for batch in loader:
        class_name, masks = batch["class_name"][0], batch["mask"].flatten(0, 1)
        images = batch["image"].to(device, non_blocking=True)
        rows = torch.full((len(images),), data.classes.index(class_name), device=device)
        of_models, shared = {}, SharedStreams()
        for name, detector in models.items():
            with autocast(device, precision):
                outputs = detector.model(images, text_sides[name], rows, shared)
                published_maps, own_maps = (
                    maps.float() for maps in _anomaly_maps(detector, class_name, outputs, images, domain)
                )
            maps = published_maps if published else own_maps
            pixels = pixels_of(maps, masks, batch["image_path"]) if masked[class_name] else None
            low, high = torch.aminmax(published_maps.flatten(1), dim=1)
            score = calibrated_scores(own_maps, outputs, domain, detector.det_score)
            numbers = torch.stack([score, high, low, det_scores(outputs, detector.det_score)]).float()
            scores = _BatchScores(pixels, numbers)
            of_models[name] = scores.to("cpu") if is_distributed() else scores
        yield _Batch(class_name, batch["image_path"], batch["label"], of_models)


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Autocast for bf16 and fp16; disabled for fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choose_precision(device, precision))
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None)


def format_value(value: float | None, digits: int = 2) -> str:
    return UNDEFINED if value is None else f"{value:.{digits}f}"


def evaluation_table(evaluation: Evaluation, unit: str = "class", units: str = "classes") -> str:
    """One model's metrics: a row for each class, or each unit of another kind, and the average."""
    metrics = evaluation.metrics
    rows = [
        [result.class_name, str(result.images), *(format_value(result.values[metric]) for metric in metrics)]
        for result in (*evaluation.classes, evaluation.total)
    ]
    rows[-1][0] = f"average of {len(evaluation.classes)}"
    counts = [evaluation.average(metric)[1] for metric in metrics]
    if min(counts) < len(evaluation.classes):
        rows.append(["  defined in", "", *(f"{count} {units}" for count in counts)])
    return format_table([unit.capitalize(), "Images", *metrics.values()], rows)


def summary_table(evaluations: Sequence[Evaluation]) -> str:
    """Averages of several models, a row each."""
    metrics = evaluations[0].metrics
    rows = [[e.model, *(format_value(e.average(metric)[0]) for metric in metrics)] for e in evaluations]
    return format_table(["Model", *metrics.values()], rows)


def csv_rows(evaluation: Evaluation) -> list[list[object]]:
    """A row per class and one for the average, in the columns of `CSV_COLUMNS`; undefined values are `n/a`."""
    rows: list[list[object]] = []
    for each in (*evaluation.classes, evaluation.total):
        counts, metrics = (each.images, each.anomalous), [format_value(each.values[metric], 6) for metric in METRICS]
        rows.append([evaluation.model, evaluation.dataset, each.class_name, *counts, evaluation.det_score, *metrics])
    return rows
