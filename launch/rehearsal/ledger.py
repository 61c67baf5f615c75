"""What a rehearsal counts, by phase: seconds, kernels, waits, traffic, guesses, peak of memory."""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Files of the project whose lines are not reported: they play the device.
_STAGE = f"{ROOT}/launch/rehearsal/"
_OURS = tuple(
    f"{ROOT}/{room}/"
    for room in ("common", "rm", "generator", "engine", "alignment", "launch", "toy")
)
# Before the first phase that the command enters.
LOADING = "loading"
# It happens once in an update, however many parts the update has.
OPTIMIZER_STEP = "optimizer step"


@dataclass
class Costs:
    """Counts of a phase, or of a call.

    seconds    Roofline seconds by kind of kernel.
    kernels    Kernels by name.
    waits      How often Python waits for the device, by line.
    h2d, d2h   Bytes from host to device and back, by line.
    casts      Bytes that changes of the dtype move.
    guesses    Values that nobody computed and that Python read, by line.
    flops      Of products, attentions and convolutions; a multiply-add is two.
    peak       Bytes of tensors alive on the device, at most.
    captured   Kernels that a graph starts, so that Python does not.
    """

    seconds: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    h2d: Counter[str] = field(default_factory=Counter)
    d2h: Counter[str] = field(default_factory=Counter)
    casts: Counter[str] = field(default_factory=Counter)
    guesses: Counter[str] = field(default_factory=Counter)
    flops: float = 0.0
    peak: int = 0
    captured: float = 0.0

    def add(self, other: Costs, times: float = 1.0) -> None:
        """Add another's counts, ``times`` as often; of the peaks the larger stays."""
        for entry in fields(self):
            mine = getattr(self, entry.name)
            theirs = getattr(other, entry.name)
            if isinstance(mine, Counter):
                for key, value in theirs.items():
                    mine[key] += value * times
        self.flops += other.flops * times
        self.captured += other.captured * times
        self.peak = max(self.peak, other.peak)

    @property
    def device_seconds(self) -> float:
        """Seconds that the device computes, SUM over kernels."""
        return sum(self.seconds.values())

    @property
    def num_kernels(self) -> float:
        """Number of kernels, SUM over names."""
        return sum(self.kernels.values())

    def total_seconds(self, host: float) -> float:
        """Seconds of the phase: those of the device, or of Python at ``host`` a kernel."""
        started = self.num_kernels - self.captured
        return max(self.device_seconds, started * host)


class Ledger:
    """The costs of every phase, in their order, and of calls that are being recorded.

    live  Bytes of tensors alive on the device now.
    """

    def __init__(self) -> None:
        self.phases: dict[str, Costs] = {}
        self.live = 0
        self.phase = ""
        # What was alive whenever a phase began.
        self.entered: dict[str, list[int]] = {}
        # Recordings of calls, the innermost last.
        self._recording: list[Costs] = []
        self.enter(LOADING)

    def enter(self, phase: str) -> None:
        """Begin a phase, or go on with it."""
        self.phase = phase or "step"
        self.phases.setdefault(self.phase, Costs())
        self.entered.setdefault(self.phase, []).append(self.live)
        self._note_peak()

    @property
    def now(self) -> Costs:
        """The costs that counts go to."""
        if self._recording:
            return self._recording[-1]
        return self.phases[self.phase]

    def allocated(self, size: int) -> None:
        """Count bytes that are alive from now on."""
        self.live += size
        self._note_peak()

    def freed(self, size: int) -> None:
        """Count bytes that are no longer alive."""
        self.live -= size

    def _note_peak(self) -> None:
        costs = self.phases[self.phase]
        costs.peak = max(costs.peak, self.live)
        for recording in self._recording:
            recording.peak = max(recording.peak, self.live)

    @contextmanager
    def record(self) -> Iterator[Costs]:
        """Count what happens inside by itself, and into what is counted outside."""
        costs = Costs(peak=self.live)
        self._recording.append(costs)
        try:
            yield costs
        finally:
            self._recording.pop()
            self.now.add(costs)

    def repeat(self, costs: Costs, above: int) -> None:
        """Count a call again whose peak was ``above`` bytes over what was alive before it."""
        now = self.now
        now.add(costs)
        self.allocated(above)
        self.freed(above)


def place() -> str:
    """Return file:line of the innermost line of the project that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS) and not file.startswith(_STAGE):
            return f"{file[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "(no line of the project)"


def describe(failure: BaseException) -> str:
    """Return file:line of the project and the message of an exception's first cause."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    where = ""
    trace = failure.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith(_OURS) and not file.startswith(_STAGE):
            where = f"{file[len(str(ROOT)) + 1 :]}:{trace.tb_lineno}"
        trace = trace.tb_next
    message = str(failure).partition("\n")[0]
    return f"{where}: {type(failure).__name__}: {message}"


def source_line(where: str) -> str:
    """Return the text of a `place`, "" if there is none."""
    file, _, number = where.rpartition(":")
    if not number.isdigit():
        return ""
    return linecache.getline(str(ROOT / file), int(number)).strip()


def rounded(counter: Counter[str], number: int | None = None) -> dict[str, Any]:
    """Return the largest entries of a counter as JSON, integers without a fraction."""
    entries = {}
    for key, value in counter.most_common(number):
        entries[key] = int(value) if float(value).is_integer() else round(value, 6)
    return entries
