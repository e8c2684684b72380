"""Zero-shot evaluation: scores and metrics per class, for one or several models on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from dataset.catalog import CATALOG
from dataset.images import read_image
from dataset.prompts import readable_name
from engine.config.evaluation import ProtocolArguments, Thresholds
from engine.data.loaders import batches_of_classes, evaluation_loader, make_dataset
from engine.data.task import TaskData
from engine.detector.detector import Detector
from engine.detector.views import Score, score_views
from engine.evaluation.maps import read_truth, resized, write_map
from engine.evaluation.results import DEFAULT_PROTOCOL, PUBLISHED, ClassResult, Evaluation, ImageScore
from engine.runtime.device import choose_precision
from engine.runtime.distributed import from_main_process, gather_in_order, is_distributed, rank_and_world_size
from model.config import TILES
from model.frozen import SharedStreams
from model.references import joined_anomaly_map, joined_calibrated_maps
from model.scoring import Outputs, anomaly_map, calibrated_maps, calibrated_scores, class_image_scores, det_scores
from utils.logging import progress_bar
from utils.metrics import PixelCounter, Pixels, decision_metrics, image_metrics, overkill_at, pixels_of


class BatchScores(NamedTuple):
    """A model's result for a batch.

    numbers: image score, maximum and minimum of the published map, det score, (4, B); pixels: none without masks;
    decided: numbers of pixels for `decision_metrics`, (3,), 0 without thresholds.
    """

    numbers: Tensor
    pixels: tuple[Pixels, ...]
    decided: Tensor

    def to(self, device: torch.device | str) -> BatchScores:
        pixels = tuple(pixels.to(device) for pixels in self.pixels)
        return BatchScores(self.numbers.to(device), pixels, self.decided.to(device))


class _Batch(NamedTuple):
    """A batch of one class's images, with the result of each model."""

    class_name: str
    paths: list[str]
    labels: Tensor
    of_models: dict[str, BatchScores]


@dataclass
class ClassScores:
    """Pixel counts and image numbers of one class, from which its metrics follow.

    published: whether metrics of the published image scores, which need all images of a class, are computed too.
    """

    domain: str
    published: bool
    protocol: ProtocolArguments
    thresholds: Thresholds | None
    decided: list[Tensor] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    numbers: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pixels = PixelCounter(fpr_limit=self.protocol.aupro_limit)

    def add(self, scores: BatchScores, paths: Sequence[str], labels: Tensor) -> None:
        for pixels in scores.pixels:
            self.pixels.add(pixels)
        self.decided.append(scores.decided)
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
            # Scores of other methods have no such part: they are as published.
            normalised = scores if det.isnan().any() else class_image_scores(maxima, minima, det, self.domain)
            published = image_metrics(labels.numpy(), normalised.numpy(), self.paths)
        of_images |= {PUBLISHED + name: value for name, value in published.items()}
        of_images |= self._more_metrics(labels.bool().numpy(), scores.numpy())
        if labels.all():
            # AP and F1-max would be 100 for any model.
            of_images = dict.fromkeys(of_images)
        columns = zip(self.paths, labels.bool().tolist(), scores.tolist(), det.tolist(), strict=True)
        decided = torch.stack(self.decided).sum(dim=0).tolist()
        of_pixels = decision_metrics("pixel", *decided) if self.thresholds else {}
        values = {**self.pixels.result(), **of_images, **of_pixels}
        return ClassResult(class_name, values, tuple(ImageScore(*image) for image in columns))

    def _more_metrics(self, labels: NDArray, scores: NDArray) -> dict[str, float | None]:
        """Image metrics at the threshold, and at the rates of the protocol."""
        values: dict[str, float | None] = {}
        if self.thresholds:
            called = scores > self.thresholds[0]
            counts = ((called & labels).sum(), (called & ~labels).sum(), (labels & ~called).sum())
            values |= decision_metrics("image", *map(int, counts))
        if (rate := self.protocol.escape_rate) is not None:
            values["overkill"] = overkill_at(labels, scores, rate)
        if (rate := self.protocol.overkill_rate) is not None:
            values["escape"] = overkill_at(~labels, -scores, rate)
        return values


@torch.inference_mode()
def evaluate(
    models: Mapping[str, Detector],
    data: TaskData,
    device: torch.device | str,
    batch_size: int = 8,
    num_workers: int = 0,
    precision: str = "auto",
    protocol: ProtocolArguments = DEFAULT_PROTOCOL,
    maps_folder: Path | None = None,
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
        protocol: limits, sizes and thresholds of the metrics.
        maps_folder: where to write the last model's maps of which pixel metrics are computed. Default: nowhere.

    Returns:
        The evaluation of each model by its name.

    Raises:
        UserError: an image cannot be read, or its map is not finite.
    """
    results: dict[str, list[ClassResult]] = {name: [] for name in models}
    thresholds = {name: class_thresholds(detector, data, protocol) for name, detector in models.items()}
    samples = make_dataset(data, next(iter(models.values())).clip)
    loader = evaluation_loader(
        samples, batch_size, num_workers, torch.device(device).type == "cuda", *rank_and_world_size()
    )
    bar = progress_bar(len(samples), f"evaluating on {data.located.spec.name}")
    batches = gather_in_order(
        _scored(models, data, loader, precision, protocol, thresholds, maps_folder, batch_size),
        len(batches_of_classes(samples, batch_size)),
    )
    for class_name, of_class in groupby(batches, key=lambda batch: batch.class_name):
        how = (data.located.spec.domain, in_catalog(data), protocol)
        scores = {name: ClassScores(*how, thresholds[name].get(class_name)) for name in models}
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
    return {name: Evaluation(name, dataset, rows, models[name].det_score, protocol) for name, rows in results.items()}


def in_catalog(data: TaskData) -> bool:
    """Whether these are the images of a dataset of the catalog, which papers report results on."""
    return CATALOG.get(data.located.spec.name) is data.located.spec


def _anomaly_maps(detector: Detector, class_name: str, outputs: Outputs, images: Tensor, domain: str) -> Tensor:
    """The published maps and those of `Detector.predict`, (2, B, S, S), with the references of the class."""
    size, references = images.shape[-1], detector.references.get(readable_name(class_name))
    if references is None:
        return torch.stack([anomaly_map(outputs, size, domain), calibrated_maps(outputs, size).mean(dim=0)]).float()
    distances = references.maps(detector.model, outputs, images)
    published = joined_anomaly_map(outputs, distances, references.weight, domain)
    own = joined_calibrated_maps(outputs, distances, references.weight).mean(dim=0)
    return torch.stack([published, own]).float()


def _score(
    detector: Detector,
    text_side: Any,
    class_row: tuple[str, int],
    domain: str,
    precision: str,
    images: Tensor,
    shared: SharedStreams | None = None,
) -> tuple[Tensor, Tensor]:
    """`_anomaly_maps` and det scores (B,) of images of a class, whose row in the text side is given."""
    class_name, row = class_row
    with autocast(images.device, precision):
        rows = torch.full((len(images),), row, device=images.device)
        outputs = detector.model(images, text_side, rows, shared)
        maps = _anomaly_maps(detector, class_name, outputs, images, domain)
    return maps, det_scores(outputs, detector.det_score)


def _numbers(maps: Tensor, det: Tensor, domain: str) -> Tensor:
    """`BatchScores.numbers` from `_anomaly_maps` and det scores (B,)."""
    published, own = maps
    low, high = torch.aminmax(published.flatten(1), dim=1)
    return torch.stack([calibrated_scores(own, det, domain), high, low, det.float()]).float()


def _score_tiles(
    detector: Detector, files: Sequence[Path], score: Score, domain: str, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Maps, reduced to the model's size S, and numbers of the images in files, which are read again in full size."""
    size, maps, numbers = detector.clip.img_size, [], []
    for file in files:
        grid = (detector.tiles, size)
        ((blended, det),) = score_views([read_image(file)], detector.as_input, score, grid, batch_size)
        numbers.append(_numbers(blended[:, None], det[None], domain))
        maps.append(F.interpolate(blended[None], size=(size, size), mode="area")[0])
    return torch.stack(maps, dim=1), torch.cat(numbers, dim=1)


def class_thresholds(detector: Detector, data: TaskData, protocol: ProtocolArguments) -> dict[str, Thresholds]:
    """The thresholds of each class: those of the protocol, or else of the model's calibration, if it has any."""
    if protocol.thresholds is not None:
        return dict.fromkeys(data.classes, protocol.thresholds)
    thresholds = {}
    for name in data.classes if detector.calibration else ():
        entry = detector.thresholds(detector.calibration_key(name, data.located.spec.domain, class_names=data.names))
        if entry is not None:
            thresholds[name] = (entry.image_threshold, entry.pixel_threshold)
    return thresholds


def count_pixels(
    maps: Tensor, own_maps: Tensor, truths: Sequence[Tensor], paths: Sequence[str], thresholds: Thresholds | None
) -> tuple[tuple[Pixels, ...], Tensor]:
    """The pixels and decisions of `BatchScores`.

    maps, own_maps: for metrics and for thresholds, (B, H, W) each; truths: masks (n, H, W) of one size each, to which
    maps are resized, and of all images together or of none.
    """
    pixels, decided, first = [], torch.zeros(3, dtype=torch.long, device=maps.device), 0
    for truth in truths:
        rows, size = slice(first, first + len(truth)), truth.shape[-2:]
        first += len(truth)
        pixels.append(pixels_of(resized(maps[rows], size), truth, paths[rows]))
        if thresholds:
            called, anomalous = resized(own_maps[rows], size) > thresholds[1], truth.to(maps.device) > 0.5
            decided += torch.stack([called & anomalous, called & ~anomalous, anomalous & ~called]).flatten(1).sum(dim=1)
    return tuple(pixels), decided


def _scored(
    models: Mapping[str, Detector],
    data: TaskData,
    loader: DataLoader,
    precision: str,
    protocol: ProtocolArguments,
    thresholds: Mapping[str, Mapping[str, Thresholds]],
    maps_folder: Path | None,
    batch_size: int,
) -> Iterator[_Batch]:
    """The models' results for this process's batches, on the CPU if another process counts them.

    thresholds: of each model and class.
    """
    *_, last = models
    device = models[last].device
    prompts = data.prompts(models[last].clip).to(device)
    text_sides = {name: detector.text_side(prompts) for name, detector in models.items()}
    domain = data.located.spec.domain
    masked = {name: not data.lacking_masks(name) for name in data.classes}
    records = {record.image_path: record for record in data.records}
    published = in_catalog(data)
    if precision == "auto" and not published:
        precision = "fp32"  # as in `predict`, so that the same scores are reported
    for batch in loader:
        class_name, paths = batch["class_name"][0], batch["image_path"]
        truths = [batch["mask"].flatten(0, 1)] if masked[class_name] else []
        if protocol.map_size is not None and truths:
            truths = [read_truth(data, records[path], protocol.map_size) for path in paths]
        images = batch["image"].to(device, non_blocking=True)
        of_models, shared = {}, SharedStreams()
        for name, detector in models.items():
            row = (class_name, data.classes.index(class_name))
            score = partial(_score, detector, text_sides[name], row, domain, precision)
            if detector.tiles == TILES[0]:
                maps, det = score(images, shared)
                numbers = _numbers(maps, det, domain)
            else:
                files = [data.located.root / path for path in paths]
                maps, numbers = _score_tiles(detector, files, score, domain, batch_size)
            chosen = maps[0 if published else 1]
            counted = count_pixels(chosen, maps[1], truths, paths, thresholds[name].get(class_name))
            scores = BatchScores(numbers, *counted)
            of_models[name] = scores.to("cpu") if is_distributed() else scores
            if maps_folder is not None and name == last:
                for path, anomaly_map in zip(paths, chosen.cpu().numpy(), strict=True):
                    write_map(maps_folder, path, anomaly_map)
        yield _Batch(class_name, paths, batch["label"], of_models)


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Autocast for bf16 and fp16; disabled for fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choose_precision(device, precision))
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None)
