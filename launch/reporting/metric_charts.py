"""Draw the metrics of a training run that launch/templates/charts.yaml names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import safe_yaml
from launch.reporting import data
from launch.reporting.charts import COLORS, Chart, Series, line_chart

# The charts are described in this file.
FILE = Path(__file__).parents[1] / "templates" / "charts.yaml"


def metric_charts(kind: str, folder: Path | None) -> list[Chart]:
    """Draw the metrics of a training run; those of an evaluation are none."""
    rows = data.metrics(folder)
    metrics = _names_in(rows)
    drawn = []
    for spec, reward, title in _wanted(kind, metrics, [folder]):
        curves = []
        for metric, name in _curves_of(spec, reward, metrics).items():
            if metric in metrics:
                curves.append(_series(name, rows, metric, len(curves)))
        drawn.append(_draw(spec, title, curves))
    return [chart for chart in drawn if chart is not None]


def overlaid_charts(kind: str, folders: Mapping[str, Path | None]) -> list[Chart]:
    """Draw each metric of training runs of a kind, the runs over each other.

    ``folders`` are the runs by the names in the legend; None keeps the colour of a run that has no
    curve.
    """
    tables = {name: data.metrics(folder) for name, folder in folders.items()}
    metrics = _names_in([row for rows in tables.values() for row in rows])
    drawn = []
    present = [folder for folder in folders.values() if folder is not None]
    for spec, reward, title in _wanted(kind, metrics, present):
        names = _curves_of(spec, reward, metrics)
        for metric, label in names.items():
            if metric not in metrics:
                continue
            curves = [
                _series(name, rows, metric, i)
                for i, (name, rows) in enumerate(tables.items())
            ]
            # A chart of several metrics becomes a chart of each.
            own = f"{title}: {label}" if len(names) > 1 else title
            chart = _draw(spec, own, curves)
            # A run alone in a chart is named too.
            if chart is not None:
                legend = [curve for curve in curves if curve.y]
                drawn.append(replace(chart, legend=legend))
    return drawn


def _names_in(rows: Sequence[Mapping[str, float]]) -> list[str]:
    return sorted({name for row in rows for name in row})


def _wanted(
    kind: str,
    metrics: Sequence[str],
    folders: Sequence[Path | None],
) -> list[tuple[Mapping[str, Any], str, str]]:
    """List the charts of a kind of run: description, reward ("" for none), and title."""
    charts = safe_yaml.parse(FILE.read_text(encoding="utf-8")).value
    rewards = [
        name.removeprefix("reward/") for name in metrics if name.startswith("reward/")
    ]
    wanted = []
    # Every reward of GRPO logs its mean, and its spread with _std after its name.
    if kind == "grpo":
        for name in rewards:
            if f"reward/{name}_std" not in metrics:
                continue
            # A reward of weight 0 is measured and not trained on.
            weights = {data.weight_of(folder, name) for folder in folders}
            weight = weights.pop() if len(weights) == 1 else None
            title = name
            if weight is not None:
                role = f"trained, weight {weight:g}" if weight else "watched only"
                title = f"{name} ({role})"
            specs = charts["reward"]
            if weight != 0:
                specs = specs + charts["spread"]
            wanted += [(spec, name, title) for spec in specs]
    # What every run of the kind has.
    wanted += [(spec, "", "") for spec in charts.get(kind, ())]
    if kind == "dual_rl":
        wanted += [(spec, name, name) for name in rewards for spec in charts["cot"]]
    return [
        (spec, name, spec["title"].replace("{}", title)) for spec, name, title in wanted
    ]


def _curves_of(
    spec: Mapping[str, Any], reward: str, metrics: Sequence[str]
) -> dict[str, str]:
    """Metrics of a chart and their names in the legend."""
    names = {}
    for pattern, label in spec["curves"].items():
        metric = pattern.replace("{}", reward)
        start = metric.removesuffix("*")
        if start == metric:
            names[metric] = label
            continue
        for name in metrics:
            if name.startswith(start):
                names[name] = label + name.removeprefix(start)
    return names


def _series(
    name: str,
    rows: Sequence[Mapping[str, float]],
    metric: str,
    place: int,
) -> Series:
    """Values of a metric over the logged steps that have it."""
    having = [row for row in rows if metric in row]
    return Series(
        name,
        [row[metric] for row in having],
        [row["step"] for row in having],
        COLORS[place % len(COLORS)],
    )


def _draw(
    spec: Mapping[str, Any], title: str, curves: Sequence[Series]
) -> Chart | None:
    """Draw the curves that have values; None without any."""
    curves = [curve for curve in curves if curve.y]
    # Charts of failures that did not happen.
    if spec.get("unless_zero") and not any(y > 0 for curve in curves for y in curve.y):
        return None
    return line_chart(
        title,
        curves,
        note=spec.get("description", ""),
        log=spec.get("log", False),
    )
