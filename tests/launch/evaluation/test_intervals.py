"""Error bars against closed forms, and against resamples small enough to enumerate by hand."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from launch.evaluation.intervals import (
    Interval,
    mean_ci95,
    nested_ci95,
    seeds_ci95,
    statistic_ci95,
)


def test_bernoulli_mean_has_the_binomial_interval() -> None:
    """The ones in a resample of 130 ones in 200 are Binomial(200, 0.65)."""
    interval = mean_ci95([1.0] * 130 + [0.0] * 70, seed=0)
    low, high = stats.binom.ppf([0.025, 0.975], 200, 0.65) / 200
    assert interval.mean == pytest.approx(0.65)
    assert interval.low == pytest.approx(
        low, abs=0.5 / 200 + 1e-12
    )  # the binomial moves in steps of 1/200
    assert interval.high == pytest.approx(high, abs=0.5 / 200 + 1e-12)
    assert interval.n == 200


def test_interval_of_many_values_is_normal() -> None:
    """mean -+ 1.96 s / sqrt(n), population s; 10,000 resamples give each end to 1 % or so."""
    values = np.random.default_rng(3).normal(5.0, 2.0, size=2_000)
    interval = mean_ci95(values, seed=1)
    half = 1.96 * values.std() / math.sqrt(2_000)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.04 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.04 * half)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0.0, 1.0], 0.0, 1.0),  # 0 with 1/4, 1/2 with 1/2, 1 with 1/4
        (
            [0.0, 0.0, 3.0],
            0.0,
            3.0,
        ),  # threes ~ Binomial(3, 1/3): P(3 of 3) = 1/27 > 0.025
        (
            [0.0, 0.0, 0.0, 4.0],
            0.0,
            3.0,
        ),  # P(4 of 4) = 1/256 < 0.025 < P(>= 3) = 13/256
        ([2.5], 2.5, 2.5),
    ],
)
def test_interval_of_few_values_by_hand(
    values: list[float], low: float, high: float
) -> None:
    interval = mean_ci95(values, seed=0)
    assert (interval.low, interval.high) == (low, high)
    assert interval.mean == pytest.approx(sum(values) / len(values))


def test_interval_equals_all_27_resamples_of_three_values() -> None:
    values = (1.0, 2.0, 10.0)
    means = sorted(sum(draw) / 3 for draw in itertools.product(values, repeat=3))
    interval = mean_ci95(values, seed=0)
    assert interval.low == pytest.approx(
        means[math.floor(0.025 * 27)]
    )  # 1, of mass 1/27
    assert interval.high == pytest.approx(means[math.floor(0.975 * 27)])  # 10


def test_missing_values_are_counted_and_keep_the_interval() -> None:
    whole = mean_ci95([0.25, 0.5, 1.0], seed=7)
    holed = mean_ci95([0.25, None, 0.5, math.nan, 1.0], seed=7)
    assert holed == Interval(whole.mean, whole.low, whole.high, n=3, missing=2)


def test_interval_of_no_values_is_null_in_json() -> None:
    text = json.dumps(mean_ci95([math.nan, None], seed=0).as_dict(), allow_nan=False)
    assert json.loads(text) == {
        "mean": None,
        "ci95": [None, None],
        "n": 0,
        "missing": 2,
    }


def test_infinite_value_raises() -> None:
    with pytest.raises(ValueError, match="infinite"):
        mean_ci95([1.0, math.inf], seed=0)


def test_interval_depends_on_the_seed() -> None:
    values = np.random.default_rng(0).random(50)
    assert mean_ci95(values, seed=1) == mean_ci95(values, seed=1)
    assert mean_ci95(values, seed=1).low != mean_ci95(values, seed=2).low


def test_interval_does_not_depend_on_chunks() -> None:
    """20,000 values do not fit one chunk of resamples: still the normal one."""
    values = np.random.default_rng(5).random(20_000)
    interval = mean_ci95(values, seed=0, resamples=2_000)
    half = 1.96 * math.sqrt(1 / 12 / 20_000)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.08)


def test_median_has_the_interval_of_order_statistics() -> None:
    """For odd n a resampled median has P(m <= x_(k)) = P(Binomial(n, k/n) > n/2)."""
    n = 101
    values = np.arange(n, dtype=float)
    interval = statistic_ci95(lambda index: float(np.median(values[index])), n, seed=0)
    cdf = np.array([stats.binom.sf(n // 2, n, k / n) for k in range(1, n + 1)])
    assert interval.mean == 50.0
    assert interval.low == pytest.approx(float(np.argmax(cdf >= 0.025)), abs=1.0)
    assert interval.high == pytest.approx(float(np.argmax(cdf >= 0.975)), abs=1.0)


def test_statistic_ci95_of_a_mean_equals_mean_ci95() -> None:
    values = np.random.default_rng(2).random(80)
    general = statistic_ci95(
        lambda index: float(values[index].mean()), 80, seed=4, resamples=10_000
    )
    special = mean_ci95(values, seed=9)
    assert general.mean == pytest.approx(special.mean)
    assert general.low == pytest.approx(special.low, abs=0.005)
    assert general.high == pytest.approx(special.high, abs=0.005)
    assert statistic_ci95(lambda index: 0.0, 0, seed=0).n == 0


def test_interval_over_seeds_is_students_where_items_do_not_matter() -> None:
    """Every item of a seed is alike: only the seeds' means are left, with S - 1 degrees."""
    means = np.array([0.2, 0.5, 0.9])
    interval = seeds_ci95(np.repeat(means[:, None], 7, axis=1))
    half = stats.t.ppf(0.975, 2) * means.std(ddof=1) / math.sqrt(3)
    assert interval.mean == pytest.approx(means.mean())
    assert interval.high - interval.mean == pytest.approx(half)
    assert interval.n == 21


def test_interval_over_seeds_is_students_over_items_where_seeds_do_not_matter() -> None:
    values = np.random.default_rng(0).normal(size=30)
    interval = seeds_ci95(np.stack([values] * 4))
    want = stats.t.interval(0.95, 29, values.mean(), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(want)


def test_mean_squares_by_hand() -> None:
    """x = [[1, 2, 6], [3, 2, 10]]: MS of seeds 6, of items 24 and of the rest 2.

    The seeds' share is 6 / 28, so their term counts 50 / 28 times.
    """
    interval = seeds_ci95([[1.0, 2.0, 6.0], [3.0, 2.0, 10.0]])
    total = 6 + 24 - 2
    freedom = total**2 / (6**2 * 50 / 28 + 24**2 / 2 + 2**2 / 2)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(total / 6)
    assert interval.mean == 4.0
    assert interval.high == pytest.approx(4.0 + half)


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert seeds_ci95([[0.5, 0.5], [0.5, 0.5]]) == Interval(0.5, 0.5, 0.5, 4)


@pytest.mark.parametrize("values", [[[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 2.0], [1.0]]])
def test_interval_over_seeds_needs_two_seeds_and_items(
    values: list[list[float]],
) -> None:
    with pytest.raises(ValueError, match="two seeds"):
        seeds_ci95(values)


def test_nested_interval_is_students_over_the_seeds() -> None:
    """Tables weigh equally, whatever their sizes."""
    runs = [[[1.0] * 9, [0.0]], [[0.0], [0.0, 0.0]], [[1.0], [1.0, 1.0]]]
    interval = nested_ci95(runs)
    want = stats.t.interval(0.95, 2, 0.5, stats.sem([0.5, 0.0, 1.0]))
    assert (interval.low, interval.high) == pytest.approx(want)
    assert interval.n == 16
    with pytest.raises(ValueError, match="two seeds"):
        nested_ci95(runs[:1])


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.03])
def test_interval_over_seeds_covers_the_mean(seeds: int, spread: float) -> None:
    """Simulated with the spreads of prompts in docs/results; 1,500 draws, three sigma 0.017."""
    random = np.random.default_rng(seeds)
    hits = 0
    for _ in range(1500):
        of_seeds = spread * random.standard_normal((seeds, 1))
        of_items = 0.1 * random.standard_normal((1, 120))
        rest = 0.15 * random.standard_normal((seeds, 120))
        interval = seeds_ci95(of_seeds + of_items + rest)
        hits += interval.low <= 0 <= interval.high
    assert 0.93 - 0.017 <= hits / 1500 <= 0.97 + 0.017
