"""Draw the metrics of a training run that launch/templates/charts.yaml names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    metrics = sorted({name for row in rows for name in row})
    rewards = [
        name.removeprefix("reward/") for name in metrics if name.startswith("reward/")
    ]
    # What to draw: a chart, and for some the reward and its title.
    charts = safe_yaml.parse(FILE.read_text(encoding="utf-8")).value
    wanted = []

    # Every reward of GRPO logs its mean, and its spread with _std after its name.
    if kind == "grpo":
        for name in rewards:
            if f"reward/{name}_std" not in metrics:
                continue
            # A reward of weight 0 is measured and not trained on.
            weight = data.weight_of(folder, name)
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
    drawn = [_draw(rows, metrics, *item) for item in wanted]
    return [chart for chart in drawn if chart is not None]


def _draw(
    rows: Sequence[Mapping[str, float]],
    metrics: Sequence[str],
    spec: Mapping[str, Any],
    reward: str,
    title: str,
) -> Chart | None:
    """Draw a chart of a ``reward``, if it is that of a reward; None without values."""
    # Metrics and their names in the legend.
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

    # The values of every curve, over the logged steps that have them.
    curves: list[Series] = []
    for metric, name in names.items():
        points = [(row["step"], row[metric]) for row in rows if metric in row]
        if points:
            x, y = zip(*points, strict=True)
            color = COLORS[len(curves) % len(COLORS)]
            curves.append(Series(name, y, x, color))
    # Charts of failures that did not happen.
    if spec.get("unless_zero") and not any(y > 0 for curve in curves for y in curve.y):
        return None
    return line_chart(
        spec["title"].replace("{}", title),
        curves,
        note=spec.get("description", ""),
        log=spec.get("log", False),
    )
