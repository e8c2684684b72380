"""The metrics of evaluations, as tables and CSV files."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.evaluation import ProtocolArguments
from model.config import DET_SCORES
from utils.metrics import DECISION_METRICS
from utils.text import csv_table, format_table

METRICS = {
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1_max": "Pixel F1-max",
    "aupro": "AUPRO",
    "aupimo": "AUPIMO",
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "image_f1_max": "Image F1-max",
    "published_image_auroc": "Published AUROC",
    "published_image_ap": "Published AP",
    "published_image_f1_max": "Published F1-max",
}
# Metrics that need a threshold or a rate, and are reported if there is one.
MORE_METRICS = {
    **{
        f"{kind}_{name}": f"{kind.title()} {title}"
        for kind in ("image", "pixel")
        for name, title in DECISION_METRICS.items()
    },
    "overkill": "Overkill",
    "escape": "Escape",
}
PUBLISHED = "published_"
# Table cell of an undefined metric.
UNDEFINED = "n/a"
# The name of the row after those of the classes.
AVERAGE = "average"
CSV_COLUMNS = ("model", "dataset", "class", "images", "anomalous", "det_score", "aupro_limit", "map_size", *METRICS)
DEFAULT_PROTOCOL = ProtocolArguments()


@dataclass(frozen=True)
class ImageScore:
    """An image's path under the dataset's root, whether it is anomalous, its score as in `Detector.predict`, and `det`.

    det: the det score, which is a part of the score.
    """

    path: str
    anomalous: bool
    score: float
    det: float = 0.0


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
    protocol: ProtocolArguments = DEFAULT_PROTOCOL

    @property
    def metrics(self) -> dict[str, str]:
        """Titles of the metrics that are reported: those of published scores and more only if defined in a class."""
        return {
            name: title
            for name, title in {**METRICS, **MORE_METRICS}.items()
            if (name in METRICS and not name.startswith(PUBLISHED)) or self.average(name)[1]
        }

    def average(self, metric: str) -> tuple[float | None, int]:
        """The mean of a metric in percent, and the number of classes in which it is defined."""
        values = [value for result in self.classes if (value := result.values.get(metric)) is not None]
        return (sum(values) / len(values) if values else None), len(values)

    @property
    def total(self) -> ClassResult:
        """The averages, with the images of all classes."""
        values = {metric: self.average(metric)[0] for metric in (*METRICS, *MORE_METRICS)}
        return ClassResult(AVERAGE, values, tuple(image for result in self.classes for image in result.scores))


def format_value(value: float | None, digits: int = 2) -> str:
    return UNDEFINED if value is None else f"{value:.{digits}f}"


def evaluation_table(evaluation: Evaluation, unit: str = "class", units: str = "classes") -> str:
    """One model's metrics: a row for each class, or each unit of another kind, and the average."""
    metrics = evaluation.metrics
    rows = [
        [result.class_name, str(result.images), *(format_value(result.values.get(metric)) for metric in metrics)]
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


def csv_rows(evaluation: Evaluation, more: Sequence[str] = ()) -> list[list[object]]:
    """A row per class and one for the average, in the columns of `CSV_COLUMNS` and of more metrics."""
    rows: list[list[object]] = []
    size = evaluation.protocol.map_size or "model"
    choices = (evaluation.det_score, f"{evaluation.protocol.aupro_limit:g}", size)
    for each in (*evaluation.classes, evaluation.total):
        metrics = [format_value(each.values.get(metric), 6) for metric in (*METRICS, *more)]
        counts = (each.images, each.anomalous)
        rows.append([evaluation.model, evaluation.dataset, each.class_name, *counts, *choices, *metrics])
    return rows


def evaluation_csv(evaluations: Sequence[Evaluation], averages_only: bool = False) -> str:
    """The CSV file of evaluations; undefined values are `n/a`, and more metrics have a column if they are defined."""
    more = [name for name in MORE_METRICS if any(name in evaluation.metrics for evaluation in evaluations)]
    first = -1 if averages_only else 0
    rows = [row for evaluation in evaluations for row in csv_rows(evaluation, more)[first:]]
    return csv_table([[*CSV_COLUMNS, *more], *rows])


def file_suffix(note: str) -> str:
    """A note on the protocol, as the end of a file's name."""
    return note.replace(", ", "_").replace(" ", "_")
