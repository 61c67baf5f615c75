"""Make every interval of docs/results again from the committed values.

`python experiments/intervals.py` reads NAME.values.json.gz beside each NAME.json, computes the
means and intervals, compares them with NAME.json, and exits with code 1 if any differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.files import read_json
from experiments import tables
from experiments.guards import record_of
from experiments.long_grpo import change
from experiments.oracle_scores import Scores, oracle_of
from launch.evaluation.intervals import mean_ci95

# Pages about generators, with the arm that every other is compared with.
ORACLE_PAGES = (
    "reproduce_grpo",
    "reproduce_dpo",
    "fast_sampler",
)
REWARD_MODEL_PAGE = "reproduce_rm"
LONG_PAGE = "long_grpo"
GUARDS_PAGE = "guards"
SUFFIX = ".values.json.gz"

# (where it stands, the interval in the file, the interval from the values)
Comparison = tuple[str, Any, Any]


def oracle_intervals(record: Mapping[str, Any], values: Any) -> Iterator[Comparison]:
    """Compare the totals of all arms, and their gains over the base."""
    scores: Scores = {}
    for arm, by_seed in values.items():
        scores[arm] = {int(seed): columns for seed, columns in by_seed.items()}
    for arm, results in record["arms"].items():
        yield f"{arm}: oracle", results["oracle"], oracle_of(scores, arm)
        if "gain" in results:
            again = oracle_of(scores, arm, minus="base")
            yield f"{arm}: gain", results["gain"], again


def reward_model_intervals(
    record: Mapping[str, Any], values: Any
) -> Iterator[Comparison]:
    """Compare the accuracy of every reward model on every test."""
    pairs = zip(record["judges"], values["judges"], strict=True)
    for results, judge in pairs:
        name = f"{judge['method']}, seed {judge['seed']}, {judge['size']} pairs"
        for test, outcome in judge["tests"].items():
            again = mean_ci95(outcome["right"], seed=0, resamples=2_000)
            accuracy = results["tests"][test]["accuracy"]
            yield f"{name}: {test}", accuracy, again.as_dict()


def long_intervals(record: Mapping[str, Any], values: Any) -> Iterator[Comparison]:
    """Compare the changes of every held-out measurement of a long training."""
    curves = {int(seed): rows for seed, rows in values.items()}
    peak = record["peak"]
    for key in record["rise"]:
        yield f"{key}: rise", record["rise"][key], change(curves, key, 0, peak)
        yield f"{key}: fall", record["fall"][key], change(curves, key, peak, -1)


def alarms(record: Mapping[str, Any], values: Any) -> Iterator[Comparison]:
    """Compare what every run of `experiments/guards.py` did; it has no intervals."""
    for arm, by_seed in values.items():
        for seed, curve in by_seed.items():
            stored = record["arms"][arm][seed]
            yield f"{arm} seed {seed}", stored, record_of(curve)


def differing(folder: Path) -> tuple[int, list[str]]:
    """Count the intervals of a folder of results, and list those that come out differently."""
    count = 0
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        name = path.name.removesuffix(SUFFIX)
        record = read_json(folder / f"{name}.json")
        values = tables.read_values(path)
        if name in ORACLE_PAGES:
            comparisons = oracle_intervals(record, values)
        elif name == GUARDS_PAGE:
            comparisons = alarms(record, values)
        elif name == REWARD_MODEL_PAGE:
            comparisons = reward_model_intervals(record, values)
        elif name == LONG_PAGE:
            comparisons = long_intervals(record, values)
        else:
            raise ValueError(f"{path}: no page is known for these values")
        for where, given, again in comparisons:
            count += 1
            if given != again:
                found.append(f"{name}: {where}: {given} in the file, {again} again")
    return count, found


def main() -> None:
    """Print how many intervals were made again, and each that differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    count, found = differing(args.results)
    for line in found:
        print(line)
    print(f"{count} intervals made again, {len(found)} differ")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
