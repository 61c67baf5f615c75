"""When the frames of a film appear, from the timestamps of its file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Frames a second of a file that has neither timestamps nor a rate.
_DEFAULT_RATE = 25.0


@dataclass(frozen=True)
class Timeline:
    """When each shown frame appears, in seconds after the first.

    fps       frames / duration
    duration  from the first frame to the end of the last
    starts    a time per frame; None where frame i appears at i / fps
    slack     by how much the file rounds a time
    """

    count: int
    fps: float
    duration: float
    starts: tuple[float, ...] | None = None
    slack: float = 1e-6

    def place_at(self, second: float) -> int:
        """The number of the frame on the screen at a time."""
        if self.starts is None:
            place = int((second + self.slack) * self.fps)
        else:
            place = bisect_right(self.starts, second + self.slack) - 1
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

    ticks     their timestamps, in the file's unit of ``tick`` seconds
    last      for how many ticks the last frame is shown; 0 if the file does not tell
    claims    rates that the file and its codec claim
    """
    # Without timestamps frames follow each other, at the rate of the codec.
    count = len(ticks)
    rates = [rate for rate in claims if rate > 0]
    times = [value * tick for value in ticks if value is not None]
    steps = [after - before for before, after in pairwise(times)]
    if len(times) < count or min(steps, default=1) <= 0:
        rate = (rates or [_DEFAULT_RATE])[-1]
        return Timeline(count, rate, count / rate)

    # A claim that agrees with every timestamp, up to their rounding, is exact.
    starts = tuple(time - times[0] for time in times)
    for rate in rates:
        if _is_constant(starts, rate, min(1.5 * tick, 0.25 / rate)):
            return Timeline(count, rate, count / rate)

    # Otherwise the mean rate. Many files store a length of the last frame that means nothing: it
    # stays at least as long as the frame before it.
    before = steps[-1] if steps else 1 / _DEFAULT_RATE
    duration = starts[-1] + max(last * tick, before)
    mean = count / duration
    # A camera that is late by milliseconds still meant a constant rate.
    if _is_constant(starts, mean, 0.25 / mean):
        return Timeline(count, mean, duration)
    return Timeline(count, mean, duration, starts, slack=min(tick, 1e-3) + 1e-6)


def _is_constant(starts: Sequence[float], rate: float, error: float) -> bool:
    return all(abs(start - i / rate) <= error for i, start in enumerate(starts))
