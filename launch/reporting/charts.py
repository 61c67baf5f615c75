"""Curves and histograms as SVG that lives inside a page and takes its colours from it, light or dark.

Names of metrics, prompts and whatever else a user wrote stay out of the SVG: legend and caption are the page's.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What matplotlib draws with, and the page's variable that takes its place. No two may be alike.
_INK, _GRID = "#010101", "#020202"
_SERIES = ("#a10000", "#a20000", "#a30000", "#a40000", "#a50000", "#a60000")
_VARIABLES = {_INK: "var(--muted)", _GRID: "var(--grid)"} | {
    c: f"var(--s{i})" for i, c in enumerate(_SERIES)
}
MAX_SERIES = len(_SERIES)
_SMOOTH_FROM = 30  # points; shorter curves are drawn as they are


@dataclass(frozen=True)
class Series:
    """Points of one line, or in ``y`` the values of a histogram. ``color`` is an index of the page's --s0 ... --s5."""

    name: str
    y: Sequence[float]
    x: Sequence[float] = ()
    color: int = 0


@dataclass(frozen=True)
class Chart:
    """``svg`` is safe to put into a page as it is; title, note and the legend's names are not escaped yet."""

    title: str
    svg: str
    legend: tuple[Series, ...]
    note: str = ""


def line_chart(
    title: str, series: Sequence[Series], *, note: str = "", log: bool = False
) -> Chart | None:
    """Curves over the step, NaN left out; None without two points.

    A long curve is drawn faint with its moving average on top; where three or more share a chart, the average alone.
    """
    drawn = [
        judged for one in series if len((judged := _finite(one, positive=log)).y) > 1
    ][:MAX_SERIES]
    if not drawn:
        return None
    figure, axes = _canvas()
    for one in drawn:
        color, points = _SERIES[one.color], len(one.y)
        if points < _SMOOTH_FROM:
            axes.plot(
                one.x,
                one.y,
                color=color,
                linewidth=1.8,
                marker="o" if points <= 12 else None,
                markersize=3,
            )
            continue
        if len(drawn) < 3:
            axes.plot(one.x, one.y, color=color, linewidth=0.8, alpha=0.35)
        axes.plot(
            one.x,
            moving_average(one.y, max(5, points // 15)),
            color=color,
            linewidth=1.8,
        )
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    notes = [note] if note else []
    if len(drawn) == 1:
        notes.append(_ends(drawn[0].y))
    return Chart(
        title, _svg(figure), tuple(drawn) if len(drawn) > 1 else (), "; ".join(notes)
    )


def histogram(title: str, series: Sequence[Series], *, note: str = "") -> Chart | None:
    """Shares of values over common bins; None when there is nothing to count."""
    import numpy as np

    drawn = [judged for one in series if (judged := _finite(one)).y][:MAX_SERIES]
    if not drawn:
        return None
    everything = np.concatenate([np.asarray(one.y, dtype=float) for one in drawn])
    low, high = float(everything.min()), float(everything.max())
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 1 + min(30, max(8, math.isqrt(len(everything)))))
    figure, axes = _canvas()
    for one in drawn:
        counts, _ = np.histogram(one.y, bins=edges)
        axes.stairs(
            counts / len(one.y), edges, fill=True, color=_SERIES[one.color], alpha=0.35
        )
        axes.stairs(counts / len(one.y), edges, color=_SERIES[one.color], linewidth=1.5)
    axes.set_ylabel("share")
    return Chart(title, _svg(figure), tuple(drawn) if len(drawn) > 1 else (), note)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """MEAN of ``window`` values around each, fewer at the ends: mean_i = mean(v[i-a : i+b+1]), a + b + 1 = window."""
    before, after = (window - 1) // 2, window // 2
    means = []
    for i in range(len(values)):
        part = values[max(0, i - before) : i + after + 1]
        means.append(sum(part) / len(part))
    return means


def _ends(values: Sequence[float]) -> str:
    """The mean of the first and of the last tenth, where a curve came from and where it went."""
    tenth = max(1, len(values) // 10)
    first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    return f"{first:.3g} → {last:.3g}"


def _finite(series: Series, *, positive: bool = False) -> Series:
    x = series.x or range(len(series.y))
    kept = [
        (a, b)
        for a, b in zip(x, series.y, strict=True)
        if math.isfinite(b) and (b > 0 or not positive)
    ]
    return replace(series, x=[a for a, _ in kept], y=[b for _, b in kept])


def _canvas() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.3), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=True, axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_INK, length=0, labelsize=8)
    axes.xaxis.label.set(color=_INK, size=8)
    axes.yaxis.label.set(color=_INK, size=8)
    axes.yaxis.get_offset_text().set(color=_INK, size=8)
    axes.locator_params(axis="x", nbins=6)
    axes.locator_params(axis="y", nbins=5)
    return figure, axes


def _svg(figure: Figure) -> str:
    """SVG without prolog, metadata and namespaces, its colours replaced by the page's variables."""
    import matplotlib

    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}),
        io.StringIO() as buffer,
    ):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    text = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL
    )  # its * would style the page
    text = re.sub(r" font-family: [^;]*;", "", text)
    text = re.sub(r"\s*\n\s*", " ", text)
    text = re.sub(
        r'\sid="(?:figure|axes|text|patch|line2d|matplotlib\.axis|xtick|ytick)_\d+"',
        "",
        text,
    )
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text
