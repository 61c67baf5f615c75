"""Show the sampled rollouts of a GRPO run: as a table, and trained against watched rewards."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.reporting import data
from launch.reporting.charts import (
    COLORS,
    GREY,
    Chart,
    Series,
    means_of_ends,
    rank_correlation,
    scatter,
)
from launch.reporting.data import Row
from launch.reporting.films import Steps

# Rollouts in the table, the last ones of a run.
ROWS_SHOWN = 400


@dataclass(frozen=True)
class RolloutTable:
    """Rollouts by step, group and member.

    rewards  Names of the columns of rewards.
    rows     Rows of samples.jsonl.
    total    How many there are, with those that are not shown.
    """

    rewards: Sequence[str]
    rows: Sequence[Row]
    total: int


@dataclass(frozen=True)
class PartTable:
    """MEANS of the parts of rewards over the first and over the last tenth of the steps.

    rewards  Names of the columns, such as reward/descore and eval/descore.
    rows     A part, and for every reward (before, after), or None where it has no such part.
    """

    rewards: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[float, float] | None]]]


def rollout_table(steps: Steps) -> RolloutTable:
    """List the sampled rollouts of a run, at most `ROWS_SHOWN`."""
    rows = _rollouts(steps)
    shown = rows[-ROWS_SHOWN:]
    rewards = {name: None for row in shown for name in row.get("rewards", {})}
    return RolloutTable(list(rewards), shown, len(rows))


def part_table(folder: Path | None) -> PartTable:
    """Compare the parts of rewards at the start and at the end of a run."""
    changes: dict[tuple[str, str], tuple[float, float]] = {}
    for name, values in data.columns(data.metrics(folder)).items():
        reward, _, part = name.partition(".")
        # A value alone has no change.
        if not part or not reward.startswith(("reward/", "eval/")) or len(values) < 2:
            continue
        changes[reward, part] = means_of_ends(values)

    # Parts of several rewards stand in one row.
    rewards = list({reward: None for reward, _ in changes})
    parts = sorted({part for _, part in changes})
    rows = []
    for part in parts:
        rows.append((part, [changes.get((reward, part)) for reward in rewards]))
    return PartTable(rewards, rows)


def judged_charts(
    grpo: Path | None,
    evaluations: Mapping[str, Path],
    sampled: Steps,
) -> list[Chart]:
    """Draw each trained reward of a run against each that it only watches.

    A policy that exploits its reward model moves to the right without moving up. The points are the
    sampled rollouts, and the videos of ``evaluations`` by their labels.
    """
    # Rollouts by when they were sampled.
    rows = _rollouts(sampled)
    steps = sorted({row["step"] for row in rows})
    groups = {}
    if steps:
        middle = steps[len(steps) // 2]
        groups["Rollouts"] = {
            f"before step {middle}": [row for row in rows if row["step"] < middle],
            "after": [row for row in rows if row["step"] >= middle],
        }
    # Videos of the same held-out prompts.
    scored = {label: data.results(folder) for label, folder in evaluations.items()}
    if scored:
        groups["Held-out prompts"] = scored

    # A run that does not say its weights has no judge.
    names = {name: None for row in rows for name in row.get("rewards", {})}
    weights = {name: data.weight_of(grpo, name) for name in names}
    trained = [name for name, weight in weights.items() if weight]
    judges = [name for name, weight in weights.items() if weight == 0.0]
    charts = []
    for pair in itertools.product(trained, judges):
        for title, series in groups.items():
            charts.append(_judged(title, series, *pair))
    return [chart for chart in charts if chart is not None]


def _rollouts(steps: Steps) -> list[Row]:
    return [row for step in sorted(steps) for row in steps[step]]


def _judged(
    title: str,
    groups: Mapping[str, Sequence[Row]],
    trained: str,
    judge: str,
) -> Chart | None:
    series = []
    labels = []
    for name, rows in groups.items():
        # Videos with both scores.
        xs = []
        ys = []
        texts = []
        for row in rows:
            x = row["rewards"].get(trained)
            y = row["rewards"].get(judge)
            if x is None or y is None:
                continue
            xs.append(x)
            ys.append(y)
            texts.append(f"{_origin(row)}\n{trained} {x:.4g}, {judge} {y:.4g}")
        color = COLORS[0] if series else GREY
        series.append(
            Series(
                name,
                ys,
                xs,
                color,
            )
        )
        labels.append(texts)

    # The order is what counts: rewards have scales of their own.
    every_x = [x for points in series for x in points.x]
    every_y = [y for points in series for y in points.y]
    note = f"to the right {trained} (trained), upwards {judge} (watched only)"
    correlation = rank_correlation(every_x, every_y)
    if correlation is not None:
        note += f"; rank correlation {correlation:.2f} of {len(every_x)} videos"
    return scatter(
        f"{title}: {trained} and {judge}",
        series,
        labels,
        note=note,
    )


def _origin(row: Row) -> str:
    if "step" not in row:
        return f"prompt {row.get('index', '')}"
    return f"step {row['step']}, member {row.get('member')}"
