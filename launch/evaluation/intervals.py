"""Confidence intervals by the percentile bootstrap (Efron 1979).

Every interval is a function of the values and the seed, so that a report can be repeated exactly.
scipy.stats.bootstrap draws its resamples in another order; its ends would differ from results that
are published already. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.types import json_number

# Resampled values that are held in memory together, 32 MB.
_CHUNK = 1 << 22

# Of the larger mean square of seeds and items, the least that their sum less the rest may be;
# simulated coverage is nearest to 0.95 with it (experiments/coverage.py).
_FLOOR = 0.6

# runs[r][t] are the values of table t of run r.
Runs = Sequence[Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Interval:
    """A result with its 95 % interval [low, high].

    It comes from ``n`` values; ``missing`` more could not be scored. Without values, mean, low and
    high are NaN. A single value has an interval of width 0, which carries no information.
    """

    mean: float
    low: float
    high: float
    n: int
    missing: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON: {"mean": 0.5, "ci95": [0.4, 0.6], "n": 100, "missing": 0}.

        NaN becomes null.
        """
        return {
            "mean": json_number(self.mean),
            "ci95": [json_number(self.low), json_number(self.high)],
            "n": self.n,
            "missing": self.missing,
        }


def mean_ci95(
    values: Iterable[float | None],
    *,
    seed: int,
    resamples: int = 10_000,
) -> Interval:
    """MEAN over the values, with the 2.5 and 97.5 percentiles of the mean over resamples.

        mean*_r = 1/n sum_i x_{I_ri},   I_ri uniform on 1..n

    NaN and None mean "could not be scored"; they are left out and counted, never replaced by 0.
    Raises ValueError for an infinite value.
    """
    # numpy turns None into NaN.
    given = np.array(list(values), dtype=np.float64)
    scored = given[~np.isnan(given)]
    if np.isinf(scored).any():
        raise ValueError("the mean of an infinite value has no interval")
    n = len(scored)
    missing = len(given) - n
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, missing)

    # Resample in chunks of rows that fit in memory.
    random = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    means = []
    for first in range(0, resamples, rows):
        count = min(rows, resamples - first)
        means.append(_resampled_means(scored, count, random))
    # The percentiles of the resampled means are the interval.
    low, high = _percentiles(np.concatenate(means))
    return Interval(float(scored.mean()), low, high, n, missing)


def statistic_ci95(
    statistic: Callable[[NDArray[np.int64]], float],
    count: int,
    *,
    seed: int,
    resamples: int = 2_000,
) -> Interval:
    """Bootstrap any statistic of ``count`` items, which gets the indices of the items it reads.

    It serves statistics that are no mean of per-item values, such as an accuracy whose threshold is
    calibrated on the same items. ``mean`` is the statistic of all items in order. Resamples in
    which the statistic is NaN are left out.
    """
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    # The statistic of each resample.
    random = np.random.default_rng(seed)
    draw_R = np.array(
        [statistic(random.integers(0, count, size=count)) for _ in range(resamples)]
    )
    low, high = _percentiles(draw_R[~np.isnan(draw_R)])
    # The statistic of the items themselves.
    mean = float(statistic(np.arange(count)))
    return Interval(mean, low, high, count)


def seeds_ci95(values_SI: Runs | NDArray[np.float64]) -> Interval:
    """MEAN over seeds and items that all seeds share, with an interval for new seeds and items.

    The values x_si of seed s on item i (a prompt, a pair) follow a two-way model with random
    seeds and items and one value in each cell, x_si = mu + a_s + b_i + e_si. Of the mean,

        variance = (MS_seeds + MS_items - MS_rest) / (S I)

    with the mean squares of the analysis of variance, and the interval is Student's. Its degrees of
    freedom are Satterthwaite's (1946), with one change. Three seeds that are alike by chance have
    a small mean square, and his sum then overrates the freedom; so the term of the seeds counts
    2 - p times, where p is their share of the variance. If only seeds matter, S - 1 degrees are
    left, and if only items matter, I - 1. The sum of mean squares is kept from falling far below
    the larger of the first two, which it does by chance where neither seeds nor items matter. A
    percentile bootstrap over three seeds covers 0.80 to 0.96; how often this one covers is
    simulated by experiments/coverage.py.
    Raises ValueError for fewer than two seeds or items, or seeds with unequal numbers of items.
    """
    lengths = {len(row) for row in values_SI}
    if len(lengths) != 1 or len(values_SI) < 2 or min(lengths) < 2:
        counts = [len(row) for row in values_SI]
        raise ValueError(
            "an interval over seeds needs two seeds or more with equal numbers of items, "
            f"at least two, got {counts} items"
        )
    x_SI = np.asarray(values_SI, dtype=np.float64)
    mean = float(x_SI.mean())
    squares, freedoms = mean_squares(x_SI)
    of_seeds, of_items, of_rest = squares
    total = of_seeds + of_items - of_rest
    total = max(total, _FLOOR * max(of_seeds, of_items))
    if total == 0:
        return Interval(mean, mean, mean, x_SI.size)
    share = min(1.0, of_seeds / total)
    terms = squares**2 / freedoms
    terms[0] *= 2 - share
    freedom = total**2 / terms.sum()
    variance = total / x_SI.size
    error = math.sqrt(variance)
    low, high = _student(mean, error, freedom)
    return Interval(mean, low, high, x_SI.size)


def mean_squares(
    x_SI: NDArray[np.float64],
) -> tuple[NDArray[np.float64], tuple[int, int, int]]:
    """Mean squares of seeds, items and the rest, and the degrees of freedom of each."""
    # Deviations of the seeds, of the items, and what both leave.
    seeds, items = x_SI.shape
    centred_SI = x_SI - float(x_SI.mean())
    seed_S1 = centred_SI.mean(axis=1, keepdims=True)
    item_1I = centred_SI.mean(axis=0, keepdims=True)
    rest_SI = centred_SI - seed_S1 - item_1I
    freedoms = (
        seeds - 1,
        items - 1,
        (seeds - 1) * (items - 1),
    )
    sums = (
        items * (seed_S1**2).sum(),
        seeds * (item_1I**2).sum(),
        (rest_SI**2).sum(),
    )
    squares = np.array(sums) / freedoms
    return squares, freedoms


def _student(mean: float, error: float, freedom: float) -> tuple[float, float]:
    """Ends of Student's 95 % interval for a standard error with its degrees of freedom."""
    from scipy import stats

    half = float(stats.t.ppf(0.975, freedom)) * error
    return mean - half, mean + half


def nested_ci95(runs: Runs) -> Interval:
    """MEAN over seeds of each seed's MEAN over its tables; every seed has items of its own.

    The means of the seeds, each the MEAN of its tables' MEANs, are independent and carry both the
    spread of training and that of the items. The interval is Student's with S - 1 degrees of
    freedom: wide for three seeds, 4.3 standard errors, because three values say little about
    their spread. Raises ValueError for fewer than two seeds or a table without values.
    """
    sizes = [[len(table) for table in run] for run in runs]
    if len(runs) < 2 or any(0 in run for run in sizes):
        raise ValueError("an interval over seeds needs two seeds or more with values")
    means = []
    for run in runs:
        of_tables = [np.mean(table) for table in run]
        means.append(np.mean(of_tables))
    mean = float(np.mean(means))
    error = float(np.std(means, ddof=1)) / math.sqrt(len(runs))
    low, high = _student(mean, error, len(runs) - 1)
    return Interval(mean, low, high, sum(map(sum, sizes)))


def _resampled_means(
    value_N: NDArray[np.float64],
    resamples: int,
    random: np.random.Generator,
) -> NDArray[np.float64]:
    """MEAN of each resample of the values -> (resamples,)."""
    count = len(value_N)
    indices = random.integers(0, count, size=(resamples, count))
    return value_N[indices].mean(axis=1)


def _percentiles(draws: NDArray[np.float64]) -> tuple[float, float]:
    # Every resample may have been left out.
    if not len(draws):
        return math.nan, math.nan
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
