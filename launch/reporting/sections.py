"""Select what a report shows beside its videos: distributions, further runs and files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.reporting import data
from launch.reporting.charts import COLORS, GREY, Chart, Series, histogram
from launch.reporting.data import EVALUATIONS, KINDS, Row, Runs
from launch.reporting.films import Steps
from launch.reporting.metric_charts import metric_charts

# ------------------------------------------------------------------ distributions


def distributions(runs: Runs, sampled: Steps) -> list[Chart]:
    """Draw rewards of base and tuned videos, advantages of rollouts, and margins by label."""
    # Rewards.
    base = data.results(runs.shown.get("base"))
    tuned = data.results(runs.shown.get("tuned"))
    charts = []
    names = {name: None for row in base + tuned for name in row["rewards"]}
    for name in names:
        before = [data.value_of(row, name) for row in base]
        after = [data.value_of(row, name) for row in tuned]
        series = [
            Series("base", before, color=GREY),
            Series("tuned", after),
        ]
        title = f"Reward of {name}"
        charts.append(histogram(title, series, note="over the held-out prompts"))

    # Advantages.
    advantages = []
    for rows in sampled.values():
        advantages += [row.get("advantage") or 0.0 for row in rows]
    note = f"{len(advantages)} sampled rollouts"
    charts.append(histogram("Advantages", [Series("", advantages)], note=note))

    # Margins.
    pairs = data.scored_pairs(runs.shown.get("rm"))
    series = []
    for label, name in data.PAIR_LABELS.items():
        margins = [data.margin(row) for row in pairs if row["label"] == label]
        color = COLORS[len(series)]
        series.append(Series(name, margins, color=color))
    title = "Margin by label: reward A − reward B"
    charts.append(histogram(title, series, note="held-out pairs"))
    return [chart for chart in charts if chart is not None]


# ------------------------------------------------------------------ further runs and files


def further_runs(
    runs: Runs, names: Mapping[Path, str]
) -> list[tuple[str, str, Sequence[Chart], Row]]:
    """Kind, name, charts of a training run and means of an evaluation, of `Runs.more`."""
    further = []
    for kind, folder in runs.more:
        # A training run has curves, an evaluation has means.
        charts = metric_charts(kind, folder)
        means = data.intervals(folder)
        further.append((kind, names[folder], charts, means))
    return further


def environments(runs: Runs, names: Mapping[Path, str]) -> list[tuple[str, str]]:
    """Return name and content of every environment.json, so that the runs can be repeated."""
    files = []
    for _, folder in runs.all():
        text = data.text_of(folder, "environment.json")
        if text is not None:
            name = f"{names[folder]}/environment.json"
            files.append((name, text))
    return files


def missing(runs: Runs, names: Mapping[Path, str]) -> list[str]:
    """Say what the report would show if it had more runs."""
    shown = runs.shown
    notes = [
        f"no run of the kind {kind}: {text}"
        for kind, text in KINDS.items()
        if kind not in shown
    ]
    # Evaluations that cannot be compared, or have not finished.
    if "base" in shown and "tuned" in shown:
        base = data.results(shown["base"])
        tuned = data.results(shown["tuned"])
        before = data.by_video(base)
        after = data.by_video(tuned)
        if before.keys().isdisjoint(after):
            notes.append(
                "base and tuned share no prompt and seed, so their videos are not compared"
            )
    for kind, folder in runs.all():
        if kind in EVALUATIONS and not data.summary(folder):
            notes.append(
                f"the evaluation {names[folder]} has no summary.json: it has not finished"
            )
    return notes


# ------------------------------------------------------------------ filters of the template


def number(value: float | None, digits: int = 4) -> str:
    """Format with four significant digits; a dash for what is missing."""
    if value is None or not math.isfinite(value):
        return "–"
    # Large numbers would be printed without their last digits.
    if abs(value) >= 1e4:
        return f"{value:.3e}"
    return f"{value:.{digits}g}"
