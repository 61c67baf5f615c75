"""Error bars by the percentile bootstrap (Efron 1979): resample what was measured, look at how the result spreads.

Everything is a function of the values and the seed, so a report can be made again. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 22  # resampled values held at once, 32 MB


@dataclass(frozen=True)
class Interval:
    """A result with its 95 % interval [low, high], from ``n`` values; ``missing`` more could not be judged.

    Without values, mean, low and high are NaN. One value has an interval of width 0, which says nothing.
    """

    mean: float
    low: float
    high: float
    n: int
    missing: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: {"mean": 0.5, "ci95": [0.4, 0.6], "n": 100, "missing": 0}."""
        mean, low, high = (
            v if math.isfinite(v) else None for v in (self.mean, self.low, self.high)
        )
        return {"mean": mean, "ci95": [low, high], "n": self.n, "missing": self.missing}


def mean_ci95(
    values: Iterable[float | None], *, seed: int, resamples: int = 10_000
) -> Interval:
    """MEAN over the values that are there, and the 2.5 and 97.5 percentiles of the mean over resamples.

        mean*_r = 1/n sum_i x_{I_ri},   I_ri uniform on 1..n

    NaN and None are "not judged": left out and counted, never 0. Raises ValueError for an infinite value or no
    resamples.
    """
    given = np.array(
        [math.nan if value is None else value for value in values], dtype=np.float64
    )
    judged = given[~np.isnan(given)]
    if np.isinf(judged).any():
        raise ValueError("mean_ci95: the mean of an infinite value has no interval")
    _check(resamples)
    n, missing = len(judged), len(given) - len(judged)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, missing)
    random = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    sizes = [min(rows, resamples - first) for first in range(0, resamples, rows)]
    means = np.concatenate(
        [judged[random.integers(0, n, size=(size, n))].mean(axis=1) for size in sizes]
    )
    low, high = _percentiles(means)
    return Interval(float(judged.mean()), low, high, n, missing)


def runs_ci95(
    runs: Sequence[Sequence[Sequence[float]]], *, seed: int, resamples: int = 2_000
) -> Interval:
    """MEAN over runs, of the MEAN over a run's tables, of the MEAN of a table's values; resampled in two stages.

    First whole runs are drawn with replacement (the spread of training), then the values of each of their tables (the
    spread of testing), as Davison and Hinkley 1997, 3.8. ``n`` counts all values. One run leaves the second stage only.
    Raises ValueError without runs, tables or values, or for runs with unequal numbers of tables.
    """
    if (
        not runs
        or not runs[0]
        or len({len(run) for run in runs}) > 1
        or not all(len(t) for run in runs for t in run)
    ):
        raise ValueError(
            f"runs_ci95: runs of equally many tables with values, got {[[*map(len, r)] for r in runs]}"
        )
    _check(resamples)
    random = np.random.default_rng(seed)
    tables = [[np.asarray(table, dtype=np.float64) for table in run] for run in runs]
    slots = len(runs)
    drawn = np.empty(
        (slots, slots, resamples)
    )  # [run, slot]: the run's mean in a resample, anew for every slot
    for r, run in enumerate(tables):
        for slot in range(slots):
            drawn[r, slot] = np.mean(
                [
                    t[random.integers(0, len(t), size=(resamples, len(t)))].mean(axis=1)
                    for t in run
                ],
                axis=0,
            )
    chosen = random.integers(0, slots, size=(slots, resamples))
    means = drawn[chosen, np.arange(slots)[:, None], np.arange(resamples)].mean(axis=0)
    low, high = _percentiles(means)
    mean = float(np.mean([[t.mean() for t in run] for run in tables]))
    return Interval(mean, low, high, sum(len(t) for run in tables for t in run))


def difference_ci95(
    runs: Sequence[Sequence[Sequence[float]]],
    others: Sequence[Sequence[Sequence[float]]],
    *,
    seed: int,
) -> Interval:
    """`runs_ci95` of ``runs`` minus ``others``, value by value: the same seeds, the same things measured.

    Raises ValueError where there are not equally many.
    """
    pairs = [
        list(zip(run, other, strict=True))
        for run, other in zip(runs, others, strict=True)
    ]
    return runs_ci95(
        [
            [[a - b for a, b in zip(*both, strict=True)] for both in run]
            for run in pairs
        ],
        seed=seed,
    )


def statistic_ci95(
    statistic: Callable[[NDArray[np.int64]], float],
    count: int,
    *,
    seed: int,
    resamples: int = 2_000,
) -> Interval:
    """The same for any statistic of ``count`` items: it is called with the indices of the items to look at.

    The mean is the statistic of all of them, in order; resamples in which it is NaN are left out. For what is no mean
    of per-item values, such as an accuracy whose threshold is calibrated on the very items.
    """
    _check(resamples)
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    random = np.random.default_rng(seed)
    draws = np.array(
        [statistic(random.integers(0, count, size=count)) for _ in range(resamples)]
    )
    low, high = _percentiles(draws[~np.isnan(draws)])
    return Interval(float(statistic(np.arange(count))), low, high, count)


def _check(resamples: int) -> None:
    if resamples < 1:
        raise ValueError(f"a bootstrap needs resamples >= 1, got {resamples}")


def _percentiles(draws: NDArray[np.float64]) -> tuple[float, float]:
    if not len(draws):
        return math.nan, math.nan
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
