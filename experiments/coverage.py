"""Simulate how often intervals hold the truth: `python experiments/coverage.py`.

Values are drawn from known seeds, items and noise, with the spreads that the committed results
show and a range around them; an interval of 95 % should hold the true mean in 93 to 97 of 100
draws. Beside it stands the percentile bootstrap over seeds and items that was used before.
Results: docs/results/coverage.{json,md}.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments import tables
from experiments.intervals import ORACLE_PAGES, REWARD_MODEL_PAGE, SUFFIX
from experiments.runner import ROOT, commit, write_json
from launch.evaluation.intervals import mean_ci95, mean_squares, seeds_ci95

COMMAND = "python experiments/coverage.py"
# Spread of seeds, of items and of the rest; the values are scores in [0, 1].
GRID = (
    (0.000, 0.10, 0.15),
    (0.005, 0.10, 0.15),
    (0.010, 0.10, 0.15),
    (0.020, 0.10, 0.15),
    (0.030, 0.10, 0.15),
    (0.010, 0.00, 0.25),
    (0.010, 0.20, 0.10),
)
SEEDS = (3, 5)
ITEMS = 240
RESAMPLES = 400

Spreads = tuple[float, float, float]


def spreads_of(x_SI: NDArray[np.float64]) -> Spreads:
    """Estimate the standard deviations of seeds, items and the rest by their mean squares."""
    seeds, items = x_SI.shape
    (of_seeds, of_items, rest), _ = mean_squares(x_SI)
    variances = (
        max(0.0, of_seeds - rest) / items,
        max(0.0, of_items - rest) / seeds,
        rest,
    )
    first, second, third = np.sqrt(variances).tolist()
    return first, second, third


def seen_spreads(folder: Path) -> dict[str, Spreads]:
    """Spreads of the gain over the base of every arm, and of every way to train a reward model."""
    found = {}
    path = folder / f"{REWARD_MODEL_PAGE}{SUFFIX}"
    if path.exists():
        found |= reward_model_spreads(tables.read_values(path)["judges"])
    for page in ORACLE_PAGES:
        path = folder / f"{page}{SUFFIX}"
        if not path.exists():
            continue
        values = tables.read_values(path)
        for arm, by_seed in values.items():
            if arm == "base" or len(by_seed) < 2:
                continue
            gains = []
            for seed, columns in by_seed.items():
                base = values["base"][seed]["shapes"]
                gains.append(np.subtract(columns["shapes"], base))
            found[f"{page}: {arm}"] = spreads_of(np.stack(gains))
    return found


def reward_model_spreads(judges: Sequence[Mapping[str, Any]]) -> dict[str, Spreads]:
    """Spreads of what is right and wrong on all tests, of every method at its largest size."""
    largest = max(judge["size"] for judge in judges)
    by_method: dict[str, list[NDArray[np.float64]]] = {}
    for judge in judges:
        if judge["size"] == largest:
            right = [tests["right"] for tests in judge["tests"].values()]
            by_method.setdefault(judge["method"], []).append(np.concatenate(right))
    found = {}
    for method, rows in by_method.items():
        if len(rows) > 1:
            name = f"{REWARD_MODEL_PAGE}: {method}"
            found[name] = spreads_of(np.stack(rows))
    return found


def draws(spreads: Spreads, seeds: int, count: int) -> Iterator[NDArray[np.float64]]:
    """Draw tables of values whose true mean is 0."""
    random = np.random.default_rng([seeds, *(round(1e6 * s) for s in spreads)])
    of_seeds, of_items, rest = spreads
    for _ in range(count):
        table = of_seeds * random.standard_normal((seeds, 1))
        table = table + of_items * random.standard_normal((1, ITEMS))
        yield table + rest * random.standard_normal((seeds, ITEMS))


def bootstrap(table: NDArray[np.float64], random: np.random.Generator) -> bool:
    """Whether the percentile bootstrap over seeds, then items, holds 0."""
    seeds, items = table.shape
    chosen = random.integers(0, seeds, (RESAMPLES, seeds))
    means = np.empty((RESAMPLES, seeds))
    for slot in range(seeds):
        picked = random.integers(0, items, (RESAMPLES, items))
        rows = table[chosen[:, slot]]
        means[:, slot] = np.take_along_axis(rows, picked, axis=1).mean(axis=1)
    low, high = np.quantile(means.mean(axis=1), [0.025, 0.975])
    return bool(low <= 0 <= high)


def coverage(spreads: Spreads, seeds: int, count: int) -> dict[str, float]:
    """Share of draws whose interval holds the truth, of both intervals."""
    hits = 0
    boot_hits = 0
    # The bootstrap takes long: a quarter of the draws.
    few = count // 4
    random = np.random.default_rng(0)
    for number, table in enumerate(draws(spreads, seeds, count)):
        interval = seeds_ci95(table)
        hits += interval.low <= 0 <= interval.high
        if number < few:
            boot_hits += bootstrap(table, random)
    return {"seeds_ci95": hits / count, "bootstrap": boot_hits / few}


def single_run_coverage(count: int) -> dict[str, float]:
    """Coverage of `mean_ci95` over the pairs of a single run, of share p right out of n."""
    random = np.random.default_rng(0)
    found = {}
    for share, size in ((0.8, 640), (0.9, 300)):
        hits = 0
        for _ in range(count):
            right = random.random(size) < share
            interval = mean_ci95(right, seed=0, resamples=1000)
            hits += interval.low <= share <= interval.high
        found[f"p = {share}, n = {size}"] = hits / count
    return found


def page_of(record: dict[str, Any], seen: dict[str, Spreads]) -> list[str]:
    """Lines of the page."""
    rows = []
    for row in record["simulated"]:
        spreads = [f"{value:.3f}" for value in row["spreads"]]
        shares = [f"{row['seeds_ci95']:.3f}", f"{row['bootstrap']:.3f}"]
        rows.append([row["what"], str(row["seeds"]), *spreads, *shares])
    head = (
        "spreads of",
        "seeds",
        "seeds differ by",
        "items by",
        "the rest by",
        "our interval",
        "bootstrap, as before",
    )
    single = [[name, f"{value:.3f}"] for name, value in record["single"].items()]
    return [
        "# How often the intervals hold the truth",
        "",
        f"Made by `{COMMAND}` at commit {record['commit']}: {record['draws']} draws for each row, "
        f"of {ITEMS} items; 0.95 is wanted. Spreads of {len(seen)} arms of the committed results "
        "and a range around them.",
        "",
        *tables.markdown_table(head, rows),
        "",
        "A single run, bootstrap over its pairs:",
        "",
        *tables.markdown_table(["pairs", "coverage"], single),
    ]


def simulate(cases: Sequence[tuple[str, Spreads]], count: int) -> list[dict[str, Any]]:
    """Coverage of every case for three and five seeds."""
    rows = []
    for what, spreads in cases:
        for seeds in SEEDS:
            row: dict[str, Any] = {"what": what, "seeds": seeds, "spreads": spreads}
            rows.append(row | coverage(spreads, seeds, count))
    return rows


def main() -> None:
    """Simulate all cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--draws", type=int, default=2000)
    args = parser.parse_args()
    seen = seen_spreads(args.out)
    cases = [("a range", spreads) for spreads in GRID]
    cases += seen.items()
    record = {
        "command": COMMAND,
        "commit": commit(),
        "draws": args.draws,
        "simulated": simulate(cases, args.draws),
        "single": single_run_coverage(args.draws // 4),
    }
    write_json(args.out / "coverage.json", record)
    tables.write_page(args.out / "coverage.md", page_of(record, seen))


if __name__ == "__main__":
    main()
