"""Many small requests as few large batches: a queue in front of one reward, which runs in one thread."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from common.types import Score

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import RewardModel


class QueueFullError(RuntimeError):
    """As many requests wait as may."""


@dataclass(eq=False)
class Waiting:
    """A request in the queue: videos of one size and rate, and where its answer goes."""

    video_BTYXC: Tensor
    prompts: Sequence[str]
    fps: float
    answer: asyncio.Future[Score]
    since: float = field(default_factory=time.monotonic)

    @property
    def kind(self) -> tuple[object, ...]:
        """What must agree for two requests to be scored together."""
        return (tuple(self.video_BTYXC.shape[1:]), self.fps)


@dataclass
class Figures:
    """What /metrics tells; ``seconds`` from arrival to answer, the last thousand."""

    requests: int = 0
    videos: int = 0
    batches: int = 0
    failed: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=1000))

    def quantile(self, q: float) -> float:
        """Of the seconds; NaN before the first."""
        found = sorted(self.seconds)
        return (
            found[min(len(found) - 1, int(q * len(found)))] if found else float("nan")
        )


class Batcher:
    """Scores what comes, in the order it came: up to ``max_videos`` that arrive within ``wait_s`` go together.

    Where a batch of several requests fails with a ValueError, each is scored alone, so that it costs one of them only.
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
        self.reward, self.executor = reward, executor
        self.max_videos, self.wait_s = max_videos, wait_s
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue(max_waiting)
        self.held: Waiting | None = None  # came out of the queue and did not fit
        self.figures = Figures()

    async def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        """Wait for the answer. Raises QueueFullError at once when too many wait, and what the reward raises."""
        one = Waiting(
            video_BTYXC, prompts, fps, asyncio.get_running_loop().create_future()
        )
        try:
            self.queue.put_nowait(one)
        except asyncio.QueueFull as error:
            raise QueueFullError(
                f"{self.queue.maxsize} requests are waiting"
            ) from error
        return await one.answer

    async def run(self) -> None:
        """For ever."""
        while True:
            batch = await self._next()
            await self._answer(batch)

    async def _next(self) -> list[Waiting]:
        first = self.held or await self.queue.get()
        self.held = None
        batch, count = [first], len(first.prompts)
        end = time.monotonic() + self.wait_s
        while count < self.max_videos:
            try:
                one = await asyncio.wait_for(
                    self.queue.get(), max(0.0, end - time.monotonic())
                )
            except TimeoutError:
                break
            if one.kind != first.kind or count + len(one.prompts) > self.max_videos:
                self.held = one
                break
            batch.append(one)
            count += len(one.prompts)
        return batch

    async def _answer(self, batch: Sequence[Waiting]) -> None:
        batch = [
            one for one in batch if not one.answer.cancelled()
        ]  # whose client has gone
        if not batch:
            return
        loop = asyncio.get_running_loop()
        self.figures.batches += 1
        outcome = await asyncio.gather(
            loop.run_in_executor(self.executor, self._score, batch),
            return_exceptions=True,
        )
        if isinstance(outcome[0], ValueError) and len(batch) > 1:
            for one in batch:
                await self._answer([one])
            return
        for one, score in zip(batch, _split(outcome[0], batch), strict=True):
            self.figures.requests += 1
            self.figures.videos += len(one.prompts)
            self.figures.seconds.append(time.monotonic() - one.since)
            if one.answer.cancelled():
                continue
            if isinstance(score, BaseException):
                self.figures.failed += 1
                one.answer.set_exception(score)
            else:
                one.answer.set_result(score)

    def _score(self, batch: Sequence[Waiting]) -> Score:
        video_BTYXC = torch.cat([one.video_BTYXC for one in batch])
        prompts = [prompt for one in batch for prompt in one.prompts]
        with torch.no_grad():
            return self.reward.score(video_BTYXC, prompts, fps=batch[0].fps)


def _split(
    outcome: Score | BaseException, batch: Sequence[Waiting]
) -> list[Score | BaseException]:
    """Each request's part of the answer; an exception is everybody's."""
    if isinstance(outcome, BaseException):
        return [outcome] * len(batch)
    ends = list(accumulate(len(one.prompts) for one in batch))
    return [outcome.take(range(start, end)) for start, end in pairwise([0, *ends])]
