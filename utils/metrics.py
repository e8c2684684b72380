"""Pixel metrics counted batch by batch: no map is kept, and the error that counting in bins can make is known.

float32 scores are ordered as integer keys. The first values are kept as they are: small inputs need no bins at all.
When there are more, those values choose a histogram over the keys, fine where ranks decide a metric and coarse
elsewhere, that all pixels go through. What order inside a bin could change is a bound on each metric's error.
Where a bound is too wide, the bins that cause it are counted again, finer, in a second pass over the same maps.

References:
    Average precision and precision-recall as scikit-learn defines them: steps, ties taken as one threshold.
    Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021, section 5: per-region overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from utils.errors import UserError

TOLERANCE = 0.005
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


class Layout(Protocol):
    """Which bin a key belongs to: one of `0 .. size - 1`, or `size` where it is not counted."""

    size: int

    def locate(self, keys: Tensor) -> Tensor: ...

    def extents(self) -> tuple[np.ndarray, np.ndarray]:
        """Of every bin in use the lowest key, and the binary logarithm of how many keys it holds."""
        ...


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
        # Below the sample's top a single bin will do for what it lacks: few pixels come there. An outlier is no top.
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

    def extents(self) -> tuple[np.ndarray, np.ndarray]:
        coarse = np.repeat(self._order, 1 << self._split_bits[self._order])
        shift = COARSE_BITS - self._split_bits[coarse]
        return lowest_keys(coarse) + ((np.arange(len(coarse)) - self._first[coarse]) << shift), shift


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


class Windows:
    """Finer bins inside chosen ones; keys outside all of them are not counted.

    Args:
        lowest: (w,) lowest keys of the windows, ascending; a window lies inside one coarse bin.
        bits: (w,) binary logarithms of the number of keys in each.
        split_bits: (w,) binary logarithms of the number of bins in each.
    """

    def __init__(self, lowest: np.ndarray, bits: np.ndarray, split_bits: np.ndarray, device: torch.device) -> None:
        self.lowest = lowest
        self.shift = bits - split_bits
        counts = np.int64(1) << split_bits
        self.first = counts.cumsum() - counts
        self.size = int(counts.sum())
        touched = np.zeros(COARSE_BINS, dtype=bool)
        touched[(lowest >> COARSE_BITS) + COARSE_BINS // 2] = True
        tables = (touched, lowest, np.int64(1) << bits, self.shift, self.first)
        self._touched, self._lowest, self._width, self._shift, self._first = (
            torch.from_numpy(table).to(device) for table in tables
        )

    def locate(self, keys: Tensor) -> Tensor:
        index = torch.full(keys.shape, self.size, dtype=torch.int64, device=keys.device)
        # Most pixels lie in no window's coarse bin; the search is for the others.
        near = torch.index_select(self._touched, 0, coarse_bins(keys)).nonzero()[:, 0]
        keys = keys[near].long()
        window = (torch.searchsorted(self._lowest, keys, right=True) - 1).clamp_(min=0)
        inside = keys - self._lowest[window]
        counted = (inside >= 0) & (inside < self._width[window])
        index[near] = torch.where(counted, self._first[window] + (inside >> self._shift[window]), self.size)
        return index

    def windows(self, index: np.ndarray) -> np.ndarray:
        """The windows that bins lie in."""
        return np.searchsorted(self.first, index, side="right") - 1

    def extents(self) -> tuple[np.ndarray, np.ndarray]:
        index = np.arange(self.size)
        window = self.windows(index)
        return self.lowest[window] + ((index - self.first[window]) << self.shift[window]), self.shift[window]


class Histogram:
    """Pixels, anomalous pixels, and the regions' coverage (each region's pixels sum to 1) in the bins of a layout."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
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

    lowest: lowest key of each bin; bits: binary logarithm of the number of its keys, 0 where all scores in it are
    equal; positives, normals: pixels in it; normals_above: normal pixels in all bins above, those without anomalous
    pixels included; coverage: sum over its anomalous pixels of 1 / (pixels of their region). All (n,).
    """

    lowest: np.ndarray
    bits: np.ndarray
    positives: np.ndarray
    normals: np.ndarray
    normals_above: np.ndarray
    coverage: np.ndarray

    def take(self, rows: np.ndarray) -> Bins:
        return Bins(*(getattr(self, field.name)[rows] for field in fields(self)))

    def joined(self, other: Bins) -> Bins:
        """Both, in order."""
        both = Bins(*(np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))
        return both.take(np.argsort(both.lowest)[::-1])


def bins_of_values(values: np.ndarray, positives: np.ndarray, coverage: np.ndarray) -> Bins:
    """Bins of one value each: exact. values (n,) integers, of which `positives` (p,) are anomalous; coverage (p,)."""
    ordered = np.sort(values)
    lowest, inverse, counts = np.unique(positives, return_inverse=True, return_counts=True)
    at_least = len(values) - np.searchsorted(ordered, lowest, side="left")
    more_than = len(values) - np.searchsorted(ordered, lowest, side="right")
    positives_above = len(positives) - counts.cumsum()
    covered = np.bincount(inverse, weights=coverage, minlength=len(lowest))
    bins = Bins(
        lowest.astype(np.int64),
        np.zeros(len(lowest), dtype=np.int64),
        counts,
        at_least - more_than - counts,
        more_than - positives_above,
        covered,
    )
    return bins.take(np.arange(len(lowest))[::-1])


def bins_of_histogram(histogram: Histogram) -> Bins:
    """The bins of a histogram over all keys."""
    lowest, bits = histogram.layout.extents()
    normals, positives, coverage = histogram.counts()
    order = np.argsort(lowest, kind="stable")[::-1]
    through = normals[order].cumsum()
    rows = np.flatnonzero(positives[order])
    normals_above = through[rows] - normals[order[rows]]
    rows = order[rows]
    return Bins(lowest[rows], bits[rows], positives[rows], normals[rows], normals_above, coverage[rows])


class Recount:
    """A further pass, in which some bins are counted again in finer ones while the rest stay as they are.

    Args:
        bins: what the pass before found.
        rows: those of them to count again; each has more than one key.
        limit: how many bins the pass may use, twice the number of rows at least.
    """

    def __init__(self, bins: Bins, rows: np.ndarray, limit: int, device: torch.device) -> None:
        chosen = np.zeros(len(bins.lowest), dtype=bool)
        chosen[rows] = True
        self.rest = bins.take(~chosen)
        # Windows ascend, bins descend.
        self.parents = bins.take(np.flatnonzero(chosen)[::-1])
        splits = (np.minimum(self.parents.bits, widest) for widest in range(COARSE_BITS, 0, -1))
        split = next(bits for bits in splits if (1 << bits).sum() <= limit)
        self.windows = Windows(self.parents.lowest, self.parents.bits, split, device)
        self.histogram = Histogram(self.windows, device)
        self.pixels = 0

    def bins(self) -> Bins:
        """The bins before this pass until it begins, the finer ones once it is complete."""
        if self.pixels == 0:
            return self.rest.joined(self.parents)
        return self.rest.joined(self._finer())

    def _finer(self) -> Bins:
        normals, positives, coverage = self.histogram.counts()
        first = self.windows.first
        for new, old in ((normals, self.parents.normals), (positives, self.parents.positives)):
            if not np.array_equal(np.add.reduceat(new, first), old):
                raise RuntimeError("a further pass needs all maps and masks of the first, with the same scores")
        rows = np.flatnonzero(positives)
        window = self.windows.windows(rows)
        lowest, bits = self.windows.extents()
        through = normals.cumsum()
        last = np.append(first[1:], self.windows.size) - 1
        normals_above = self.parents.normals_above[window] + through[last[window]] - through[rows]
        return Bins(lowest[rows], bits[rows], positives[rows], normals[rows], normals_above, coverage[rows])


@dataclass(frozen=True)
class Estimate:
    """A metric in percent, None where undefined; the most it can be off, in points, and each bin's part in that."""

    value: float | None
    bound: float
    slack: np.ndarray


def estimates(bins: Bins, all_normals: int, fpr_limit: float = FPR_LIMIT) -> dict[str, Estimate]:
    """AUROC, AP, F1-max and AUPRO of pixels in bins, as the middle of what any order inside the bins can give."""
    if len(bins.lowest) == 0:
        undefined = Estimate(None, 0.0, np.zeros(0))
        return dict.fromkeys(("auroc", "ap", "f1_max", "aupro"), undefined)
    ap, f1_max = _average_precision(bins), _f1_max(bins)
    if all_normals == 0:
        undefined = Estimate(None, 0.0, np.zeros(len(bins.lowest)))
        return {"auroc": undefined, "ap": ap, "f1_max": f1_max, "aupro": undefined}
    return {
        "auroc": _area(bins, bins.positives, all_normals, 1.0),
        "ap": ap,
        "f1_max": f1_max,
        "aupro": _area(bins, bins.coverage, all_normals, fpr_limit),
    }


def _area(bins: Bins, weights: np.ndarray, all_normals: int, limit: float) -> Estimate:
    """Area under (false positive rate, covered share of `weights`) from 0 to `limit`, divided by `limit`.

    In a bin the curve runs from one corner of a rectangle to the opposite one: along its diagonal where all scores are
    equal (the definition's trapezoid, which interpolates at the limit), anywhere inside otherwise.
    """
    heights = weights / weights.sum()
    start = np.minimum(bins.normals_above / all_normals, limit)
    end = (bins.normals_above + bins.normals) / all_normals
    inside = np.minimum(end, limit) - start
    # The share of the rectangle's width that lies before the limit is also how high the diagonal gets there.
    reached = np.divide(inside, end - start, out=np.zeros_like(inside), where=end > start)
    area = heights * (limit - start - inside + inside * reached / 2)
    # Where the limit cuts a bin the diagonal is low: all of the rectangle can lie above it.
    error = np.where(end > limit, heights * inside, heights * inside / 2)
    slack = 100.0 * np.where(bins.bits > 0, error, 0.0) / limit
    return Estimate(100.0 * float(area.sum()) / limit, float(slack.sum()), slack)


def _average_precision(bins: Bins) -> Estimate:
    """Best case: all of a bin's positives come first, as ties. Worst: they come last, one by one.

    Precision t / (t + f) is concave in the number t of positives, so that the mean over the worst case's steps is at
    least that of the first and the last.
    """
    through = bins.positives.cumsum()
    before = through - bins.positives
    normals_through = bins.normals_above + bins.normals
    last = through / (through + normals_through)
    first = (before + 1) / (before + 1 + normals_through)
    exact = bins.bits == 0
    low = np.where(exact, last, (first + last) / 2)
    high = np.where(exact, last, through / (through + bins.normals_above))
    share = 100.0 * bins.positives / through[-1]
    slack = share * (high - low) / 2
    return Estimate(float((share * (high + low) / 2).sum()), float(slack.sum()), slack)


def _f1_max(bins: Bins) -> Estimate:
    """A threshold at a bin's lowest score is one of the real ones; inside, F1 is at most that of positives first."""
    through = bins.positives.cumsum()
    retrieved = through + bins.normals_above
    reached = (200.0 * through / (through[-1] + retrieved + bins.normals)).max()
    possible = np.where(bins.bits > 0, 200.0 * through / (through[-1] + retrieved), 0.0)
    slack = np.maximum(possible - reached, 0.0) / 2
    return Estimate(float(reached + slack.max()), float(slack.max()), slack)


def bins_to_refine(bins: Bins, found: dict[str, Estimate], tolerance: float, limit: int) -> np.ndarray:
    """Rows of at most `limit` bins that must be finer for all bounds to be within the tolerance, the worst first."""
    # Halves and quarters leave room for what the finer bins will still hide.
    aim = tolerance / 4
    needed = np.zeros(len(bins.lowest), dtype=bool)
    worst = np.zeros(len(bins.lowest))
    for name, estimate in found.items():
        if estimate.bound <= tolerance:
            continue
        worst = np.maximum(worst, estimate.slack)
        if name == PIXEL_NAMES["f1_max"]:
            needed |= estimate.slack > aim
        else:
            order = np.argsort(estimate.slack)
            needed[order[estimate.slack[order].cumsum() > aim]] = True
    rows = np.flatnonzero(needed)
    return rows[np.argsort(-worst[rows], kind="stable")[:limit]]


class PixelCounter:
    """Pixel AUROC, AP, F1-max and AUPRO of one class's maps, exact to `tolerance`, from batches that are not kept.

        counter = PixelCounter()
        while True:
            for maps, masks, names in batches():
                counter.update(maps, masks, names)
            if counter.settled():
                break
        values = counter.result()

    Nearly always the first pass is the only one. Scores are counted as float32 where they are, all on one device;
    float16, bfloat16 and float64 are converted, so that float64 scores that float32 cannot tell apart are ties.

    Memory does not grow with the number of images. With the default sizes the first 2 M pixels take 8 MiB, and 12 bytes
    more for each anomalous one; beyond them bins take 22 MiB instead. `settled` adds 80 bytes for each bin that holds
    anomalous pixels, 80 MiB if all do, and a further pass up to 40 MiB. Beside that are the temporaries of a batch.

    Args:
        tolerance: the largest error allowed of each metric, in percentage points.
        bins: how many bins a pass may use, 65536 at least.
        buffer: how many pixels are kept as they are; up to that many, everything is exact.
        fpr_limit: the false positive rate up to which AUPRO is integrated.
    """

    def __init__(
        self, tolerance: float = TOLERANCE, bins: int = 1 << 20, buffer: int = 1 << 21, fpr_limit: float = FPR_LIMIT
    ) -> None:
        if bins < COARSE_BINS:
            raise ValueError(f"{bins} bins are too few, {COARSE_BINS} are the least")
        self.tolerance = tolerance
        self.bins = bins
        self.buffer = buffer
        self.fpr_limit = fpr_limit
        self.passes = 1
        # Totals of the first pass.
        self._pixels = 0
        self._positives = 0
        # In turn: the keys of all pixels and of the anomalous ones with their coverage, a histogram, a recount.
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._histogram: Histogram | None = None
        self._recount: Recount | None = None
        self._found: tuple[Bins, dict[str, Estimate]] | None = None

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
        if maps.ndim != 3 or maps.shape != masks.shape or len(names) != len(maps):
            shapes = f"maps {tuple(maps.shape)}, masks {tuple(masks.shape)}, {len(names)} names"
            raise ValueError(f"maps and masks (B, H, W) and B names are needed, not {shapes}")
        if maps.numel() == 0:
            return
        # Apple's GPUs have no float64, which coverage needs.
        maps = maps.detach().to(device="cpu" if maps.device.type == "mps" else None, dtype=torch.float32)
        check_finite(maps, names)
        positions, coverage = region_coverage((masks if masks.dtype == torch.bool else masks > 0.5).cpu().numpy())
        scores = maps.flatten(1)
        positives = score_keys(scores.reshape(-1)[torch.from_numpy(positions).to(maps.device)])
        self._count(scores, positives, torch.from_numpy(coverage).to(maps.device))
        self._found = None

    def _count(self, scores: Tensor, positives: Tensor, coverage: Tensor) -> None:
        """Scores (B, n); keys of the anomalous pixels (p,) and the share of its region that each of these is (p,)."""
        if self._recount is not None:
            self._recount.pixels += scores.numel()
            add_images(self._recount.histogram, scores, positives, coverage)
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

    def settled(self) -> bool:
        """Whether all errors are within the tolerance; where not, another pass over the same maps is made ready."""
        bins, found = self._estimated()
        if all(estimate.bound <= self.tolerance for estimate in found.values()):
            return True
        if self._recount is None or self._recount.pixels > 0:
            rows = bins_to_refine(bins, found, self.tolerance, self.bins // 2)
            done = self._histogram if self._recount is None else self._recount.histogram
            self._recount, self._histogram = Recount(bins, rows, self.bins, done.device), None
            self.passes += 1
        return False

    def error_bounds(self) -> dict[str, float]:
        """The most that each metric of `result` can differ from its exact value, in percentage points."""
        return {name: estimate.bound for name, estimate in self._estimated()[1].items()}

    def result(self) -> dict[str, float | None]:
        """`pixel_auroc`, `pixel_ap`, `pixel_f1_max` and `aupro` in percent, None where undefined."""
        return {name: estimate.value for name, estimate in self._estimated()[1].items()}

    def _estimated(self) -> tuple[Bins, dict[str, Estimate]]:
        if self._found is None:
            bins = self._bins()
            found = estimates(bins, self._pixels - self._positives, self.fpr_limit)
            self._found = bins, {PIXEL_NAMES[name]: estimate for name, estimate in found.items()}
        return self._found

    def _bins(self) -> Bins:
        if self._recount is not None:
            return self._recount.bins()
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
    if all(extreme.isfinite() for extreme in torch.aminmax(maps)):
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
    found = estimates(bins, int((~anomalous).sum()))
    return {IMAGE_NAMES[name]: found[name].value for name in IMAGE_NAMES}
