"""The statistics of studies, and their error rate and power on simulated studies."""

import math

import numpy as np
import pytest
from scipy import stats

from engine.study.statistics import (
    LEVEL,
    Comparison,
    Groups,
    bootstrap_interval,
    detectable,
    holm,
    judge,
    probability_of_gain,
    seeds_to_exclude,
    seeds_to_show,
    sign_flip_power,
    sign_flip_test,
    smallest_p,
    t_test_power,
)

STUDIES, ARMS, SEEDS, CLASSES = 1000, 3, 8, 8
COLUMNS = tuple(("train", "test", f"class {index}") for index in range(CLASSES))
GROUPS = Groups.of(COLUMNS)
# 5 %, and what 1,000 studies can show above it by chance.
MOST_ERRORS = 0.065


def gaussian(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Log-normal noise: a few runs are much worse."""
    return 1.6 - np.exp(rng.standard_normal(shape))


def heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_t(2.5, shape)


def simulate(noise=gaussian, gains=(0.0, 0.0, 0.0), studies: int = STUDIES, seeds: int = SEEDS) -> np.ndarray:
    """Differences (arms, studies, seeds, classes) from the arm compared with, as on the toy world.

    A class is easy or hard, a seed good or bad for all arms; a run's own luck has a part that all its classes share (1
    point) and one of each class (2 points). Both arms of a difference have their own luck.
    """
    rng = np.random.default_rng(5)
    shape = (len(gains) + 1, studies, seeds)
    classes, of_seed = 8 * rng.standard_normal((studies, 1, CLASSES)), 1.5 * noise(rng, (studies, seeds, 1))
    luck = 1.0 * noise(rng, (*shape, 1)) + 2.0 * noise(rng, (*shape, CLASSES))
    figures = 80 + classes + of_seed + luck
    return figures[1:] + np.array(gains)[:, None, None, None] - figures[0]


def decided(differences: np.ndarray) -> np.ndarray:
    """Whether the verdict on each arm (arms, studies) is better or worse, all arms of a study corrected together."""
    p_values = np.stack([sign_flip_test(GROUPS.mean(of_arm)) for of_arm in differences], axis=-1)
    return (holm(p_values) <= LEVEL).T


@pytest.mark.parametrize("noise", [gaussian, skewed, heavy])
def test_an_arm_without_effect_is_seldom_called_better_or_worse(noise) -> None:
    """The error rate of single arms, and of any arm in studies with three, is at most 6.5 %."""
    found = decided(simulate(noise))
    alone = decided(simulate(noise, gains=(0.0,)))
    assert alone.mean() <= MOST_ERRORS
    assert found.any(axis=0).mean() <= MOST_ERRORS
    # The test is not merely timid: with 8 seeds its levels are steps of 1/128.
    assert alone.mean() > 0.02


@pytest.mark.parametrize("seeds", [6, 8, 10])
def test_a_real_effect_is_found_with_the_computed_power(seeds: int) -> None:
    # A seed's difference: two runs' shared luck, and that of their classes averaged.
    spread = math.sqrt(2 * (1.0 + 4.0 / CLASSES))
    gain = detectable(seeds, LEVEL) * spread
    found = decided(simulate(gains=(gain,), seeds=seeds)).mean()
    error = math.sqrt(0.8 * 0.2 / STUDIES)
    assert abs(found - 0.8) < 3 * error
    # And one of half the size, much more seldom.
    assert decided(simulate(gains=(gain / 2,), seeds=seeds)).mean() < 0.5


def test_verdicts_follow_from_the_test() -> None:
    """`judge` gives the verdicts whose error rates are tested above."""
    differences = simulate(gains=(3.0, 0.0, -3.0), studies=6)
    found = decided(differences)
    words = []
    for study in range(6):
        contrasts = [Comparison("m", tuple(range(SEEDS)), differences[arm, study], GROUPS) for arm in range(ARMS)]
        verdicts = judge(contrasts, 0.5)
        assert [verdict.outcome in ("better", "worse") for verdict in verdicts] == found[:, study].tolist()
        words += [verdict.outcome for verdict in verdicts]
    assert {"better", "worse", "not decided"} <= set(words)


def test_relevant_differences_are_seldom_called_no_difference() -> None:
    """A difference equal to the margin is called smaller in at most 5 % of studies, a difference of 0 often."""
    quiet = 0.12
    for gain, least, most in ((0.5, 0.0, LEVEL), (0.0, 0.8, 1.0)):
        differences = gain + quiet * (simulate(gains=(0.0,), studies=100)[0])
        said = [
            judge([Comparison("m", tuple(range(SEEDS)), of_study, GROUPS)], 0.5)[0].outcome.startswith("no difference")
            for of_study in differences
        ]
        assert least <= np.mean(said) <= most


def test_the_interval_covers_the_truth() -> None:
    """In about 95 % of studies, with few seeds too."""
    for seeds in (6, 10):
        found = [
            bootstrap_interval(of_study, GROUPS, resamples=600)
            for of_study in simulate(gains=(0.7,), studies=300, seeds=seeds)[0]
        ]
        covered = np.mean([low <= 0.7 <= high for low, high in found])
        assert 0.92 <= covered <= 0.995
    # Where all classes go up and down together, the seeds alone have to make it wide enough.
    alone = np.random.default_rng(1).standard_normal((400, 8, 1))
    one = Groups.of(COLUMNS[:1])
    covered = np.mean([low <= 0 <= high for low, high in (bootstrap_interval(of, one, resamples=600) for of in alone)])
    assert 0.92 <= covered <= 0.98


def test_means_are_over_classes_then_datasets_then_pairs() -> None:
    columns = [("a", "b", "1"), ("a", "b", "2"), ("a", "c", "1"), ("d", "b", "1")]
    groups = Groups.of(columns)
    values = np.array([[1.0, 3.0, 6.0, 10.0], [1.0, np.nan, 6.0, 10.0], [1.0, 3.0, np.nan, 10.0]])
    found = groups.mean(values)
    assert found[:2] == pytest.approx([(2 + 6) / 4 + 5, (1 + 6) / 4 + 5])
    assert np.isnan(found[2])


def test_the_bootstrap_omits_undefined_values() -> None:
    differences = np.tile([1.0, 2.0, np.nan], (6, 1)) + np.arange(6)[:, None] / 10
    groups = Groups.of([("a", "b", str(index)) for index in range(3)])
    low, high = bootstrap_interval(differences, groups)
    assert 1.0 <= low < 1.75 < high <= 2.5
    assert bootstrap_interval(differences, groups) == (low, high), "the same report, made again"
    differences[2] = np.nan
    assert all(map(math.isnan, bootstrap_interval(differences, groups)))


def test_the_simulated_test_equals_the_test() -> None:
    """The power equals that of scipy's permutation test, which computes the p values."""
    drawn = np.random.default_rng(2).standard_normal((400, 7)) + 0.6
    for level in (0.05, 0.05 / 3):
        assert sign_flip_power(drawn, level) == (sign_flip_test(drawn) <= level).mean()
    # Beyond the exact test, the t test's power joins it without a step.
    effect = detectable(13, LEVEL)
    assert t_test_power(effect, 13, LEVEL) == pytest.approx(0.8, abs=0.02)
    assert detectable(14, LEVEL) < effect


def test_few_seeds_cannot_show_anything() -> None:
    assert [smallest_p(seeds) for seeds in (2, 5, 6)] == [0.5, 0.0625, 0.03125]
    assert smallest_p(6) == sign_flip_test(np.arange(1.0, 7.0))
    assert detectable(5, LEVEL) is None
    assert detectable(6, LEVEL) is not None
    assert detectable(6, LEVEL / 2) is None
    (verdict,) = judge([Comparison("m", (0, 1, 2), np.full((3, CLASSES), 9.0) + np.eye(3, CLASSES), GROUPS)], 0.5)
    assert verdict.outcome == "not decided"
    assert "3 seeds cannot show a difference" in verdict.reason
    assert "about 3 more seeds would show this gain" in verdict.reason
    assert math.isnan(verdict.detectable_gain)


def test_degenerate_studies() -> None:
    none, one = judge([Comparison("m", (0,) * n, np.ones((n, CLASSES)), GROUPS) for n in (0, 1)], 0.5)
    assert none.outcome == one.outcome == "not decided"
    assert math.isnan(none.gain) and one.gain == 1.0
    (verdict,) = judge([Comparison("m", tuple(range(6)), np.zeros((6, CLASSES)), GROUPS)], 0.5)
    assert verdict.outcome == "no difference of more than 0.5 percentage points"
    assert (verdict.p, verdict.probability_of_gain, verdict.detectable_gain) == (1.0, 0.5, 0.0)


def test_qualified_gains() -> None:
    small = 0.1 + np.random.default_rng(0).standard_normal((8, CLASSES)) / 100
    (verdict,) = judge([Comparison("m", tuple(range(8)), small, GROUPS)], 0.5)
    assert (verdict.outcome, verdict.reason) == ("better", "but by less than 0.5 percentage points")
    effects = np.array([9.0, -7.0, 8.0, -6.5, 1.0, 0.5, -0.5, 0.1])
    on_classes = effects + np.random.default_rng(0).standard_normal((8, 1)) / 20
    (verdict,) = judge([Comparison("m", tuple(range(8)), on_classes, GROUPS)], 0.5)
    assert verdict.outcome == "better"
    assert verdict.low < 0 < verdict.high
    assert "on these classes" in verdict.reason


def test_holm() -> None:
    assert holm(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.6, 0.9])) == pytest.approx([1.0, 1.0])
    assert holm(np.array([0.01, np.nan, 0.03]))[[0, 2]] == pytest.approx([0.02, 0.03])


def test_the_gain_of_a_new_seed_follows_the_t_distribution() -> None:
    differences = np.array([0.5, 1.0, 1.5, 2.0])
    expected = stats.t.cdf(1.25 / (differences.std(ddof=1) * math.sqrt(1.25)), 3)
    assert probability_of_gain(differences) == pytest.approx(expected)


def test_number_of_required_seeds() -> None:
    assert seeds_to_show(1.0, 1.0, LEVEL) == next(n for n in range(6, 100) if detectable(n, LEVEL) <= 1.0)
    assert seeds_to_show(0.01, 1.0, LEVEL) is None
    assert seeds_to_show(1.0, 0.0, LEVEL) == 6
    assert seeds_to_exclude(0.0, 0.5, 0.5) < seeds_to_exclude(0.2, 0.5, 0.5)
    assert seeds_to_exclude(0.6, 0.1, 0.5) is None
    differences = np.random.default_rng(1).standard_normal((8, CLASSES))
    (verdict,) = judge([Comparison("m", tuple(range(8)), differences, GROUPS)], 0.05)
    assert verdict.outcome == "not decided"
    (hopeless,) = judge([Comparison("m", tuple(range(8)), 0.06 + 9 * (differences - differences.mean()), GROUPS)], 0.05)
    assert "even 100 seeds would not decide" in hopeless.reason
