"""Measure the seconds of each phase of a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common import progress
from common.distributed import mean_over_ranks, sum_over_ranks


class PhaseTimer:
    """Measures wall-clock seconds by phase. A phase that occurs again adds to its seconds."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        progress.enter(phase)
        yield
        # without this a phase would only measure how fast it queued its kernels; only this
        # thread's stream, because rewards may run on another beside it
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        elapsed = time.perf_counter() - start
        self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed

    def metrics(self, *, videos: int) -> dict[str, float]:
        """Return the MEAN seconds over ranks by phase, and videos per second of all ranks.

        ``videos`` is the number of videos on this rank. All ranks must call this.
        """
        seconds = {f"seconds/{phase}": value for phase, value in self.seconds.items()}
        # the step includes what no phase measures
        seconds["seconds/step"] = time.perf_counter() - self.start
        metrics = mean_over_ranks(seconds)
        # ranks work at the same time: their videos add up, their seconds do not
        rate = sum_over_ranks(videos) / metrics["seconds/step"]
        return {**metrics, "videos_per_second": rate}
