"""Counts of pixels by score, exact while there are few, then in bins that the first pixels choose.

float32 scores are ordered as integer keys. A coarse bin holds the keys with the same sign, exponent and 7 bits of the
mantissa. The keys of a coarse bin are kept until the buffer is full; then the most frequent coarse bins are cut into
equal bins, fine where ranks decide a metric. Pixels of one bin count as ties.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COARSE_BITS = 16
COARSE_BINS = 1 << COARSE_BITS
MAGNITUDE = 0x7FFFFFFF
# Of the buffer, at most this share stays in it when bins are chosen: the least frequent coarse bins.
STAYING = 1 / 16
# An origin that makes a bin's index negative for every key.
NOWHERE = -(1 << 30)


def score_keys(scores: Tensor) -> Tensor:
    """int32 keys in the order of finite float32 scores, equal exactly if the scores are (-0.0 equals 0.0).

    A float's bits are its sign and its magnitude, and magnitudes are in order as integers: the key is the magnitude,
    negated if the sign is set.
    """
    bits = scores.contiguous().view(torch.int32)
    sign = bits >> 31
    return (bits ^ (sign & MAGNITUDE)).sub_(sign)


@dataclass(frozen=True)
class Bins:
    """The bins with anomalous pixels, the highest scores first; all metrics follow from them.

    positives, normals: pixels in each; normals_above: normal pixels with higher scores, in any bin; clean, clean_above:
    the same for pixels of normal images; coverage, overlap: sums over its anomalous pixels of 1 / (pixels of their
    region) and of 1 / (anomalous pixels of their image). All (n,).
    """

    positives: NDArray
    normals: NDArray
    normals_above: NDArray
    clean: NDArray
    clean_above: NDArray
    coverage: NDArray
    overlap: NDArray


class PixelCounts:
    """Pixels, anomalous pixels, and their shares of regions and images (each sums to 1), by score key.

    Args:
        size: the maximum number of bins, at least 65536.
        buffer: how many keys are kept without bins.
    """

    def __init__(self, size: int, buffer: int) -> None:
        self.size = size
        self.buffer = buffer
        # Of images with anomalous pixels, and of normal images.
        self._keys: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._kept = 0
        self._positives: list[tuple[Tensor, Tensor]] = []
        # Coarse bins that have been cut, in that order, and into how many bins: powers of two.
        self._cut = np.zeros(0, dtype=np.int64)
        self._bits = np.zeros(0, dtype=np.int64)
        self._rounds = 0
        self._shift = self._origin = torch.zeros(0)
        self._pixels, self._anomalous, self._shares = torch.zeros(2, 0), torch.zeros(0), torch.zeros(0, 2)

    def add(self, keys: Tensor, normal: bool = False) -> None:
        """Count pixels (n,), anomalous or not; normal: they are of a normal image."""
        index = self._index(keys)
        if index is not None:
            outside = index < 0
            if outside.any():
                keys, index = keys[outside], index[~outside]
            else:
                keys = keys[:0]
            self._pixels[int(normal)].index_add_(0, index, self._pixels.new_ones(1).expand(len(index)))
        if len(keys):
            self._keys[normal].append(keys)
            self._kept += len(keys)
        if self._kept > self.buffer:
            self._choose_bins()

    def add_positives(self, keys: Tensor, shares: Tensor) -> None:
        """Count anomalous pixels (n,), which `add` counts as well, with their shares (n, 2) of region and image."""
        index = self._index(keys)
        if index is not None:
            outside = index < 0
            index, counted = index[~outside], shares[~outside]
            keys, shares = keys[outside], shares[outside]
            self._anomalous.index_add_(0, index, self._anomalous.new_ones(1).expand(len(index)))
            self._shares.index_add_(0, index, counted)
        if len(keys):
            self._positives.append((keys, shares))

    def ties(self, keys: Tensor) -> Tensor:
        """The lowest key of each key's bin, or the key itself if it has no bin; equal for pixels that count as ties."""
        index = self._index(keys)
        if index is None:
            return keys
        shift = self._shift[_coarse(keys)]
        return torch.where(index < 0, keys, (keys >> shift) << shift)

    def bins(self) -> Bins:
        """What has been counted."""
        raw, shares = (
            (_joined(parts) for parts in zip(*self._positives, strict=True))
            if self._positives
            else ((), np.zeros((0, 2)))
        )
        found, inverse, counts = np.unique(np.asarray(raw, dtype=np.int64), return_inverse=True, return_counts=True)
        covered = [np.bincount(inverse, weights=column, minlength=len(found)) for column in shares.T]
        lowest, pixels, positives, shares_of_bins = self._bins_in_order()
        used = np.flatnonzero(positives)
        keys = np.concatenate([found, lowest[used]])
        order = np.argsort(keys)
        keys = keys[order]
        positives = np.concatenate([counts, positives[used]])[order]
        in_bins, above = [], []
        for kept, binned in zip(self._keys, pixels, strict=True):
            ordered, higher = np.sort(_joined(kept)), np.append(binned[::-1].cumsum()[::-1], 0)
            at_least, more_than = (
                len(ordered) - np.searchsorted(ordered, keys, side) + higher[np.searchsorted(lowest, keys, side)]
                for side in ("left", "right")
            )
            in_bins.append(at_least - more_than)
            above.append(more_than)
        normals_above = above[0] + above[1] - (positives.sum() - positives.cumsum())
        coverage, overlap = (
            np.concatenate([column, binned[used]])[order]
            for column, binned in zip(covered, shares_of_bins.T, strict=True)
        )
        values = (
            positives,
            in_bins[0] + in_bins[1] - positives,
            normals_above,
            in_bins[1],
            above[1],
            coverage,
            overlap,
        )
        return Bins(*(each[::-1] for each in values))

    def _bins_in_order(self) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        """The lowest key of each bin in ascending order, pixels (2, n), anomalous pixels and their shares (n, 2)."""
        coarse = np.repeat(self._cut, 1 << self._bits)
        first = np.repeat((1 << self._bits).cumsum() - (1 << self._bits), 1 << self._bits)
        within = np.arange(len(coarse)) - first
        lowest = _lowest_keys(coarse) + (within << np.repeat(COARSE_BITS - self._bits, 1 << self._bits))
        order = np.argsort(lowest)
        pixels, anomalous, shares = (each.cpu().numpy() for each in (self._pixels, self._anomalous, self._shares))
        return lowest[order], pixels[:, order], anomalous[order], shares[order]

    def _index(self, keys: Tensor) -> Tensor | None:
        """The bin of each key, negative for keys of coarse bins without bins; None if there are no bins."""
        if not self._rounds:
            return None
        coarse = _coarse(keys)
        index = keys >> torch.index_select(self._shift, 0, coarse)
        return index.add_(torch.index_select(self._origin, 0, coarse))

    def _choose_bins(self) -> None:
        """Cut the most frequent coarse bins of the buffer into bins, and count their pixels there."""
        kept, positives = self._keys, self._positives
        keys = torch.cat([*kept[0], *kept[1]])
        device = keys.device
        counts = torch.bincount(_coarse(keys), minlength=COARSE_BINS).cpu().numpy()
        rarest = np.argsort(counts, kind="stable")
        staying = rarest[counts[rarest].cumsum() <= STAYING * self.buffer]
        new = np.setdiff1d(np.flatnonzero(counts), staying)
        if not self._rounds:
            self._pixels = torch.zeros(2, self.size, dtype=torch.int64, device=device)
            self._anomalous = self._pixels[0].clone()
            self._shares = torch.zeros(self.size, 2, dtype=torch.float64, device=device)
        in_bins = np.repeat(self._cut, 1 << self._bits)
        earlier = np.bincount(in_bins, self._pixels.sum(dim=0).cpu().numpy()[: len(in_bins)], minlength=COARSE_BINS)
        wanted = demand(counts + earlier)[new]
        # One bin each is reserved for every coarse bin; of the others, later rounds get smaller shares.
        self._rounds += 1
        spare = (self.size - COARSE_BINS) / (self._rounds * (self._rounds + 1))
        self._cut, self._bits = np.append(self._cut, new), np.append(self._bits, bits_within(spare, wanted))
        # The index is first + (lower half >> shift), or (key >> shift) + origin, which is faster.
        shift, origin = np.full(COARSE_BINS, COARSE_BITS), np.full(COARSE_BINS, NOWHERE)
        shift[self._cut] = COARSE_BITS - self._bits
        first = (1 << self._bits).cumsum() - (1 << self._bits)
        origin[self._cut] = first - (_lowest_keys(self._cut) >> shift[self._cut])
        self._shift, self._origin = (torch.from_numpy(each.astype(np.int32)).to(device) for each in (shift, origin))
        self._keys, self._kept, self._positives = ([], []), 0, []
        for normal, parts in enumerate(kept):
            for part in parts:
                self.add(part, bool(normal))
        for pair in positives:
            self.add_positives(*pair)


def demand(counts: NDArray) -> NDArray:
    """How many bins coarse bins (65536,) should get, up to a factor, from the counts of pixels in them.

    The order inside a bin changes precision at rank R by the bin's share of the ranks down to R, so that equal errors
    need bins in proportion to log R. The first thousandths are flat: few of the anomalous pixels are there.
    """
    reached = counts[::-1].cumsum()[::-1]
    softening = max(1.0, 0.002 * counts.sum())
    return np.log((reached + softening) / (reached - counts + softening))


def bits_within(spare: float, wanted: NDArray) -> NDArray[np.int64]:
    """Into how many bins, as powers of two, coarse bins are cut; about as `wanted`, and `spare` more than one each."""
    scale, bits = spare / wanted.sum(), np.zeros(len(wanted), dtype=np.int64)
    while spare >= 1 and (bits < COARSE_BITS).any():
        finer = np.log2((scale * wanted).clip(1, COARSE_BINS)).astype(np.int64)
        if ((1 << finer) - 1).sum() > spare:
            break
        scale, bits = 1.1 * scale, finer
    return bits


def _coarse(keys: Tensor) -> Tensor:
    return (keys >> COARSE_BITS).add_(COARSE_BINS // 2)


def _lowest_keys(coarse: NDArray) -> NDArray:
    return (coarse - COARSE_BINS // 2) << COARSE_BITS


def _joined(parts: Iterable[Tensor]) -> NDArray:
    tensors = list(parts)
    return torch.cat(tensors).cpu().numpy() if tensors else np.zeros(0, dtype=np.int64)
