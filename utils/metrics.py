"""Pixel metrics counted batch by batch: no map is kept, so that memory does not grow with the images.

float32 scores are ordered as integer keys. The first values are kept as they are: small inputs need no bins at all.
When there are more, those values choose a histogram over the keys, fine where ranks decide a metric and coarse
elsewhere, that all pixels go through. Pixels of one bin count as ties, as if they had one score.

References:
    Average precision and precision-recall as scikit-learn defines them: steps, ties taken as one threshold.
    Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021, section 5: per-region overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from utils.errors import UserError

FPR_LIMIT = 0.3

# A key's upper half is its coarse bin: sign, exponent and 7 bits of the mantissa.
COARSE_BITS = 16
COARSE_BINS = 1 << COARSE_BITS
# An origin that makes the index of a bin negative, whatever the key.
NOWHERE = -(1 << 30)
MAGNITUDE = 0x7FFFFFFF
# How many pixels fit into int32 counters.
CARRY = 2**31 - 1
PIXEL_NAMES = {"auroc": "pixel_auroc", "ap": "pixel_ap", "f1_max": "pixel_f1_max", "aupro": "aupro"}
IMAGE_NAMES = {"auroc": "image_auroc", "ap": "image_ap", "f1_max": "image_f1_max"}
EIGHT_CONNECTED = np.ones((3, 3), dtype=int)


def score_keys(scores: Tensor) -> Tensor:
    """int32 keys in the order of finite float32 scores, equal exactly where the scores are (-0.0 equals 0.0).

    A float's bits are its sign and its magnitude, and magnitudes are in order as integers: the key is the magnitude,
    negated where the sign is set.
    """
    bits = scores.contiguous().view(torch.int32)
    sign = bits >> 31
    return (bits ^ (sign & MAGNITUDE)).sub_(sign)


class CoarseToFine:
    """Bins for all keys: every coarse bin is cut into a power of two of equal ones, up to one per key.

    How fine is decided when its first key comes, which costs no accuracy as nothing has been counted there. That way
    anomalies get fine bins that come late, far above all scores before.

    Args:
        sample: (n,) keys that are typical.
        size: the most bins to use, 65536 at least.
    """

    def __init__(self, sample: Tensor, size: int) -> None:
        self.size = size
        self._known = np.zeros(COARSE_BINS, dtype=bool)
        self._split_bits = np.zeros(COARSE_BINS, dtype=np.int64)
        self._first = np.full(COARSE_BINS, NOWHERE, dtype=np.int64)
        self._order = np.zeros(0, dtype=np.int64)
        counts = coarse_counts(sample)
        # Few pixels come into what the sample lacks below its highest scores: a single bin will do there. Outliers, the
        # highest ten-thousandth, do not count as its highest scores: what lies below them may be anomalies to come.
        ordinary = counts[::-1].cumsum()[::-1] > counts.sum() * 1e-4
        self._cut(ordinary | (counts > 0), counts, sample.device)

    def _cut(self, new: np.ndarray, counts: np.ndarray, device: torch.device) -> None:
        """Give the coarse bins `new` (65536,) their bins, by the counts (65536,) of pixels they come with."""
        wanted = demand(counts)
        share = wanted[new] / wanted.sum()
        # One bin each is set aside; what comes later gets its share of the others while half of the rest covers it.
        spare = self.size - COARSE_BINS - int(((1 << self._split_bits) - 1)[self._known].sum())
        bins = share * min(self.size - COARSE_BINS, spare / 2 / max(share.sum(), np.finfo(float).tiny))
        self._split_bits[new] = np.log2(bins.clip(1, 1 << COARSE_BITS)).astype(np.int64)
        self._known |= new
        taken = int((1 << self._split_bits)[self._order].sum())
        counts_new = 1 << self._split_bits[new]
        self._first[new] = taken + counts_new.cumsum() - counts_new
        self._order = np.append(self._order, np.flatnonzero(new))
        # first + (lower half >> shift) is (key >> shift) + origin, which saves a step for every pixel.
        shift = COARSE_BITS - self._split_bits
        origin = self._first - (lowest_keys(np.arange(COARSE_BINS)) >> shift)
        self._shift, self._origin = (torch.from_numpy(t.astype(np.int32)).to(device) for t in (shift, origin))

    def locate(self, keys: Tensor) -> Tensor:
        index = self._index(keys)
        if int(index.min()) < 0:
            counts = coarse_counts(keys)
            self._cut((counts > 0) & ~self._known, counts, keys.device)
            index = self._index(keys)
        return index

    def _index(self, keys: Tensor) -> Tensor:
        coarse = coarse_bins(keys)
        index = keys >> torch.index_select(self._shift, 0, coarse)
        return index.add_(torch.index_select(self._origin, 0, coarse))

    def descending(self) -> np.ndarray:
        """The bins in use, from the highest scores down."""
        coarse = np.repeat(self._order, 1 << self._split_bits[self._order])
        # Those of one coarse bin ascend together.
        return np.argsort(coarse, kind="stable")[::-1]


def coarse_bins(keys: Tensor) -> Tensor:
    return (keys >> COARSE_BITS).add_(COARSE_BINS // 2)


def coarse_counts(keys: Tensor) -> np.ndarray:
    return torch.bincount(coarse_bins(keys), minlength=COARSE_BINS).cpu().numpy()


def lowest_keys(coarse: np.ndarray) -> np.ndarray:
    return (coarse - COARSE_BINS // 2) << COARSE_BITS


def demand(counts: np.ndarray) -> np.ndarray:
    """How many bins coarse bins (65536,) should get, up to a factor, from the counts of pixels in them.

    Order inside a bin moves precision at rank R by the bin's share of the ranks down to R, so that equal errors take
    bins in proportion to log R. The first thousandths are flat: few of the anomalous pixels lie there.
    """
    reached = counts[::-1].cumsum()[::-1]
    softening = max(1.0, 0.002 * counts.sum())
    return np.log((reached + softening) / (reached - counts + softening))


class Histogram:
    """Pixels, anomalous pixels, and the regions' coverage (each region's pixels sum to 1) in bins."""

    def __init__(self, layout: CoarseToFine, device: torch.device) -> None:
        self.layout = layout
        # int32 counters fill half the cache that int64 ones would; they are emptied before they can overflow.
        self._recent = torch.zeros(layout.size + 1, dtype=torch.int32, device=device)
        self._recent_pixels = 0
        self._earlier: Tensor | None = None
        self._positives = torch.zeros(layout.size + 1, dtype=torch.int64, device=device)
        self._coverage = torch.zeros(layout.size + 1, dtype=torch.float64, device=device)

    @property
    def device(self) -> torch.device:
        return self._recent.device

    def add(self, keys: Tensor) -> None:
        """Count pixels (n,), anomalous or not."""
        if self._recent_pixels + len(keys) > CARRY:
            self._earlier = self._pixels()
            self._recent.zero_()
            self._recent_pixels = 0
        self._recent_pixels += len(keys)
        self._recent.index_add_(0, self.layout.locate(keys), self._recent.new_ones(1).expand(len(keys)))

    def add_positives(self, keys: Tensor, coverage: Tensor) -> None:
        """Count anomalous pixels (n,), which `add` counts as well, with the share (n,) of their region they are."""
        if len(keys) == 0:
            return
        index = self.layout.locate(keys)
        self._positives.index_add_(0, index, self._positives.new_ones(1).expand(len(index)))
        self._coverage.index_add_(0, index, coverage)

    def _pixels(self) -> Tensor:
        recent = self._recent.long()
        return recent if self._earlier is None else recent + self._earlier

    def counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Normal pixels, anomalous pixels and coverage of each bin, (size,) each."""
        pixels, positives, coverage = (
            counts[:-1].cpu().numpy() for counts in (self._pixels(), self._positives, self._coverage)
        )
        return pixels - positives, positives, coverage


@dataclass(frozen=True)
class Bins:
    """The bins that hold anomalous pixels, from the highest score down; all metrics follow from them.

    positives, normals: pixels in each; normals_above: normal pixels in all bins above, those without anomalous pixels
    included; coverage: sum over its anomalous pixels of 1 / (pixels of their region). All (n,).
    """

    positives: np.ndarray
    normals: np.ndarray
    normals_above: np.ndarray
    coverage: np.ndarray

    def take(self, rows: np.ndarray) -> Bins:
        return Bins(*(getattr(self, field.name)[rows] for field in fields(self)))


def bins_of_values(values: np.ndarray, positives: np.ndarray, coverage: np.ndarray) -> Bins:
    """Bins of one value each: exact. values (n,) integers, of which `positives` (p,) are anomalous; coverage (p,)."""
    ordered = np.sort(values)
    found, inverse, counts = np.unique(positives, return_inverse=True, return_counts=True)
    at_least = len(values) - np.searchsorted(ordered, found, side="left")
    more_than = len(values) - np.searchsorted(ordered, found, side="right")
    positives_above = len(positives) - counts.cumsum()
    covered = np.bincount(inverse, weights=coverage, minlength=len(found))
    bins = Bins(counts, at_least - more_than - counts, more_than - positives_above, covered)
    return bins.take(np.arange(len(found))[::-1])


def bins_of_histogram(histogram: Histogram) -> Bins:
    order = histogram.layout.descending()
    normals, positives, coverage = (counts[order] for counts in histogram.counts())
    return Bins(positives, normals, normals.cumsum() - normals, coverage).take(np.flatnonzero(positives))


def metrics_of(bins: Bins, all_normals: int, fpr_limit: float = FPR_LIMIT) -> dict[str, float | None]:
    """AUROC, AP, F1-max and AUPRO in percent, None where undefined; pixels of a bin are ties."""
    if len(bins.positives) == 0:
        return dict.fromkeys(PIXEL_NAMES)
    found = {"ap": _average_precision(bins), "f1_max": _f1_max(bins)}
    if all_normals == 0:
        return {"auroc": None, **found, "aupro": None}
    auroc = _area(bins, bins.positives, all_normals, 1.0)
    return {"auroc": auroc, **found, "aupro": _area(bins, bins.coverage, all_normals, fpr_limit)}


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
    if maps.ndim != 3 or maps.shape != masks.shape or len(names) != len(maps):
        shapes = f"maps {tuple(maps.shape)}, masks {tuple(masks.shape)}, {len(names)} names"
        raise ValueError(f"maps and masks (B, H, W) and B names are needed, not {shapes}")
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

    Scores are counted as float32 where they are, all on one device; float16, bfloat16 and float64 are converted, so
    that float64 scores that float32 cannot tell apart are ties.

    Accuracy: exact up to `buffer` pixels. Beyond them pixels of one bin count as ties; no metric of a model's maps was
    off by more than 0.005 percentage points, and tests hold it to 0.01: maps of trained and unadapted models, narrow
    and wide ones, ones with few different values. Scores in many tight clusters far from each other can be off by more.

    Memory does not grow with the number of images. With the default sizes the first 2 M pixels take 8 MiB, and 12 bytes
    more for each anomalous one; beyond them bins take 22 MiB instead. `result` takes at most 70 MiB for a moment.
    Beside that are the temporaries of a batch.

    Args:
        bins: how many bins may be used, 65536 at least.
        buffer: how many pixels are kept as they are; up to that many, everything is exact.
        fpr_limit: the false positive rate up to which AUPRO is integrated.
    """

    def __init__(self, bins: int = 1 << 20, buffer: int = 1 << 21, fpr_limit: float = FPR_LIMIT) -> None:
        if bins < COARSE_BINS:
            raise ValueError(f"{bins} bins are too few, {COARSE_BINS} are the least")
        self.bins = bins
        self.buffer = buffer
        self.fpr_limit = fpr_limit
        self._pixels = 0
        self._positives = 0
        # First the keys of all pixels and of the anomalous ones with their coverage, then a histogram.
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._histogram: Histogram | None = None

    @torch.no_grad()
    def update(self, maps: Tensor, masks: Tensor, names: Sequence[str]) -> None:
        """Count a batch.

        Args:
            maps: (B, H, W) scores, higher is more anomalous.
            masks: (B, H, W), anomalous where above 0.5, on any device.
            names: the B images' names, for messages.

        Raises:
            UserError: a score is NaN or infinite; nothing of the batch is counted then.
            ValueError: the shapes do not belong together.
        """
        self.add(pixels_of(maps, masks, names))

    @torch.no_grad()
    def add(self, pixels: Pixels) -> None:
        """Count the pixels of a batch, which may have come from another process.

        Figures depend on the order of batches where there are more pixels than `buffer`: bins follow from what came
        before.
        """
        scores, positives, coverage = pixels
        if scores.numel() == 0:
            return
        if self._histogram is None and self._pixels + scores.numel() > self.buffer:
            self._start_histogram(scores.reshape(-1))
        if self._histogram is not None:
            add_images(self._histogram, scores, positives, coverage)
        else:
            self._kept.append((score_keys(scores).view(-1), positives, coverage))
        self._pixels += scores.numel()
        self._positives += len(positives)

    def _start_histogram(self, scores: Tensor) -> None:
        """Choose the bins by the pixels kept and the first of `scores` (n,), and count those kept."""
        # Always the same number of pixels, so that the bins do not depend on how the images are batched.
        missing = max(1, self.buffer - self._pixels)
        sample = torch.cat([*(keys for keys, _, _ in self._kept), score_keys(scores[:missing])])
        self._histogram = Histogram(CoarseToFine(sample, self.bins), scores.device)
        for keys, positives, coverage in self._kept:
            self._histogram.add(keys)
            self._histogram.add_positives(positives, coverage)
        self._kept = []

    def result(self) -> dict[str, float | None]:
        """`pixel_auroc`, `pixel_ap`, `pixel_f1_max` and `aupro` in percent, None where undefined."""
        found = metrics_of(self._bins(), self._pixels - self._positives, self.fpr_limit)
        return {PIXEL_NAMES[name]: value for name, value in found.items()}

    def _bins(self) -> Bins:
        if self._histogram is not None:
            return bins_of_histogram(self._histogram)
        if not self._kept:
            return bins_of_values(*(np.zeros(0, dtype=np.int32),) * 2, np.zeros(0))
        return bins_of_values(*(torch.cat(parts).cpu().numpy() for parts in zip(*self._kept, strict=True)))


def add_images(histogram: Histogram, scores: Tensor, positives: Tensor, coverage: Tensor) -> None:
    """Count scores (B, n); keys of the anomalous pixels among them (p,) and these pixels' coverage (p,)."""
    # Image by image bins do not depend on the batches, and what is computed on the way stays in a CPU's cache.
    for image in scores:
        histogram.add(score_keys(image))
    histogram.add_positives(positives, coverage)


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


def image_metrics(labels: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> dict[str, float | None]:
    """`image_auroc`, `image_ap` and `image_f1_max` in percent, exact; None where undefined.

    Args:
        labels: (n,), 1 or True for anomalous images.
        scores: (n,), higher is more anomalous.
        names: the n images' names, for messages.

    Raises:
        UserError: a score is NaN or infinite.
    """
    finite = np.isfinite(scores)
    if not finite.all():
        raise UserError(f"the score of {names[int(np.argmin(finite))]} is not finite: no metrics of it")
    anomalous = np.asarray(labels, dtype=bool)
    ranks = np.unique(scores, return_inverse=True)[1]
    bins = bins_of_values(ranks, ranks[anomalous], np.ones(int(anomalous.sum())))
    found = metrics_of(bins, int((~anomalous).sum()))
    return {IMAGE_NAMES[name]: found[name] for name in IMAGE_NAMES}
