"""Combine small requests into large batches: a queue before a reward that runs in one thread."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from alignment.rewards.errors import check_count, contained_score
from common.types import Score

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import RewardModel


class QueueFullError(RuntimeError):
    """The queue holds as many requests as it may."""


@dataclass(eq=False)
class WaitingRequest:
    """A request in the queue: videos of equal size and rate, and the future for its scores."""

    video_BTYXC: Tensor
    prompts: Sequence[str]
    fps: float
    scores: asyncio.Future[Score]
    arrived: float = field(default_factory=time.monotonic)

    # torch can concatenate videos of equal size only, and a reward takes a single rate.
    @property
    def batch_key(self) -> tuple[object, ...]:
        """Requests with equal keys may be scored together."""
        return (tuple(self.video_BTYXC.shape[1:]), self.fps)


@dataclass
class BatcherStats:
    """Counts for /metrics, and the seconds from arrival to answer of the last thousand requests."""

    requests: int = 0
    videos: int = 0
    batches: int = 0
    failed: int = 0
    failed_videos: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=1000))

    def quantile(self, q: float) -> float:
        """Return a quantile of the seconds; NaN before the first request."""
        # The nearest rank is exact enough for a monitor.
        seconds = sorted(self.seconds)
        if not seconds:
            return math.nan
        return seconds[min(len(seconds) - 1, int(q * len(seconds)))]


class Batcher:
    """Scores requests in the order of arrival, up to ``max_videos`` within ``wait_s`` together.

    If a batch of several requests fails, each request is scored alone, so that only the bad
    request fails. Requests whose client has gone are not scored.
    """

    def __init__(
        self,
        reward: RewardModel,
        *,
        executor: Executor,
        max_videos: int,
        max_waiting: int,
        wait_s: float,
    ) -> None:
        self.reward = reward
        self.executor = executor
        self.max_videos = max_videos
        self.wait_s = wait_s
        self.queue: asyncio.Queue[WaitingRequest] = asyncio.Queue(max_waiting)
        # A request that left the queue but did not fit into the batch.
        self.postponed: WaitingRequest | None = None
        self.stats = BatcherStats()

    async def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        """Queue a request and wait for its scores.

        Raises QueueFullError immediately when too many requests wait, else the reward's error.
        """
        # The future gets its result in `run`.
        future = asyncio.get_running_loop().create_future()
        request = WaitingRequest(video_BTYXC, prompts, fps, future)
        try:
            self.queue.put_nowait(request)
        except asyncio.QueueFull as error:
            raise QueueFullError(
                f"{self.queue.maxsize} requests are waiting"
            ) from error
        return await future

    async def run(self) -> None:
        """Score batch after batch, until cancelled."""
        while True:
            await self._answer(await self._next_batch())

    async def _next_batch(self) -> list[WaitingRequest]:
        # The first request waits for others, but no longer than wait_s.
        first = self.postponed or await self.queue.get()
        self.postponed = None
        batch = [first]
        count = len(first.prompts)
        deadline = time.monotonic() + self.wait_s
        while count < self.max_videos:
            remaining = max(0.0, deadline - time.monotonic())
            try:
                request = await asyncio.wait_for(self.queue.get(), remaining)
            except TimeoutError:
                break
            count += len(request.prompts)
            if request.batch_key != first.batch_key or count > self.max_videos:
                self.postponed = request
                break
            batch.append(request)
        return batch

    async def _answer(self, batch: Sequence[WaitingRequest]) -> None:
        # A cancelled future belongs to a client that has gone.
        batch = [request for request in batch if not request.scores.cancelled()]
        if not batch:
            return

        # Score in the executor's thread, so that requests are still received.
        self.stats.batches += 1
        loop = asyncio.get_running_loop()
        (outcome,) = await asyncio.gather(
            loop.run_in_executor(self.executor, self._score, batch),
            return_exceptions=True,
        )

        # Find the request that is bad.
        if isinstance(outcome, Exception) and len(batch) > 1:
            for request in batch:
                await self._answer([request])
            return

        # Each request gets its part of the scores; an error is everybody's.
        start = 0
        for request in batch:
            end = start + len(request.prompts)
            self.stats.requests += 1
            self.stats.videos += len(request.prompts)
            self.stats.seconds.append(time.monotonic() - request.arrived)
            if request.scores.cancelled():
                pass
            elif isinstance(outcome, BaseException):
                self.stats.failed += 1
                request.scores.set_exception(outcome)
            else:
                request.scores.set_result(outcome.take(range(start, end)))
            start = end

    def _score(self, batch: Sequence[WaitingRequest]) -> Score:
        # All requests of a batch have the same size and rate.
        video_BTYXC = torch.cat([request.video_BTYXC for request in batch])
        prompts: list[str] = []
        for request in batch:
            prompts += request.prompts
        try:
            with torch.no_grad():
                score = contained_score(
                    self.reward, video_BTYXC, prompts, fps=batch[0].fps
                )
        except KeyboardInterrupt as error:
            # in this thread it is the reward's; the user's goes to the main thread
            raise RuntimeError("the reward raised KeyboardInterrupt") from error
        check_count("score", len(score.value_B), len(prompts))
        return score
