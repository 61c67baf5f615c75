"""Score the videos of a step with every reward, after the rollout or in a thread beside it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from common import faults
from common.distributed import raise_on_all
from common.types import RewardUnavailableError, Score

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.rewards.errors import NamedReward
    from alignment.timing import PhaseTimer


class Scorer(AbstractContextManager[None]):
    """Scores the videos of one step with every reward, and lets go of their frames.

    Use it as a context manager: `add` every sampled group, then take the `scores` of all.
    Groups are collected to chunks of up to ``videos_per_call`` videos, and each chunk is scored
    when it is complete: a step then holds the frames of a chunk and not of all its videos.
    With ``overlap`` each group is scored in a thread, while the caller samples the next group;
    a reward then sees the videos of one group at a time.

    group_size       Videos of a group on this rank.
    groups           Groups of the step that this rank scores.
    videos_per_call  Rounded down to whole groups, and at least a group.
    """

    def __init__(
        self,
        rewards: Mapping[str, NamedReward],
        *,
        fps: float,
        group_size: int,
        groups: int,
        videos_per_call: int,
        timer: PhaseTimer,
        overlap: bool,
    ) -> None:
        self.rewards = rewards
        self.fps = fps
        self.group_size = group_size
        self.timer = timer
        # a single thread: rewards are called in the order of the groups
        self.thread = None
        if overlap:
            device = torch.cuda.current_device() if torch.cuda.is_available() else None
            self.thread = ThreadPoolExecutor(
                1, initializer=claim_device, initargs=(device,)
            )
        self.pending: list[Future[dict[str, Score]]] = []

        # the chunk that is being filled, and the scores of those before it
        self.groups_left = groups
        self.groups_per_call = max(1, videos_per_call // group_size)
        self.chunk: _Chunk | None = None
        self.parts: list[dict[str, Score]] = []
        self.problem: RewardUnavailableError | None = None

    def __exit__(self, *_: object) -> None:
        # wait for what is being scored, also after an error
        if self.thread is not None:
            self.thread.shutdown()

    def add(self, video_GTYXC: Tensor, prompts: Sequence[str]) -> None:
        """Take the videos (G, T, Y, X, 3) of a sampled group."""
        if self.thread is not None:
            self._limit_waiting_groups()
            # The executor may hold its arguments a moment longer than the scores need them.
            held = [video_GTYXC]
            future = self.thread.submit(self._score_group, held, prompts)
            self.pending.append(future)
            return
        if self.chunk is None:
            groups = min(self.groups_per_call, self.groups_left)
            self.chunk = _Chunk(video_GTYXC, groups)
        self.chunk.add(video_GTYXC, prompts)
        self.groups_left -= 1
        if self.chunk.is_full:
            chunk = self.chunk
            self.chunk = None
            self._score_chunk(chunk)

    def scores(self) -> dict[str, Score]:
        """Return the scores of all videos of the step by reward. All ranks must call this.

        Raises RewardUnavailableError on every rank when a reward raised an error on any rank.
        """
        if self.thread is not None:
            self._wait()
        # every rank must learn of an error on any rank, or the others would wait for it
        raise_on_all(self.problem)
        if not self.parts:
            # other ranks score all videos of this one
            return {name: Score(torch.zeros(0)) for name in self.rewards}
        scores = {}
        for name in self.rewards:
            scores[name] = Score.concat([part[name] for part in self.parts])
        return scores

    def _limit_waiting_groups(self) -> None:
        """Wait until no more groups wait for the thread than a chunk holds."""
        # the error of a reward is raised later, on all ranks together
        if len(self.pending) >= self.groups_per_call:
            wait([self.pending[-self.groups_per_call]])

    def _wait(self) -> None:
        with self.timer("score/wait"):
            try:
                # an error inside the thread is raised here
                self.parts = [future.result() for future in self.pending]
            except RewardUnavailableError as error:
                self.problem = error

    def _score_chunk(self, chunk: _Chunk) -> None:
        """Score a chunk, unless an earlier one failed: `scores` raises that error."""
        if self.problem is not None:
            return
        scores = {}
        try:
            for name, reward in self.rewards.items():
                with self.timer(f"score/{name}"):
                    scores[name] = self._score(reward, chunk.video_BTYXC, chunk.prompts)
        except RewardUnavailableError as error:
            self.problem = error
        self.parts.append(scores)

    @torch.no_grad()
    def _score_group(
        self, held: list[Tensor], prompts: Sequence[str]
    ) -> dict[str, Score]:
        """Score the only group of a list, and take it out, so that it is freed with the scores."""
        video_GTYXC = held.pop()
        scores = {}
        for name, reward in self.rewards.items():
            scores[name] = self._score(reward, video_GTYXC, prompts)
        return scores

    def _score(
        self, reward: NamedReward, video_BTYXC: Tensor, prompts: Sequence[str]
    ) -> Score:
        """Score videos in one call, or in one call per group for a ``group_level`` reward."""
        faults.point("reward")
        # most rewards take any videos together
        count = len(prompts)
        size = self.group_size if reward.group_level else count
        scores = []
        for start in range(0, count, size):
            part = slice(start, start + size)
            scores.append(reward.score(video_BTYXC[part], prompts[part], fps=self.fps))
        return Score.concat(scores)


class _Chunk:
    """Videos (B, T, Y, X, 3) of a few groups in one tensor, which is filled group by group."""

    def __init__(self, like_GTYXC: Tensor, groups: int) -> None:
        size = groups * len(like_GTYXC)
        self.video_BTYXC = like_GTYXC
        # a single group is its own chunk, without a copy
        if groups > 1:
            self.video_BTYXC = like_GTYXC.new_empty((size, *like_GTYXC.shape[1:]))
        self.prompts: list[str] = []

    def add(self, video_GTYXC: Tensor, prompts: Sequence[str]) -> None:
        """Copy the videos of a group behind the others."""
        start = len(self.prompts)
        self.prompts += prompts
        place = self.video_BTYXC[start : len(self.prompts)]
        if place.data_ptr() != video_GTYXC.data_ptr():
            place.copy_(video_GTYXC)

    @property
    def is_full(self) -> bool:
        return len(self.prompts) == len(self.video_BTYXC)


def claim_device(device: int | None) -> None:
    """Give the calling thread this rank's GPU, and a stream for everything that it starts.

    A new thread's current device is GPU 0 whatever the rank. On a stream of its own, scoring does
    not wait for the rollout's kernels.
    """
    if device is None:
        return
    torch.cuda.set_device(device)
    torch.cuda.set_stream(scoring_stream(device))


@functools.cache
def scoring_stream(device: int) -> torch.cuda.Stream:
    """Return the stream of a GPU that rewards run on beside the rollout, made once.

    PyTorch keeps freed memory by stream. A new stream for each step would keep the rewards'
    activations as often as it has streams: 32 times.
    """
    return torch.cuda.Stream(device)


class SilentRewardGuard:
    """Stops a run in which no reward returned a finite score in the first 3 steps.

    Such rewards will return none later either. Rewards with weight 0 do not count. The steps
    are those since the process started; of a run that ends before, all of them.
    """

    PATIENCE = 3

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.trained = [name for name, weight in weights.items() if weight != 0]
        self.patience = self.PATIENCE
        self.silent_steps = 0
        self.done = not self.trained

    def expect(self, steps: int) -> None:
        """Take the number of steps that are left, when that is less than `PATIENCE`."""
        self.patience = min(self.PATIENCE, steps)

    def check(self, means: Mapping[str, float], scores: Mapping[str, Score]) -> None:
        """Count a step by its ``reward/NAME`` means over all ranks, the same on every rank.

        Raises RewardUnavailableError after `patience` steps without a finite score, with the first
        reason among this rank's ``scores``.
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
        if self.silent_steps == self.patience:
            # all ranks have the same means, so all of them raise
            names = ", ".join(f"rewards.{name}" for name in self.trained)
            reasons = [
                reason for name in self.trained for reason in scores[name].reasons
            ]
            first = next((f" ({reason})" for reason in reasons if reason), "")
            raise RewardUnavailableError(
                f"{names} returned no finite score in the first {self.patience} steps "
                f"since this start: every score is NaN or None{first}, so nothing is learned"
            )


class FlatRewardGuard:
    """Stops a run in which no reward told two videos of a group apart in its first steps.

    Then every advantage is 0 and no weight moves, however long the run goes on. Rewards with
    weight 0 do not count. The steps are those since the process started.

    patience  The number of steps; None never stops.
    """

    def __init__(self, weights: Mapping[str, float], *, patience: int | None) -> None:
        self.trained = [name for name, weight in weights.items() if weight != 0]
        self.patience = patience
        self.flat_steps = 0
        self.done = not self.trained or patience is None

    def check(self, means: Mapping[str, float], details: Mapping[str, float]) -> None:
        """Count a step by its reward metrics over all ranks, the same on every rank.

        Raises RewardUnavailableError after ``patience`` steps without spread in any group.
        """
        # rewards that spread once may do so again
        if self.done:
            return
        spreads = [details[f"reward/{name}_group_std_max"] for name in self.trained]
        if any(spread > 0 for spread in spreads):
            self.done = True
            return
        self.flat_steps += 1
        if self.flat_steps == self.patience:
            # all ranks have the same metrics, so all of them raise
            values = ", ".join(
                f"rewards.{name} (mean {means[f'reward/{name}']:g})"
                for name in self.trained
            )
            raise RewardUnavailableError(
                f"{values} gave all videos of a group the same score, in every group of the "
                f"first {self.patience} steps since this start, so nothing is learned; "
                "grpo.flat_reward_patience=null goes on all the same"
            )
