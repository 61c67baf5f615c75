"""Charts of the report: positions of points, colours, and series without values."""

from __future__ import annotations

import re

import pytest

from launch.reporting.charts import (
    COLORS,
    Series,
    histogram,
    line_chart,
    moving_average,
)


def test_moving_average_by_hand() -> None:
    assert moving_average([0.0, 3.0, 6.0, 9.0, 3.0], 3) == [1.5, 3.0, 6.0, 6.0, 6.0]
    assert moving_average([1.0, 2.0, 3.0, 4.0], 1) == [1.0, 2.0, 3.0, 4.0]


def test_line_goes_through_its_points() -> None:
    """Equal steps in x and y are equal steps in the drawing; NaN leaves a point out."""
    chart = line_chart("t", [Series("a", [0.0, 1.0, float("nan"), 3.0], [0, 1, 2, 3])])
    path = re.search(
        rf'<path d="(M [^"]*)"[^>]*stroke: {COLORS[0]}; stroke-width: 1.8', chart.svg
    ).group(1)
    points = [
        tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)
    ]
    assert len(points) == 3
    (x0, y0), (x1, y1), (x3, y3) = points
    assert (x3 - x0) / (x1 - x0) == pytest.approx(3.0, rel=1e-3)
    assert (y0 - y3) / (y0 - y1) == pytest.approx(3.0, rel=1e-3)
    # Every other colour is that of the page's text.
    text = chart.svg.replace(COLORS[0], "")
    assert not re.search(r": ?#|\"#[0-9a-f]{6}", text)
    assert "currentColor" in text
    assert chart.note == "0 → 3"


def test_chart_without_values_is_none() -> None:
    assert line_chart("t", [Series("a", [1.0], [0])]) is None
    assert line_chart("t", [Series("a", [float("nan")] * 5, range(5))]) is None
    assert histogram("t", [Series("a", [])]) is None
    assert histogram("t", [Series("a", [2.0, 2.0])]) is not None  # one value many times
