"""Score the videos of a step with every reward, after the rollout or in a thread beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from common import faults
from common.distributed import raise_on_all
from common.types import RewardUnavailableError, Score

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from torch import Tensor

    from alignment.rewards.errors import NamedReward
    from alignment.timing import PhaseTimer


def score_videos(
    reward: NamedReward,
    video_BTYXC: Tensor,
    prompts: Sequence[str],
    *,
    fps: float,
    group_size: int,
) -> Score:
    """Score all videos in one call, or in one call per group for a ``group_level`` reward."""
    faults.point("reward")
    # most rewards take any videos together
    if not reward.group_level:
        return reward.score(video_BTYXC, prompts, fps=fps)
    scores = []
    for start in range(0, len(prompts), group_size):
        group = slice(start, start + group_size)
        scores.append(reward.score(video_BTYXC[group], prompts[group], fps=fps))
    return Score.concat(scores)


class Scorer:
    """Scores the videos of one step after the rollout.

    Use it as a context manager: `start` every group, then take the `scores` of all.
    """

    def __init__(
        self,
        rewards: Mapping[str, NamedReward],
        *,
        fps: float,
        group_size: int,
        timer: PhaseTimer,
    ) -> None:
        self.rewards = rewards
        self.fps = fps
        self.group_size = group_size
        self.timer = timer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release nothing: the subclass with a thread does."""

    def start(self, video_GTYXC: Tensor, prompts: Sequence[str]) -> None:
        """Announce a sampled group. This class does nothing before `scores`."""

    def scores(self, video_BTYXC: Tensor, prompts: Sequence[str]) -> dict[str, Score]:
        """Return the scores of all videos of the step by reward. All ranks must call this.

        Raises RewardUnavailableError on every rank when a reward raised an error on any rank.
        """
        # every rank must learn of an error on any rank, or the others would wait for it
        problem = None
        try:
            scores = self._score_all(video_BTYXC, prompts)
        except RewardUnavailableError as error:
            problem = error
        raise_on_all(problem)
        return scores

    def _score_all(
        self, video_BTYXC: Tensor, prompts: Sequence[str]
    ) -> dict[str, Score]:
        scores = {}
        for name, reward in self.rewards.items():
            with self.timer(f"score/{name}"):
                scores[name] = self._score(reward, video_BTYXC, prompts)
        return scores

    def _score(
        self, reward: NamedReward, video_BTYXC: Tensor, prompts: Sequence[str]
    ) -> Score:
        return score_videos(
            reward, video_BTYXC, prompts, fps=self.fps, group_size=self.group_size
        )


class OverlappedScorer(Scorer):
    """Scores each group in a thread, while the caller samples the next group.

    A reward sees the videos of one group at a time.
    """

    def __enter__(self) -> Self:
        # a single thread: rewards are called in the order of the groups
        self.thread = ThreadPoolExecutor(1)
        self.pending: list[Future[dict[str, Score]]] = []
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # wait for what is being scored, also after an error
        self.thread.shutdown()

    def start(self, video_GTYXC: Tensor, prompts: Sequence[str]) -> None:
        """Start to score the videos (G, T, Y, X, 3) of a sampled group."""
        self.pending.append(self.thread.submit(self._score_group, video_GTYXC, prompts))

    def _score_all(
        self, video_BTYXC: Tensor, prompts: Sequence[str]
    ) -> dict[str, Score]:
        with self.timer("score/wait"):
            # an error inside the thread is raised here
            parts = [future.result() for future in self.pending]
        scores = {}
        for name in self.rewards:
            scores[name] = Score.concat([part[name] for part in parts])
        return scores

    @torch.no_grad()
    def _score_group(
        self, video_GTYXC: Tensor, prompts: Sequence[str]
    ) -> dict[str, Score]:
        # a separate CUDA stream, so that scoring does not wait for the rollout's kernels
        stream: AbstractContextManager[object] = nullcontext()
        if torch.cuda.is_available():
            stream = torch.cuda.stream(torch.cuda.Stream())
        scores = {}
        with stream:
            for name, reward in self.rewards.items():
                scores[name] = self._score(reward, video_GTYXC, prompts)
        return scores


class SilentRewardGuard:
    """Stops a run in which no reward returned a finite score in the first 3 steps.

    Such rewards will return none later either. Rewards with weight 0 do not count. The steps
    are those since the process started.
    """

    PATIENCE = 3

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.trained = [name for name, weight in weights.items() if weight != 0]
        self.silent_steps = 0
        self.done = not self.trained

    def check(self, means: Mapping[str, float]) -> None:
        """Count a step by its ``reward/NAME`` means over all ranks, the same on every rank.

        Raises RewardUnavailableError after `PATIENCE` steps without a finite score.
        """
        # a reward that returned a score before may fail on later prompts
        if self.done:
            return
        # a mean is NaN when no video of the step has a score
        silent = [math.isnan(means[f"reward/{name}"]) for name in self.trained]
        if not all(silent):
            self.done = True
            return
        self.silent_steps += 1
        if self.silent_steps == self.PATIENCE:
            # all ranks have the same means, so all of them raise
            names = ", ".join(f"rewards.{name}" for name in self.trained)
            raise RewardUnavailableError(
                f"{names} returned no finite score in the first {self.PATIENCE} steps "
                "since this start: every score is NaN or None, so nothing is learned"
            )
