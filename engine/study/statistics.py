"""Whether an arm differs from another: intervals, tests and verdicts over seeds (docs/studies.md).

The seed is the unit: of each, an arm has one figure for a metric, the mean over classes, test datasets and pairs. What
is tested is the mean of the paired differences from the arm to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

LEVEL = 0.05
POWER = 0.8
RESAMPLES = 4000
# Up to this many sign patterns the test is exact, which 13 seeds have.
PERMUTATIONS = 9999
SIMULATED = 3000
# Beyond, a study is a matter of faith.
MOST_SEEDS = 100
# Smallest differences that are taken for any, in points: rounding in a file.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Groups:
    """Which columns of figures are classes of one test dataset, and how much each group counts.

    members: for each group its columns; weights: of the groups, which sum to 1.
    """

    members: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, columns: Sequence[tuple[str, str, str]]) -> Groups:
        """Classes in test datasets, test datasets in training datasets: each level counts its members alike.

        columns: (training dataset, test dataset, class).
        """
        groups: dict[tuple[str, str], list[int]] = {}
        for index, (train, test, _) in enumerate(columns):
            groups.setdefault((train, test), []).append(index)
        trains = [train for train, _ in groups]
        weights = [1 / (len(set(trains)) * trains.count(train)) for train, _ in groups]
        return cls(tuple(map(tuple, groups.values())), tuple(weights))

    def mean(self, values: np.ndarray) -> np.ndarray:
        """(..., columns) to (...): the mean over classes, datasets and pairs; NaN where a dataset has no figure.

        A class without a figure, in which a metric is undefined, is left out.
        """
        of_groups = [_mean_of_known(values[..., list(members)]) for members in self.members]
        return sum(weight * found for weight, found in zip(self.weights, of_groups, strict=True))


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    count = known.sum(-1)
    total = np.where(known, values, 0).sum(-1)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def bootstrap_interval(differences: np.ndarray, groups: Groups, resamples: int = RESAMPLES) -> tuple[float, float]:
    """A 95 % interval of the mean difference by the hierarchical bootstrap: seeds, then classes within each.

    differences: (seeds, columns). With few seeds the percentiles of a bootstrap lie too close together, by the factor
    between the normal and the t distribution and by that between n and n - 1: they are taken further out by both.
    Always the same resamples, so that a report can be made again.
    """
    rng = np.random.default_rng(0)
    count = len(differences)
    seeds = rng.integers(count, size=(resamples, count))
    means = np.zeros(resamples)
    for members, weight in zip(groups.members, groups.weights, strict=True):
        known = [columns for row in differences[:, list(members)] if (columns := np.flatnonzero(~np.isnan(row))).size]
        if len(known) < count:
            return math.nan, math.nan
        sizes = np.array([len(columns) for columns in known])
        table = np.zeros((count, sizes.max()), dtype=int)
        for row, columns in enumerate(known):
            table[row, : len(columns)] = columns
        # (resamples, seeds, classes): which of the seed's classes are drawn, as many as it has.
        drawn = (rng.random((resamples, count, sizes.max())) * sizes[seeds][..., None]).astype(int)
        used = np.arange(sizes.max()) < sizes[seeds][..., None]
        chosen = differences[:, list(members)][seeds[..., None], table[seeds[..., None], drawn]]
        means += weight * (np.where(used, chosen, 0).sum(-1) / sizes[seeds]).mean(-1)
    tail = stats.norm.cdf(stats.t.ppf(LEVEL / 2, max(count - 1, 1)) * math.sqrt(count / max(count - 1, 1)))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def sign_flip_test(differences: np.ndarray) -> np.ndarray:
    """p of the mean (..., seeds) being 0: how many of the sign patterns give a mean as far from 0, both ways.

    Exact while there are at most `PERMUTATIONS` patterns, else by as many drawn ones, always the same.
    """
    found = stats.permutation_test(
        (differences,),
        _mean_over,
        permutation_type="samples",
        vectorized=True,
        axis=-1,
        n_resamples=PERMUTATIONS,
        random_state=np.random.default_rng(0),
    )
    return found.pvalue


def _mean_over(values: np.ndarray, axis: int) -> np.ndarray:
    return values.mean(axis)


def smallest_p(seeds: int) -> float:
    """The smallest p that the sign-flip test of so many seeds can give."""
    return max(2.0 ** (1 - seeds), 2 / (PERMUTATIONS + 1)) if seeds else 1.0


def holm(p_values: np.ndarray) -> np.ndarray:
    """p corrected for several comparisons (..., comparisons) by Holm's steps; NaN is no comparison."""
    order = np.argsort(p_values, axis=-1)
    count = (~np.isnan(p_values)).sum(-1, keepdims=True)
    factors = np.maximum(count - np.arange(p_values.shape[-1]), 1)
    stepped = np.maximum.accumulate(np.minimum(np.take_along_axis(p_values, order, -1) * factors, 1), axis=-1)
    corrected = np.empty_like(stepped)
    np.put_along_axis(corrected, order, stepped, -1)
    return corrected


def probability_of_gain(differences: np.ndarray) -> float:
    """That a new seed would differ to the good: from the t distribution that predicts one more Gaussian difference."""
    count, mean, spread = len(differences), differences.mean(), _spread(differences)
    if spread == 0:
        return 0.5 if abs(mean) <= ROUNDING else float(mean > 0)
    return float(stats.t.cdf(mean / (spread * math.sqrt(1 + 1 / count)), count - 1))


def _spread(differences: np.ndarray) -> float:
    """Standard deviation over seeds; 0 for one, and for rounding."""
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    return 0.0 if spread <= ROUNDING else spread


@lru_cache(maxsize=256)
def detectable(seeds: int, level: float) -> float | None:
    """The mean, in standard deviations of a seed's difference, that the sign-flip test finds with 80 % power.

    Of Gaussian differences, by simulating the very test while it is exact; with more seeds than that it is as good as
    the t test, whose power is known. None where it cannot be found however large it is.
    """
    if smallest_p(seeds) > level:
        return None
    low, high = 0.0, 20.0
    drawn = np.random.default_rng(0).standard_normal((SIMULATED, seeds))
    for _ in range(12):
        middle = (low + high) / 2
        exact = 2**seeds <= PERMUTATIONS
        power = _power_of_signs(drawn + middle, level) if exact else _power_of_t(middle, seeds, level)
        low, high = (low, middle) if power >= POWER else (middle, high)
    return high


def _power_of_signs(differences: np.ndarray, level: float) -> float:
    """How often the exact sign-flip test of (studies, seeds) finds something."""
    seeds = differences.shape[-1]
    # Half of the patterns, of which the others are the mirror.
    patterns = 1 - 2 * ((np.arange(2 ** (seeds - 1))[:, None] >> np.arange(seeds)) & 1)
    found = 0
    for rows in np.array_split(differences, max(1, differences.shape[0] * len(patterns) // 4_000_000)):
        means = np.abs(rows @ patterns.T.astype(float))
        found += np.count_nonzero((means >= means[:, :1] * (1 - 1e-12)).mean(-1) <= level)
    return found / len(differences)


def _power_of_t(effect: float, seeds: int, level: float) -> float:
    limit = stats.t.ppf(1 - level / 2, seeds - 1)
    return float(stats.nct.sf(limit, seeds - 1, effect * math.sqrt(seeds)))


def seeds_to_show(mean: float, spread: float, level: float) -> int | None:
    """How many seeds would show this mean at this spread with 80 % power; None where `MOST_SEEDS` would not."""
    if spread == 0:
        return None if mean == 0 else next(n for n in range(2, MOST_SEEDS) if smallest_p(n) <= level)
    return _first(lambda seeds: (found := detectable(seeds, level)) is not None and found <= abs(mean) / spread)


def seeds_to_exclude(mean: float, spread: float, margin: float) -> int | None:
    """How many seeds would bring the interval within the margin, at this mean and spread; None as above."""
    return _first(
        lambda seeds: (
            smallest_p(seeds) <= LEVEL
            and abs(mean) + stats.t.ppf(1 - LEVEL / 2, seeds - 1) * spread / math.sqrt(seeds) <= margin
        )
    )


def _first(enough) -> int | None:
    """The smallest number of seeds that is enough, by halving: what is enough stays enough."""
    low, high = 1, MOST_SEEDS
    if not enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Verdict:
    """One arm against the arm to compare with, in one metric; percent and points.

    seeds: those that both have completely; gain: the mean difference; p: of the test alone, p_holm: corrected;
    detectable_gain: the gain that this many seeds would have detected; probability_of_gain: that a new seed shows one.
    Undefined values are NaN.
    """

    metric: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    gain: float
    low: float
    high: float
    p: float
    p_holm: float
    probability_of_gain: float
    detectable_gain: float
    word: str
    reason: str

    @property
    def sentence(self) -> str:
        """The verdict with the gain, its interval, and what there is to say about it."""
        said = self.word if math.isnan(self.gain) else f"{self.word}, {self.gain:+.2f} points"
        interval = "" if math.isnan(self.low) else f" (95 % interval {self.low:+.2f} to {self.high:+.2f})"
        return said + interval + (f": {self.reason}" if self.reason else "")


BETTER, WORSE, NO_DIFFERENCE, NOT_DECIDED = "better", "worse", "no difference", "not decided"


@dataclass(frozen=True)
class Contrast:
    """What a verdict is made from: the differences (seeds, columns) of one arm in one metric, and which seeds."""

    metric: str
    seeds: tuple[int, ...]
    differences: np.ndarray
    groups: Groups


def judge(contrasts: Sequence[Contrast], margin: float) -> list[Verdict]:
    """Verdicts on contrasts that are corrected together: a family.

    An arm is better or worse where the corrected p is at most 5 %; it makes no difference of more than `margin` points
    where the interval lies within the margin and there are seeds enough for an interval of 95 %.
    """
    means = [contrast.groups.mean(contrast.differences) for contrast in contrasts]
    p_values = np.array([float(sign_flip_test(found)) if len(found) > 1 else math.nan for found in means])
    corrected = holm(p_values)
    count = int((~np.isnan(p_values)).sum())
    level = LEVEL / max(count, 1)
    return [
        _judge_one(contrast, found, float(p), float(p_holm), level, count, margin)
        for contrast, found, p, p_holm in zip(contrasts, means, p_values, corrected, strict=True)
    ]


def _judge_one(
    contrast: Contrast, means: np.ndarray, p: float, p_holm: float, level: float, family: int, margin: float
) -> Verdict:
    count = len(means)
    if count < 2:
        gain = float(means[0]) if count else math.nan
        why = f"{count} seed{'' if count == 1 else 's'} in both arms, and a spread takes two"
        unknown = dict.fromkeys(("low", "high", "p", "p_holm", "probability_of_gain", "detectable_gain"), math.nan)
        return Verdict(
            contrast.metric, contrast.seeds, tuple(means.tolist()), gain, **unknown, word=NOT_DECIDED, reason=why
        )
    gain, spread = float(means.mean()), _spread(means)
    low, high = bootstrap_interval(contrast.differences, contrast.groups)
    effect = detectable(count, level)
    smallest = math.nan if effect is None else effect * spread
    word, reason = _word_and_reason(gain, spread, low, high, p_holm, level, count, family, margin)
    return Verdict(
        contrast.metric,
        contrast.seeds,
        tuple(means.tolist()),
        gain,
        low,
        high,
        p,
        p_holm,
        probability_of_gain(means),
        smallest,
        word,
        reason,
    )


def _word_and_reason(
    gain: float,
    spread: float,
    low: float,
    high: float,
    p_holm: float,
    level: float,
    count: int,
    family: int,
    margin: float,
) -> tuple[str, str]:
    if p_holm <= LEVEL:
        word = BETTER if gain > 0 else WORSE
        if low <= 0 <= high:
            return word, "on these classes: the interval, which draws classes too, holds 0"
        return word, f"though by less than {margin:g} points" if max(abs(low), abs(high)) < margin else ""
    if -margin < low and high < margin and smallest_p(count) <= LEVEL:
        return f"{NO_DIFFERENCE} of more than {margin:g} points", ""
    show, exclude = seeds_to_show(gain, spread, level), seeds_to_exclude(gain, spread, margin)
    reasons = []
    if smallest_p(count) > level:
        least, needed = smallest_p(count), f"{level:.2g}{f' of {family} comparisons' if family > 1 else ''}"
        reasons.append(f"{count} seeds cannot show anything: the test's p is at least {least:.2g}, not {needed}")
    # The estimate is from few seeds; what it says that this many would have shown, chance has kept from showing.
    more = [
        (max(needed - count, 1), what)
        for needed, what in (
            (show, "would show this gain" if gain > 0 else "would show this loss"),
            (exclude, f"would show that it is not more than {margin:g} points"),
        )
        if needed is not None
    ]
    if more:
        needed, what = min(more)
        reasons.append(f"about {needed} more seed{'' if needed == 1 else 's'} {what}, if it stays as it is")
    else:
        reasons.append(f"even {MOST_SEEDS} seeds would not settle a difference as small as this at this spread")
    return NOT_DECIDED, "; ".join(reasons)
