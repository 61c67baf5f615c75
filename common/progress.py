"""Where a training step is: its phase, how far that has come, and when it last moved.

The loops and what they call report here; the watchdog and the progress bar read it. There is a
single step in a process, so this is a module and not an argument of every function::

    progress.enter("rollout")      a phase begins, or goes on
    progress.tick()                a forward, a backward, a batch or a token is done

Ticks of a step are compared with those of the step before. Imports no torch.
"""

from __future__ import annotations

import threading
import time
from collections import Counter

_lock = threading.Lock()


class _Step:
    """Phases of the running step, and what the step before has taken."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.total = 0
        self.phase = ""
        self.ticks: Counter[str] = Counter()
        self.began = time.monotonic()
        self.moved = float("-inf")
        self.earlier_ticks: Counter[str] = Counter()
        self.expected_s: float | None = None


_step = _Step()


def expect(seconds: float) -> None:
    """Tell how long a step will take by a plan, until one has been measured."""
    _step.expected_s = seconds


def begin_step(number: int, total: int) -> None:
    """Begin step ``number``, counted from 0, of ``total``."""
    with _lock:
        now = time.monotonic()
        # The step before is the measure of this one.
        if _step.number is not None:
            _step.expected_s = now - _step.began
            _step.earlier_ticks = _step.ticks
        _step.number = number
        _step.total = total
        _step.phase = ""
        _step.ticks = Counter()
        _step.began = now
        _step.moved = now


def enter(phase: str) -> None:
    """Begin a phase of the step, or go on with it."""
    _step.phase = phase
    _step.moved = time.monotonic()


def tick() -> None:
    """Report that a part of the phase is done."""
    with _lock:
        _step.ticks[_step.phase] += 1
        _step.moved = time.monotonic()


def last_moved() -> float:
    """Return the time of the last report, of `time.monotonic`."""
    return _step.moved


def describe() -> str:
    """Describe where the step is: "step 4/100, rollout 12 of 40, 3:20 of about 9:00"."""
    with _lock:
        if _step.number is None:
            return ""
        parts = [f"step {_step.number + 1}/{_step.total}"]
        if _step.phase:
            parts.append(_phase())
        # A phase may be longer than in the step before.
        seconds = time.monotonic() - _step.began
        passed = clock(seconds)
        if _step.expected_s is not None and seconds <= _step.expected_s:
            passed += f" of about {clock(_step.expected_s)}"
        return ", ".join([*parts, passed])


def _phase() -> str:
    done = _step.ticks[_step.phase]
    before = _step.earlier_ticks[_step.phase]
    if not done:
        return _step.phase
    if done <= before:
        return f"{_step.phase} {done} of {before}"
    return f"{_step.phase} {done}"


def clock(seconds: float) -> str:
    """Format seconds: "3:20", from an hour on "1:03:20"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"
