"""Pixel and image metrics of one class, in percent.

Pixels are counted batch by batch (`utils.pixel_counts`): maps are not kept, so memory does not grow with the images.

References:
    Average precision and precision-recall as scikit-learn defines them: steps, ties taken as one threshold.
    Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021, section 5: per-region overlap.
    Bertoldo et al., AUPIMO, BMVC 2024 (arXiv:2401.01984): per-image overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from utils.errors import UserError
from utils.pixel_counts import Bins, PixelCounts, score_keys
from utils.regions import EIGHT_CONNECTED

FPR_LIMIT = 0.3
# False positive rates on normal images between which AUPIMO is integrated.
AUPIMO_LIMITS = (1e-5, 1e-4)
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro", "aupimo")
DECISION_METRICS = {"precision": "precision", "recall": "recall", "f1": "F1", "iou": "IoU"}
IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")


def pixel_metrics(
    bins: Bins, all_normals: int, all_clean: int, fpr_limit: float = FPR_LIMIT
) -> dict[str, float | None]:
    """AUROC, AP, F1-max, AUPRO and AUPIMO in percent, None if undefined; pixels of a bin are ties.

    all_normals, all_clean: numbers of normal pixels, and of pixels of normal images.
    """
    if len(bins.positives) == 0:
        return dict.fromkeys(PIXEL_METRICS)
    auroc = aupro = None
    if all_normals:
        auroc = _area(bins, bins.positives, all_normals, 1.0)
        aupro = _area(bins, bins.coverage, all_normals, fpr_limit)
    aupimo = _aupimo(bins, all_clean) if all_clean else None
    return dict(zip(PIXEL_METRICS, (auroc, _average_precision(bins), _f1_max(bins), aupro, aupimo), strict=True))


def _area(bins: Bins, weights: np.ndarray, all_normals: int, limit: float) -> float:
    """Area under (false positive rate, covered share of `weights`) from 0 to `limit`, divided by `limit`.

    In a bin the curve runs along the diagonal from one corner of a rectangle to the opposite one: the definition's
    trapezoid, which interpolates at the limit.
    """
    heights = weights / weights.sum()
    start = np.minimum(bins.normals_above / all_normals, limit)
    end = (bins.normals_above + bins.normals) / all_normals
    inside = np.minimum(end, limit) - start
    # The share of the rectangle's width that lies before the limit is also how high the diagonal gets there.
    reached = np.divide(inside, end - start, out=np.zeros_like(inside), where=end > start)
    area = heights * (limit - start - inside + inside * reached / 2)
    return 100.0 * float(area.sum()) / limit


def _aupimo(bins: Bins, all_clean: int) -> float:
    """Mean over anomalous images of the overlap, over the logarithm of the normal images' false positive rate.

    The trapezoid of the authors' code, with interpolation at the limits. Below the smallest rate above 0 that a
    threshold reaches, the overlap is that without false positives.
    """
    low, high = np.log(AUPIMO_LIMITS)
    smallest = np.finfo(float).tiny  # of which the logarithm is finite
    start, end = bins.clean_above / all_clean, (bins.clean_above + bins.clean) / all_clean
    end = np.log(np.maximum(end, smallest))
    start = np.where(start > 0, np.log(np.maximum(start, smallest)), end)

    def area_until(limit: float) -> NDArray:
        """Below a line that rises from 0 at `start` to 1 at `end` and stays there."""
        rising = np.clip(limit - start, 0, end - start)
        slope = np.divide(rising, end - start, out=np.zeros_like(rising), where=end > start)
        return rising * slope / 2 + np.maximum(limit - end, 0)

    areas = bins.overlap * (area_until(high) - area_until(low))
    return 100.0 * float(areas.sum() / bins.overlap.sum() / (high - low))


def _average_precision(bins: Bins) -> float:
    through = bins.positives.cumsum()
    precision = through / (through + (bins.normals_above + bins.normals))
    return float((100.0 * bins.positives / through[-1] * precision).sum())


def _f1_max(bins: Bins) -> float:
    through = bins.positives.cumsum()
    return float((200.0 * through / (through[-1] + (through + bins.normals_above) + bins.normals)).max())


class Pixels(NamedTuple):
    """A batch of maps as it is counted, all on one device.

    scores: (B, n) float32; positives: keys of the anomalous pixels, (p,) int32; shares: which share of its region, and
    of its image's anomalous pixels, each of these is, (p, 2) float64; normal: images without any, (B,) bool.
    """

    scores: Tensor
    positives: Tensor
    shares: Tensor
    normal: Tensor

    def to(self, device: torch.device | str) -> Pixels:
        return Pixels(*(part.to(device) for part in self))


@torch.no_grad()
def pixels_of(maps: Tensor, masks: Tensor, names: Sequence[str]) -> Pixels:
    """A batch for `PixelCounter.add`; arguments and errors are those of `PixelCounter.update`."""
    # Apple's GPUs have no float64, which shares need.
    maps = maps.detach().to(device="cpu" if maps.device.type == "mps" else None, dtype=torch.float32)
    if maps.numel():
        check_finite(maps, names)
    anomalous = (masks if masks.dtype == torch.bool else masks > 0.5).cpu()
    positions, shares = region_shares(anomalous.numpy())
    scores = maps.flatten(1)
    positives = score_keys(scores.reshape(-1)[torch.from_numpy(positions).to(maps.device)])
    return Pixels(scores, positives, torch.from_numpy(shares).to(maps.device), ~anomalous.flatten(1).any(dim=1))


class PixelCounter:
    """Pixel AUROC, AP, F1-max, AUPRO and AUPIMO of one class's maps, from batches that are not kept.

        counter = PixelCounter()
        for maps, masks, names in batches:
            counter.update(maps, masks, names)
        values = counter.result()

    Scores are counted as float32, on the device of the first batch; float64 scores that are equal as float32 are ties.

    Accuracy: exact up to `buffer` pixels. Beyond them, pixels of one bin count as ties. No metric of a model's maps was
    off by more than 0.005 percentage points, in any order of the images. The error can be larger if the first `buffer`
    pixels covered an interval sparsely and many later pixels lie in a tiny part of it.

    Memory does not grow with the number of images: with the default sizes, up to 16 MiB for kept pixels, 20 bytes for
    each kept anomalous pixel, and 82 MiB for bins.

    Args:
        bins: the maximum number of bins, at least 65536.
        buffer: how many pixels are kept before there are bins.
        fpr_limit: the false positive rate up to which AUPRO is integrated.
    """

    def __init__(self, bins: int = 1 << 21, buffer: int = 1 << 22, fpr_limit: float = FPR_LIMIT) -> None:
        self.fpr_limit = fpr_limit
        self.counts = PixelCounts(bins, buffer)
        self._normals = self._clean = 0

    def update(self, maps: Tensor, masks: Tensor, names: Sequence[str]) -> None:
        """Count a batch.

        Args:
            maps: (B, H, W) scores, higher is more anomalous.
            masks: (B, H, W), anomalous where above 0.5, on any device.
            names: the B images' names, for messages.

        Raises:
            UserError: a score is NaN or infinite; nothing of the batch is counted then.
        """
        self.add(pixels_of(maps, masks, names))

    @torch.no_grad()
    def add(self, pixels: Pixels) -> None:
        """Count the pixels of a batch, which may come from another process.

        With more than `buffer` pixels, results depend on the order of images, but not on the batches.
        """
        normal = pixels.normal.tolist()
        for image, is_normal in zip(pixels.scores, normal, strict=True):
            self.counts.add(score_keys(image), is_normal)
        self.counts.add_positives(pixels.positives, pixels.shares)
        self._normals += pixels.scores.numel() - len(pixels.positives)
        self._clean += pixels.scores.shape[1] * sum(normal)

    def result(self) -> dict[str, float | None]:
        """The `PIXEL_METRICS` in percent, None if undefined."""
        return pixel_metrics(self.counts.bins(), self._normals, self._clean, self.fpr_limit)


def check_finite(maps: Tensor, names: Sequence[str]) -> None:
    """Raise a UserError that names the first of the images whose map (B, H, W) holds NaN or infinity."""
    if torch.stack(torch.aminmax(maps)).isfinite().all():
        return
    finite = maps.flatten(1).isfinite().all(dim=1).tolist()
    raise UserError(f"the anomaly map of {names[finite.index(False)]} is not finite (as float32): no metrics of it")


def region_shares(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Anomalous pixels of masks (B, H, W) bool: their positions in the flat batch, and their shares, (p,) and (p, 2).

    A pixel of a region (8-connected, inside one image) of n pixels, in an image with m anomalous pixels, has the shares
    1 / n and 1 / m.
    """
    shares = [_shares(mask) for mask in masks if mask.any()]
    return np.flatnonzero(masks), np.concatenate([np.zeros((0, 2)), *shares])


def _shares(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    # Most defects are small: their box is labelled much faster than the image.
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    labels = ndimage.label(box, structure=EIGHT_CONNECTED)[0][box]
    return np.stack([1.0 / np.bincount(labels)[labels], np.full(len(labels), 1.0 / len(labels))], axis=1)


def image_metrics(labels: NDArray, scores: NDArray, names: Sequence[str]) -> dict[str, float | None]:
    """Image metrics of one class, by scikit-learn.

    Args:
        labels: (n,), 1 or True for anomalous images.
        scores: (n,), higher is more anomalous.
        names: the n images' names, for messages.

    Returns:
        `image_auroc`, `image_ap` and `image_f1_max` in percent; None if undefined.

    Raises:
        UserError: a score is NaN or infinite.
    """
    from sklearn import metrics  # takes a second to import, so only for evaluations

    finite = np.isfinite(scores)
    if not finite.all():
        raise UserError(f"the score of {names[int(np.argmin(finite))]} is not finite: no metrics of it")
    anomalous = np.asarray(labels, dtype=bool)
    if not anomalous.any():
        return dict.fromkeys(IMAGE_METRICS)
    precision, recall, _ = metrics.precision_recall_curve(anomalous, scores)
    # Both are 0 above the highest anomalous score.
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    values = (
        None if anomalous.all() else metrics.roc_auc_score(anomalous, scores),
        metrics.average_precision_score(anomalous, scores),
        f1.max(),
    )
    return {
        name: None if value is None else 100 * float(value) for name, value in zip(IMAGE_METRICS, values, strict=True)
    }


def decision_metrics(kind: str, hits: float, false_alarms: float, misses: float) -> dict[str, float | None]:
    """Precision, recall, F1 and IoU of decisions in percent, by `KIND_precision` and so on.

    Precision is 0 if nothing is called anomalous, as in scikit-learn; all are None if nothing is anomalous. The
    arguments are counts of true positives, false positives and false negatives.
    """
    names = [f"{kind}_{name}" for name in DECISION_METRICS]
    if not hits + misses:
        return dict.fromkeys(names)
    precision = hits / max(hits + false_alarms, 1)
    f1, iou = 2 * hits / (2 * hits + false_alarms + misses), hits / (hits + false_alarms + misses)
    return dict(zip(names, (100 * value for value in (precision, hits / (hits + misses), f1, iou)), strict=True))


def overkill_at(labels: NDArray, scores: NDArray, escape_rate: float) -> float | None:
    """The percentage of normal images above the highest threshold that misses at most a share of the anomalous ones.

    With labels and signs of scores inverted, it is the escape rate at an overkill rate. None without normal or without
    anomalous images.
    """
    anomalous = np.asarray(labels, dtype=bool)
    if anomalous.all() or not anomalous.any():
        return None
    ascending = np.sort(scores[anomalous])
    missed = int(escape_rate * len(ascending) + 1e-9)  # 0.29 times 100 is below 29
    return 100.0 * float((scores[~anomalous] >= ascending[missed]).mean()) if missed < len(ascending) else 0.0
