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


def runs_ci95(
    runs: Runs,
    *,
    seed: int,
    resamples: int = 2_000,
) -> Interval:
    """MEAN over runs, of the MEAN over a run's tables, of the MEAN of a table's values.

    The bootstrap has two stages (Davison and Hinkley 1997, section 3.8): it draws whole runs with
    replacement (the spread of training), then the values of each of their tables (the spread of
    testing). ``n`` counts all values. With a single run only the second stage is left. Raises
    ValueError without runs, tables or values, or for runs with unequal numbers of tables.
    """
    sizes = [[len(table) for table in run] for run in runs]
    lengths = {len(run) for run in sizes}
    if len(lengths) != 1 or 0 in lengths or any(0 in run for run in sizes):
        raise ValueError(
            f"runs need equal numbers of tables with values, got tables of {sizes} values"
        )
    random = np.random.default_rng(seed)

    # drawn[run, slot] holds the run's mean in each resample, drawn anew for every slot.
    slots = len(runs)
    drawn = np.empty((slots, slots, resamples))
    run_means = []
    for r, run in enumerate(runs):
        tables = [np.asarray(table, dtype=np.float64) for table in run]
        run_means.append([table.mean() for table in tables])
        for slot in range(slots):
            means = [_resampled_means(table, resamples, random) for table in tables]
            drawn[r, slot] = np.mean(means, axis=0)

    # Each slot of a resample takes a run by chance.
    chosen = random.integers(0, slots, size=(slots, resamples))
    slot_index = np.arange(slots)[:, None]
    means = drawn[chosen, slot_index, np.arange(resamples)].mean(axis=0)
    low, high = _percentiles(means)
    mean = float(np.mean(run_means))
    return Interval(mean, low, high, sum(map(sum, sizes)))


def difference_ci95(
    runs: Runs,
    others: Runs,
    *,
    seed: int,
) -> Interval:
    """`runs_ci95` of ``runs`` minus ``others``, value by value.

    Both have measured the same things with the same seeds. Raises ValueError where the numbers of
    runs, tables or values differ.
    """
    differences = []
    for run, other_run in zip(runs, others, strict=True):
        tables = []
        for table, other in zip(run, other_run, strict=True):
            values = zip(table, other, strict=True)
            tables.append([value - other_value for value, other_value in values])
        differences.append(tables)
    return runs_ci95(differences, seed=seed)


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
