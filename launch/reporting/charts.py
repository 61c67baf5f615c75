"""Draw curves and histograms as SVG for a page.

Texts of users stay out of the SVG: title, legend and note are written by the page. Axes and labels
take the colour of the page's text, so that they are readable on a light and on a dark background.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# Readable on white and on black.
COLORS = (
    "#3b82f6",
    "#e0692f",
    "#1f9d6b",
    "#a460d1",
    "#b98a00",
    "#8a939e",
)
# matplotlib knows no currentColor; this colour of the style is replaced by it.
_INK = "#010101"
_STYLE = matplotlib.rc_context(
    fname=Path(__file__).parents[1] / "templates" / "charts.mplstyle"
)
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
    """A drawing. ``svg`` may enter a page as it is; the other texts have to be escaped."""

    title: str
    svg: str
    legend: Sequence[Series]
    note: str = ""


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
    for curve in drawn:
        num_points = len(curve.y)
        # Short curves are drawn as they are.
        y = curve.y
        if num_points >= _SMOOTH_FROM:
            y = moving_average(curve.y, max(5, num_points // 15))
            if len(drawn) < 3:
                axes.plot(
                    curve.x,
                    curve.y,
                    color=curve.color,
                    linewidth=0.8,
                    alpha=0.35,
                )
        axes.plot(
            curve.x,
            y,
            color=curve.color,
            marker="o" if num_points <= 12 else None,
        )
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("step")

    # A single curve needs no legend, but says where it begins and ends.
    if len(drawn) == 1:
        y = drawn[0].y
        tenth = max(1, len(y) // 10)
        first = sum(y[:tenth]) / tenth
        last = sum(y[-tenth:]) / tenth
        ends = f"{first:.3g} → {last:.3g}"
        note = f"{note}; {ends}" if note else ends
    return _chart(title, figure, drawn, note)


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
