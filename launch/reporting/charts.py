"""Draw curves and histograms as SVG for a page.

Texts of users stay out of the SVG: title, legend and note are written by the page. Axes and labels
take the colour of the page's text, so that they are readable on a light and on a dark background.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from launch.reporting.texts import clean

# Readable on white and on black.
COLORS = (
    "#3b82f6",
    "#e0692f",
    "#1f9d6b",
    "#a460d1",
    "#b98a00",
    "#8a939e",
)
# What others are compared with.
GREY = COLORS[-1]
# matplotlib knows no currentColor; this colour of the style is replaced by it.
_INK = "#010101"
_STYLE = matplotlib.rc_context(
    fname=Path(__file__).parents[1] / "templates" / "charts.mplstyle"
)
# A point of a scatter plot in matplotlib's SVG.
_POINT = re.compile(r"(<use [^>]*?)/>")
# Curves with fewer points are drawn as they are, without a moving average.
_SMOOTH_FROM = 30


@dataclass(frozen=True)
class Series:
    """The points of a curve, or in ``y`` the values of a histogram."""

    name: str
    y: Sequence[float]
    x: Sequence[float] = ()
    color: str = COLORS[0]


@dataclass(frozen=True)
class Chart:
    """A drawing. ``svg`` may enter a page as it is; the other texts have to be escaped.

    ``plot`` is JSON with the curves of the drawing, from which the page's script makes a chart with
    values and zoom; "" for a drawing that stays as it is.
    """

    title: str
    svg: str
    legend: Sequence[Series]
    note: str = ""
    plot: str = ""


@_STYLE
def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    note: str = "",
    log: bool = False,
) -> Chart | None:
    """Draw curves over the step, without NaN; None where no curve has two points.

    A long curve is drawn faint, with its moving average on top. Where three or more curves share a
    chart, only the averages are drawn. The note of a single curve ends with its first and last
    values, each the MEAN over a tenth of the curve.
    """
    # A logarithmic axis has no place for 0.
    finite = [_finite(curve, positive=log) for curve in series]
    drawn = [curve for curve in finite if len(curve.y) > 1][: len(COLORS)]
    if not drawn:
        return None

    # Curves.
    figure = Figure()
    axes = figure.add_subplot()
    plotted = []
    for curve in drawn:
        num_points = len(curve.y)
        # Short curves are drawn as they are.
        line = curve
        if num_points >= _SMOOTH_FROM:
            average = moving_average(curve.y, max(5, num_points // 15))
            name = f"{curve.name}, average" if curve.name else "average"
            line = replace(curve, y=average, name=name)
            if len(drawn) < 3:
                plotted.append(_plotted(curve, faint=True))
                axes.plot(
                    curve.x,
                    curve.y,
                    color=curve.color,
                    linewidth=0.8,
                    alpha=0.35,
                )
        plotted.append(_plotted(line, faint=False))
        axes.plot(
            line.x,
            line.y,
            color=line.color,
            marker="o" if num_points <= 12 else None,
        )
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("step")

    # A single curve needs no legend, but says where it begins and ends.
    if len(drawn) == 1:
        first, last = means_of_ends(drawn[0].y)
        ends = f"{first:.3g} → {last:.3g}"
        note = f"{note}; {ends}" if note else ends
    chart = _chart(title, figure, drawn, note)
    return replace(chart, plot=json.dumps({"log": log, "curves": plotted}))


def _plotted(curve: Series, *, faint: bool) -> dict[str, Any]:
    """Return a curve for the page's script, with six digits of its values."""
    return {
        "name": clean(curve.name) or "value",
        "color": curve.color,
        "faint": faint,
        "x": list(curve.x),
        "y": [float(f"{value:.6g}") for value in curve.y],
    }


@_STYLE
def histogram(
    title: str,
    series: Sequence[Series],
    *,
    note: str = "",
) -> Chart | None:
    """Draw the shares of values over common bins; None without values."""
    drawn = [values for values in map(_finite, series) if values.y]
    if not drawn:
        return None

    # Common bins; equal values get a bin of width 1 around them.
    everything = np.concatenate([np.asarray(values.y, float) for values in drawn])
    low = float(everything.min())
    high = float(everything.max())
    if high - low < 1e-9 * max(1.0, abs(high)):
        low -= 0.5
        high += 0.5
    num_bins = min(30, max(8, math.isqrt(len(everything))))
    edges = np.linspace(low, high, num_bins + 1)

    # Shares, because the series may have different lengths.
    figure = Figure()
    axes = figure.add_subplot()
    for values in drawn:
        counts, _ = np.histogram(values.y, bins=edges)
        shares = counts / len(values.y)
        axes.stairs(
            shares,
            edges,
            fill=True,
            color=values.color,
            alpha=0.35,
        )
        axes.stairs(
            shares,
            edges,
            color=values.color,
        )
    axes.set_ylabel("share")
    return _chart(title, figure, drawn, note)


@_STYLE
def scatter(
    title: str,
    series: Sequence[Series],
    labels: Sequence[Sequence[str]],
    *,
    note: str = "",
) -> Chart | None:
    """Draw points with finite coordinates; None without any.

    ``labels`` are the texts under the pointer, for each point of each series.
    """
    if not any(points.y for points in series):
        return None
    figure = Figure()
    axes = figure.add_subplot()
    for i, points in enumerate(series):
        axes.scatter(
            points.x,
            points.y,
            s=14,
            color=points.color,
            alpha=0.6,
            linewidths=0,
            gid=f"points-{i}",
        )
    axes.grid(visible=True)
    chart = _chart(title, figure, series, note)

    # Every point is an element of its group, in order; a browser shows its title.
    svg = chart.svg
    for i, texts in enumerate(labels):
        head, group, tail = svg.partition(f'<g id="points-{i}">')
        rest = iter(texts)
        titled = _POINT.sub(
            lambda point, rest=rest: f"{point[1]}>{_title(next(rest))}</use>",
            tail,
            count=len(texts),
        )
        svg = head + group + titled
    return replace(chart, svg=svg)


def _title(text: str) -> str:
    return f"<title>{html.escape(clean(text))}</title>"


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; equal values share their MEAN rank. None where it is undefined.

    It is undefined where all values of a side are equal.
    """
    from scipy.stats import spearmanr

    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(spearmanr(x, y).statistic)


def means_of_ends(values: Sequence[float]) -> tuple[float, float]:
    """MEANS over the first and over the last tenth of the values, of one value at least."""
    tenth = max(1, len(values) // 10)
    return fmean(values[:tenth]), fmean(values[-tenth:])


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """MEAN over the ``window`` values around each value, over fewer at the ends."""
    # Values outside count as missing, not as 0.
    ones = np.ones(window)
    sums = np.convolve(values, ones, mode="same")
    counts = np.convolve(np.ones_like(values), ones, mode="same")
    return list(sums / counts)


def _finite(series: Series, *, positive: bool = False) -> Series:
    x = series.x or range(len(series.y))
    points = [
        (step, value)
        for step, value in zip(x, series.y, strict=True)
        if math.isfinite(value)
        if value > 0 or not positive
    ]
    return replace(
        series,
        x=[step for step, _ in points],
        y=[value for _, value in points],
    )


def _chart(title: str, figure: Figure, drawn: Sequence[Series], note: str) -> Chart:
    """Turn a figure into SVG that is a part of an HTML page: no prolog, metadata, namespaces."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    return Chart(title, svg, drawn if len(drawn) > 1 else (), note)
