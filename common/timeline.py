"""When the frames of a film appear, from the timestamps of its file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Frames a second of a file that has neither timestamps nor a rate.
_DEFAULT_RATE = 25.0
# A frame may come this part of a frame too early or too late, and the rate is still constant:
# cameras are late by milliseconds now and then.
_JITTER = 0.25
# Seconds that a frame may be early: its time at a constant rate is exact, but for the arithmetic;
# else files round to a millisecond.
_EXACT_S = 1e-6
_ROUNDED_S = 1.5e-3


@dataclass(frozen=True)
class Timeline:
    """When each shown frame appears, in seconds after the first.

    fps       frames / duration
    duration  from the first frame to the end of the last
    starts    a time per frame; None where frame i appears at i / fps
    """

    count: int
    fps: float
    duration: float
    starts: tuple[float, ...] | None = None

    def place_at(self, second: float) -> int:
        """The number of the frame on the screen at a time."""
        if self.starts is None:
            place = int((second + _EXACT_S) * self.fps)
        else:
            place = bisect_right(self.starts, second + _ROUNDED_S) - 1
        return min(max(place, 0), self.count - 1)

    def place_of(self, index: int) -> int:
        """The number of the shown frame that is frame ``index`` at the mean rate."""
        if self.starts is None:
            return index
        return self.place_at(index / self.fps)


def measure(
    ticks: Sequence[int | None],
    *,
    last: int,
    tick: float,
    claims: Sequence[float],
) -> Timeline:
    """Build the timeline of shown frames, in their order.

    ticks   their timestamps, in the file's unit of ``tick`` seconds
    last    for how many ticks the last frame is shown; 0 if the file does not tell
    claims  rates that the file and its codec claim, 0 where they do not
    """
    # Without timestamps frames follow each other, at the rate of the codec.
    count = len(ticks)
    rates = [rate for rate in claims if rate > 0]
    if not _advance(ticks):
        rate = rates[-1] if rates else _DEFAULT_RATE
        return Timeline(count, rate, count / rate)

    # A claim that agrees with every timestamp, up to their rounding, is exact.
    starts = tuple((value - ticks[0]) * tick for value in ticks)
    last_s = last * tick
    for rate in rates:
        rounding = min(1.5 * tick, _JITTER / rate)
        if _is_constant(starts, last_s, rate, rounding):
            return Timeline(count, rate, count / rate)

    # Otherwise the mean rate. Many files store a length of the last frame that means nothing: it
    # stays at least as long as the frame before it.
    before_s = 1 / _DEFAULT_RATE
    if count > 1:
        before_s = starts[-1] - starts[-2]
    duration = starts[-1] + max(last_s, before_s)
    mean = count / duration
    if _is_constant(starts, last_s, mean, _JITTER / mean):
        return Timeline(count, mean, duration)
    return Timeline(count, mean, duration, starts)


def _advance(ticks: Sequence[int | None]) -> bool:
    """True if there are timestamps that go forward."""
    if None in ticks:
        return False
    goes_back = any(before > after for before, after in pairwise(ticks))
    stands_still = len(ticks) > 1 and ticks[0] == ticks[-1]
    return not goes_back and not stands_still


def _is_constant(
    starts: Sequence[float], last: float, rate: float, error: float
) -> bool:
    """True if frame i starts at i / rate, and the last does not stay."""
    for i, start in enumerate(starts):
        if abs(start - i / rate) > error:
            return False
    return last <= 1.5 / rate
