"""Pixel and image metrics of one class, in percent.

Pixels are counted batch by batch (`utils.pixel_counts`): maps are not kept, so memory does not grow with the images.

References:
    Average precision and precision-recall as scikit-learn defines them: steps, ties taken as one threshold.
    Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021, section 5: per-region overlap.
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
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro")
IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")


def pixel_metrics(bins: Bins, all_normals: int, fpr_limit: float = FPR_LIMIT) -> dict[str, float | None]:
    """AUROC, AP, F1-max and AUPRO in percent, None if undefined; pixels of a bin are ties."""
    if len(bins.positives) == 0:
        return dict.fromkeys(PIXEL_METRICS)
    auroc = aupro = None
    if all_normals:
        auroc = _area(bins, bins.positives, all_normals, 1.0)
        aupro = _area(bins, bins.coverage, all_normals, fpr_limit)
    return dict(zip(PIXEL_METRICS, (auroc, _average_precision(bins), _f1_max(bins), aupro), strict=True))


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


def _average_precision(bins: Bins) -> float:
    through = bins.positives.cumsum()
    precision = through / (through + (bins.normals_above + bins.normals))
    return float((100.0 * bins.positives / through[-1] * precision).sum())


def _f1_max(bins: Bins) -> float:
    through = bins.positives.cumsum()
    return float((200.0 * through / (through[-1] + (through + bins.normals_above) + bins.normals)).max())


class Pixels(NamedTuple):
    """A batch of maps as it is counted, all on one device.

    scores: (B, n) float32; positives: keys of the anomalous pixels, (p,) int32; coverage: the share of its region that
    each of these is, (p,) float64.
    """

    scores: Tensor
    positives: Tensor
    coverage: Tensor

    def to(self, device: torch.device | str) -> Pixels:
        return Pixels(*(part.to(device) for part in self))


@torch.no_grad()
def pixels_of(maps: Tensor, masks: Tensor, names: Sequence[str]) -> Pixels:
    """A batch for `PixelCounter.add`; arguments and errors are those of `PixelCounter.update`."""
    # Apple's GPUs have no float64, which coverage needs.
    maps = maps.detach().to(device="cpu" if maps.device.type == "mps" else None, dtype=torch.float32)
    if maps.numel():
        check_finite(maps, names)
    positions, coverage = region_coverage((masks if masks.dtype == torch.bool else masks > 0.5).cpu().numpy())
    scores = maps.flatten(1)
    positives = score_keys(scores.reshape(-1)[torch.from_numpy(positions).to(maps.device)])
    return Pixels(scores, positives, torch.from_numpy(coverage).to(maps.device))


class PixelCounter:
    """Pixel AUROC, AP, F1-max and AUPRO of one class's maps, from batches that are not kept.

        counter = PixelCounter()
        for maps, masks, names in batches:
            counter.update(maps, masks, names)
        values = counter.result()

    Scores are counted as float32, on the device of the first batch; float64 scores that are equal as float32 are ties.

    Accuracy: exact up to `buffer` pixels. Beyond them, pixels of one bin count as ties. No metric of a model's maps was
    off by more than 0.005 percentage points, in any order of the images. The error can be larger if the first `buffer`
    pixels covered an interval sparsely and many later pixels lie in a tiny part of it.

    Memory does not grow with the number of images: with the default sizes, up to 16 MiB for kept pixels, 12 bytes for
    each kept anomalous pixel, and 50 MiB for bins.

    Args:
        bins: the maximum number of bins, at least 65536.
        buffer: how many pixels are kept before there are bins.
        fpr_limit: the false positive rate up to which AUPRO is integrated.
    """

    def __init__(self, bins: int = 1 << 21, buffer: int = 1 << 22, fpr_limit: float = FPR_LIMIT) -> None:
        self.fpr_limit = fpr_limit
        self.counts = PixelCounts(bins, buffer)
        self._normals = 0

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
        for image in pixels.scores:
            self.counts.add(score_keys(image))
        self.counts.add_positives(pixels.positives, pixels.coverage)
        self._normals += pixels.scores.numel() - len(pixels.positives)

    def result(self) -> dict[str, float | None]:
        """`pixel_auroc`, `pixel_ap`, `pixel_f1_max` and `aupro` in percent, None if undefined."""
        return pixel_metrics(self.counts.bins(), self._normals, self.fpr_limit)


def check_finite(maps: Tensor, names: Sequence[str]) -> None:
    """Raise a UserError that names the first of the images whose map (B, H, W) holds NaN or infinity."""
    if torch.stack(torch.aminmax(maps)).isfinite().all():
        return
    finite = maps.flatten(1).isfinite().all(dim=1).tolist()
    raise UserError(f"the anomaly map of {names[finite.index(False)]} is not finite (as float32): no metrics of it")


def region_coverage(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Anomalous pixels of masks (B, H, W) bool: their positions in the flat batch and what each adds to its region.

    A pixel of a region (8-connected, inside one image) of n pixels covers 1 / n of it. Both (p,), in the same order.
    """
    shares = [_shares(mask) for mask in masks if mask.any()]
    return np.flatnonzero(masks), np.concatenate([np.zeros(0), *shares])


def _shares(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    # Most defects are small: their box is labelled much faster than the image.
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    labels = ndimage.label(box, structure=EIGHT_CONNECTED)[0][box]
    return 1.0 / np.bincount(labels)[labels]


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
