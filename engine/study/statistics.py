"""Intervals, tests and verdicts on the difference between two arms over seeds (docs/studies.md).

The unit is the seed: for each seed, an arm has one value of a metric, the mean over classes, test datasets and pairs.
Tested is the mean of the paired differences from the arm that is compared with.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy import stats

LEVEL = 0.05
POWER = 0.8
RESAMPLES = 4000
# Up to this many sign patterns (13 seeds) the test is exact.
PERMUTATIONS = 9999
SIMULATED = 3000
MAX_SEEDS = 100
# Smaller differences, in percentage points, are rounding errors of the files.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Groups:
    """The columns of a metric table, grouped by pair and test dataset.

    Attributes:
        members: The column indices of each group: the classes of one test dataset.
        weights: The weights of the groups, with sum 1.
    """

    members: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, columns: Sequence[tuple[str, str, str]]) -> Groups:
        """Group the columns (training dataset, test dataset, class) of a `MetricTable`.

        Training datasets have equal weights, and so have the test datasets of each.
        """
        groups: dict[tuple[str, str], list[int]] = {}
        for index, (train, test, _) in enumerate(columns):
            groups.setdefault((train, test), []).append(index)
        trains = [train for train, _ in groups]
        weights = [1 / (len(set(trains)) * trains.count(train)) for train, _ in groups]
        return cls(tuple(map(tuple, groups.values())), tuple(weights))

    def mean(self, values: np.ndarray) -> np.ndarray:
        """The mean over classes, test datasets and pairs.

        Args:
            values: (..., columns); NaN for classes in which the metric is undefined, which are left out.

        Returns:
            (...); NaN if a test dataset has no defined value.
        """
        total = np.zeros(values.shape[:-1])
        for members, weight in zip(self.members, self.weights, strict=True):
            total = total + weight * nanmean(values[..., list(members)])
        return total


def nanmean(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis without NaN; NaN if nothing else is left, without numpy's warning."""
    defined = ~np.isnan(values)
    count = defined.sum(-1)
    total = np.where(defined, values, 0).sum(-1)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def bootstrap_interval(differences: np.ndarray, groups: Groups, resamples: int = RESAMPLES) -> tuple[float, float]:
    """A 95 % interval of the mean difference by a hierarchical bootstrap: seeds, then classes within each seed.

    With few seeds, bootstrap percentiles are too close together by two factors: normal instead of t distribution, and
    n instead of n - 1. Both are corrected. The random resamples are always the same.

    Args:
        differences: (seeds, columns), in percentage points; NaN if undefined.
        groups: The groups of the columns.
        resamples: Number of bootstrap resamples.

    Returns:
        Lower and upper end; NaN if a seed has no value in a test dataset.
    """
    rng = np.random.default_rng(0)
    count = len(differences)
    seeds = rng.integers(count, size=(resamples, count))
    means = np.zeros(resamples)
    for members, weight in zip(groups.members, groups.weights, strict=True):
        defined = [columns for row in differences[:, list(members)] if (columns := np.flatnonzero(~np.isnan(row))).size]
        if len(defined) < count:
            return math.nan, math.nan
        sizes = np.array([len(columns) for columns in defined])
        table = np.zeros((count, sizes.max()), dtype=int)
        for row, columns in enumerate(defined):
            table[row, : len(columns)] = columns
        # (resamples, seeds, classes): as many classes as the seed has, drawn with replacement.
        drawn = (rng.random((resamples, count, sizes.max())) * sizes[seeds][..., None]).astype(int)
        used = np.arange(sizes.max()) < sizes[seeds][..., None]
        chosen = differences[:, list(members)][seeds[..., None], table[seeds[..., None], drawn]]
        means += weight * (np.where(used, chosen, 0).sum(-1) / sizes[seeds]).mean(-1)
    tail = stats.norm.cdf(stats.t.ppf(LEVEL / 2, max(count - 1, 1)) * math.sqrt(count / max(count - 1, 1)))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def sign_flip_test(differences: np.ndarray) -> np.ndarray:
    """Two-sided sign-flip permutation test of a mean of 0.

    The test is exact for up to `PERMUTATIONS` sign patterns; otherwise it draws that many, always the same.

    Args:
        differences: (..., seeds).

    Returns:
        The p values (...).
    """
    rng = np.random.default_rng(0)
    result = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", axis=-1, n_resamples=PERMUTATIONS, random_state=rng
    )
    return result.pvalue


def smallest_p(seeds: int) -> float:
    """The smallest p value that the sign-flip test can give with this many seeds."""
    return max(2.0 ** (1 - seeds), 2 / (PERMUTATIONS + 1)) if seeds else 1.0


def holm(p_values: np.ndarray) -> np.ndarray:
    """Correct p values for multiple comparisons with Holm's method.

    Args:
        p_values: (..., comparisons); NaN for no comparison.

    Returns:
        The corrected p values, in the same shape.
    """
    order = np.argsort(p_values, axis=-1)
    count = (~np.isnan(p_values)).sum(-1, keepdims=True)
    factors = np.maximum(count - np.arange(p_values.shape[-1]), 1)
    stepped = np.maximum.accumulate(np.minimum(np.take_along_axis(p_values, order, -1) * factors, 1), axis=-1)
    corrected = np.empty_like(stepped)
    np.put_along_axis(corrected, order, stepped, -1)
    return corrected


def probability_of_gain(differences: np.ndarray) -> float:
    """The probability that one more seed shows a gain, if differences are Gaussian (predictive t distribution).

    Args:
        differences: (seeds,), at least two.

    Returns:
        A probability from 0 to 1.
    """
    count, mean, spread = len(differences), differences.mean(), _spread(differences)
    if spread == 0:
        return 0.5 if abs(mean) <= ROUNDING else float(mean > 0)
    return float(stats.t.cdf(mean / (spread * math.sqrt(1 + 1 / count)), count - 1))


def _spread(differences: np.ndarray) -> float:
    """Standard deviation over seeds; 0 for one seed, and for rounding errors."""
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    return 0.0 if spread <= ROUNDING else spread


@lru_cache(maxsize=256)
def detectable(seeds: int, level: float) -> float | None:
    """The effect that the sign-flip test detects with 80 % power, for Gaussian differences.

    The power of the exact test is simulated; with more seeds, it equals that of the t test.

    Args:
        seeds: Number of seeds.
        level: Significance level.

    Returns:
        The mean difference in standard deviations over seeds; None if no effect can be detected.
    """
    if smallest_p(seeds) > level:
        return None
    low, high = 0.0, 20.0
    samples = np.random.default_rng(0).standard_normal((SIMULATED, seeds))
    for _ in range(12):
        middle = (low + high) / 2
        exact = 2**seeds <= PERMUTATIONS
        power = sign_flip_power(samples + middle, level) if exact else t_test_power(middle, seeds, level)
        low, high = (low, middle) if power >= POWER else (middle, high)
    return high


def sign_flip_power(differences: np.ndarray, level: float) -> float:
    """The share of studies (studies, seeds) in which the exact sign-flip test is significant."""
    seeds = differences.shape[-1]
    # Half of the patterns; the other half is symmetric.
    patterns = 1 - 2 * ((np.arange(2 ** (seeds - 1))[:, None] >> np.arange(seeds)) & 1)
    significant = 0
    for rows in np.array_split(differences, max(1, differences.shape[0] * len(patterns) // 4_000_000)):
        means = np.abs(rows @ patterns.T.astype(float))
        significant += int(np.count_nonzero((means >= means[:, :1] * (1 - 1e-12)).mean(-1) <= level))
    return significant / len(differences)


def t_test_power(effect: float, seeds: int, level: float) -> float:
    """The power of the two-sided t test for an effect in standard deviations."""
    limit = stats.t.ppf(1 - level / 2, seeds - 1)
    return float(stats.nct.sf(limit, seeds - 1, effect * math.sqrt(seeds)))


def seeds_to_show(mean: float, spread: float, level: float) -> int | None:
    """The number of seeds that shows a difference with 80 % power.

    Args:
        mean: The mean difference.
        spread: Its standard deviation over seeds.
        level: Significance level.

    Returns:
        The number; None if `MAX_SEEDS` are too few.
    """
    if spread == 0:
        return None if mean == 0 else next(n for n in range(2, MAX_SEEDS) if smallest_p(n) <= level)
    effect = abs(mean) / spread
    return _first(lambda seeds: (limit := detectable(seeds, level)) is not None and limit <= effect)


def seeds_to_exclude(mean: float, spread: float, margin: float) -> int | None:
    """The number of seeds that brings the interval of a difference within the margin.

    Args:
        mean: The mean difference.
        spread: Its standard deviation over seeds.
        margin: The largest difference that does not matter.

    Returns:
        The number; None if `MAX_SEEDS` are too few.
    """

    def is_within(seeds: int) -> bool:
        half_width = stats.t.ppf(1 - LEVEL / 2, seeds - 1) * spread / math.sqrt(seeds)
        return smallest_p(seeds) <= LEVEL and abs(mean) + half_width <= margin

    return _first(is_within)


def _first(is_enough: Callable[[int], bool]) -> int | None:
    """The smallest sufficient number of seeds, by bisection."""
    seeds = 2 + bisect_left(range(2, MAX_SEEDS + 1), True, key=is_enough)
    return None if seeds > MAX_SEEDS else seeds


BETTER, WORSE, NO_DIFFERENCE, NOT_DECIDED = "better", "worse", "no difference", "not decided"


@dataclass(frozen=True)
class Comparison:
    """The differences (seeds, columns) of one arm from another in one metric, in percentage points."""

    metric: str
    seeds: tuple[int, ...]
    differences: np.ndarray
    groups: Groups


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison. Undefined numbers are NaN.

    Attributes:
        seeds: The seeds that are complete in both arms.
        differences: The difference of each seed, in percentage points.
        gain: Their mean.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        p: p value of the sign-flip test.
        p_holm: p value, corrected for the comparisons of the family.
        probability_of_gain: Probability that one more seed shows a gain.
        detectable_gain: Gain that this many seeds detect with 80 % power.
        outcome: Better, worse, no difference of more than the margin, or not decided.
        reason: A qualification of the outcome, or what would decide it.
    """

    metric: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    gain: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    probability_of_gain: float = math.nan
    detectable_gain: float = math.nan
    outcome: str = NOT_DECIDED
    reason: str = ""

    @property
    def sentence(self) -> str:
        """The outcome with the gain, its interval and the reason."""
        text = self.outcome if math.isnan(self.gain) else f"{self.outcome}, {self.gain:+.2f} percentage points"
        interval = "" if math.isnan(self.low) else f" (95 % interval {self.low:+.2f} to {self.high:+.2f})"
        return text + interval + (f": {self.reason}" if self.reason else "")


def judge(comparisons: Sequence[Comparison], margin: float) -> list[Verdict]:
    """Judge a family of comparisons, with Holm's correction over the family.

    An arm is better or worse if the corrected p value is at most 5 %. There is no difference of more than the margin
    if the 95 % interval lies within the margin and the seeds are enough for such an interval.

    Args:
        comparisons: The family.
        margin: The largest difference that does not matter, in percentage points.

    Returns:
        A verdict for each comparison.
    """
    means = [comparison.groups.mean(comparison.differences) for comparison in comparisons]
    p_values = np.array([float(sign_flip_test(values)) if len(values) > 1 else math.nan for values in means])
    family = max(int((~np.isnan(p_values)).sum()), 1)
    return [
        _judge_one(comparison, values, (float(p), float(p_holm)), family, margin)
        for comparison, values, p, p_holm in zip(comparisons, means, p_values, holm(p_values), strict=True)
    ]


def _judge_one(
    comparison: Comparison, means: np.ndarray, p_values: tuple[float, float], family: int, margin: float
) -> Verdict:
    count = len(means)
    gain = float(means.mean()) if count else math.nan
    start = (comparison.metric, comparison.seeds, tuple(means.tolist()), gain)
    if count < 2:
        reason = f"{count} seed{'' if count == 1 else 's'} complete in both arms, but a spread needs 2"
        return Verdict(*start, reason=reason)
    effect, spread = detectable(count, LEVEL / family), _spread(means)
    interval = bootstrap_interval(comparison.differences, comparison.groups)
    numbers = (*p_values, probability_of_gain(means), math.nan if effect is None else effect * spread)
    verdict = Verdict(*start, *interval, *numbers)
    outcome, reason = _decide(verdict, spread, family, margin)
    return replace(verdict, outcome=outcome, reason=reason)


def _decide(verdict: Verdict, spread: float, family: int, margin: float) -> tuple[str, str]:
    """The outcome of a verdict with its numbers, and the reason."""
    gain, low, high, count = verdict.gain, verdict.low, verdict.high, len(verdict.seeds)
    if verdict.p_holm <= LEVEL:
        outcome = BETTER if gain > 0 else WORSE
        if low <= 0 <= high:
            return outcome, "on these classes: the interval, which also resamples classes, contains 0"
        small = max(abs(low), abs(high)) < margin
        return outcome, f"but by less than {margin:g} percentage points" if small else ""
    if -margin < low and high < margin and smallest_p(count) <= LEVEL:
        return f"{NO_DIFFERENCE} of more than {margin:g} percentage points", ""
    level = LEVEL / family
    reasons = []
    if smallest_p(count) > level:
        needed = f"{level:.2g}{f' for {family} comparisons' if family > 1 else ''}"
        reasons.append(f"{count} seeds cannot show a difference (p is at least {smallest_p(count):.2g}, not {needed})")
    options = [
        (seeds_to_show(gain, spread, level), "would show this gain" if gain > 0 else "would show this loss"),
        (seeds_to_exclude(gain, spread, margin), f"would show that it is at most {margin:g} percentage points"),
    ]
    # With few seeds the estimate can be smaller than the present number, although this one did not decide.
    more = [(max(seeds - count, 1), result) for seeds, result in options if seeds is not None]
    if more:
        seeds, result = min(more)
        reasons.append(f"about {seeds} more seed{'' if seeds == 1 else 's'} {result} if mean and spread stay the same")
    else:
        reasons.append(f"even {MAX_SEEDS} seeds would not decide, at this mean and spread")
    return NOT_DECIDED, "; ".join(reasons)
