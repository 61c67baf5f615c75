"""Measure rewards: what reaches them in a step, and how they answer spoilt videos."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from alignment.reward_check import MUST, RewardClip, check, score_clips
from alignment.rewards.errors import RewardFailedError, reward_errors
from common.types import Score

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.grpo import StepResult
    from alignment.rewards.errors import NamedReward
    from common.types import RewardModel

# Videos of a step that are scored again.
CHECKED = 8


@dataclass
class RewardRecorder:
    """A reward that notes what it is given; its scores are those of the reward inside."""

    reward: RewardModel
    fps: list[float] = field(default_factory=list)
    prompt_of: dict[str, str] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reward, name)

    def score(
        self,
        video_BTYXC: Tensor,
        prompts: Sequence[str],
        *,
        fps: float,
    ) -> Score:
        self.fps.append(float(fps))
        for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=False):
            self.prompt_of[fingerprint(video_TYXC)] = prompt
        return self.reward.score(video_BTYXC, prompts, fps=fps)

    def forget(self) -> None:
        """Start a new step."""
        self.fps.clear()
        self.prompt_of.clear()


def fingerprint(video_TYXC: Tensor) -> str:
    """Identify a video by some of its pixels."""
    # At full size a part of the pixels is enough.
    _, height, width, _ = video_TYXC.shape
    rows = max(1, height // 64)
    columns = max(1, width // 64)
    part = video_TYXC[:, ::rows, ::columns].contiguous()
    return hashlib.sha256(part.cpu().numpy().tobytes()).hexdigest()


def record(rewards: Mapping[str, NamedReward]) -> dict[str, RewardRecorder]:
    """Put a recorder into every reward; `release` takes them out."""
    recorders = {}
    for name, named in rewards.items():
        recorders[name] = RewardRecorder(named.reward)
        named.reward = recorders[name]
    return recorders


def release(rewards: Mapping[str, NamedReward]) -> None:
    """Take the recorders out again."""
    for named in rewards.values():
        if isinstance(named.reward, RewardRecorder):
            named.reward = named.reward.reward


def received(
    recorder: RewardRecorder,
    result: StepResult,
    *,
    fps: float,
) -> dict[str, float]:
    """Compare what a reward got in a step with the step's own videos and prompts."""
    # The videos that were kept, group by group.
    if result.video_BTYXC is None:
        return {}
    members = result.advantage_PM.shape[1]

    # Which prompt did the reward get with each of them?
    wrong = 0
    lost = 0
    for b, video_TYXC in enumerate(result.video_BTYXC):
        prompt = recorder.prompt_of.get(fingerprint(video_TYXC))
        if prompt is None:
            lost += 1
        elif prompt != result.batch.prompts[b // members]:
            wrong += 1
    count = len(result.video_BTYXC)
    found = {}
    found["wrong_prompt"] = wrong / count
    found["other_video"] = lost / count
    # And which frame rate?
    if recorder.fps:
        found["fps"] = recorder.fps[-1]
        found["fps_ratio"] = recorder.fps[-1] / fps
    return found


def answers(
    reward: RewardModel,
    score: Score,
    result: StepResult,
    *,
    fps: float,
) -> dict[str, float]:
    """Score videos of a step again: alone, with wrong prompts, and with shuffled pixels.

    score  what the step recorded for them
    """
    clips, places = clips_of(result, fps)
    # A wrong prompt must be another one.
    if len({clip.prompt for clip in clips}) < 2:
        return {}
    # Whatever the reward raises, training goes on without these numbers.
    try:
        with reward_errors(reward.name, RewardFailedError):
            alone_B = _one_by_one(reward, clips[::2])
            again_B = _one_by_one(reward, clips[:1])
            cases = check(reward, clips, cases=MUST)
    except RewardFailedError:
        return {}

    # Differences in spreads of the step's scores.
    recorded_B = score.value_B[places[::2]].float()
    spread = _spread(score.value_B)
    found = {
        "alone_gap": _mean_gap(alone_B, recorded_B) / spread,
        "turned_gap": _mean_gap(alone_B, -recorded_B) / spread,
        "random": _mean_gap(alone_B[:1], again_B) / spread,
    }
    # How many scores fell, stayed and rose in each case.
    for answer in cases:
        name = answer.case.replace(" ", "_")
        found[f"{name}/fell"] = answer.below
        found[f"{name}/same"] = answer.same
        found[f"{name}/rose"] = answer.above
    return found


def _one_by_one(reward: RewardModel, clips: Sequence[RewardClip]) -> Tensor:
    """Scores (B,) of clips in one call each: nothing can be mixed up within a batch."""
    scores = []
    for clip in clips:
        scores.append(score_clips(reward, [clip]).value_B)
    return torch.cat(scores)


def shape_of_scores(score: Score) -> dict[str, float]:
    """How scores lie: shares at the largest and at the smallest value, and without a score."""
    value_B = score.value_B.double()
    scored = value_B[value_B.isfinite()]
    count = max(1, len(value_B))
    found = {"unscored": 1 - len(scored) / count}
    if not len(scored):
        return found
    # Equal to the last bit: a clamp makes such scores.
    found["at_max"] = float((scored == scored.max()).double().mean())
    found["at_min"] = float((scored == scored.min()).double().mean())
    found["distinct"] = float(len(scored.unique()))
    found["mean"] = float(scored.mean())
    found["std"] = float(scored.std(correction=0))
    return found


def clips_of(result: StepResult, fps: float) -> tuple[list[RewardClip], list[int]]:
    """Some kept videos, spread over the groups, and their places in the batch."""
    if result.video_BTYXC is None:
        return [], []
    members = result.advantage_PM.shape[1]
    groups = len(result.video_BTYXC) // members
    # The same number of every group.
    each = max(1, CHECKED // max(1, groups))
    clips = []
    places = []
    for group in range(groups):
        for member in range(min(each, members)):
            b = group * members + member
            video_TYXC = result.video_BTYXC[b]
            clips.append(RewardClip(video_TYXC, fps, result.batch.prompts[group]))
            places.append(b)
    return clips, places


def advantage_sign(
    scores: Mapping[str, Score],
    weights: Mapping[str, float],
    advantage_PM: Tensor,
) -> float:
    """Correlation of advantages with the weighted rewards, each in its own spread; in [-1, 1]."""
    total_PM = torch.zeros_like(advantage_PM, dtype=torch.float64)
    for name, score in scores.items():
        reward_PM = score.value_B.double().reshape(advantage_PM.shape)
        # A video without a score has no advantage.
        scored_PM = reward_PM.isfinite()
        known_PM = torch.where(scored_PM, reward_PM, 0.0)
        count_P1 = scored_PM.sum(dim=1, keepdim=True).clamp(min=1)
        mean_P1 = known_PM.sum(dim=1, keepdim=True) / count_P1
        centred_PM = torch.where(scored_PM, known_PM - mean_P1, 0.0)
        # The spread of all scores puts rewards on one scale.
        total_PM += weights[name] * centred_PM / _spread(score.value_B)

    # Correlation, since both have a mean of 0 in every group.
    advantage_PM = advantage_PM.double()
    size = float(total_PM.norm() * advantage_PM.norm())
    if size == 0:
        return math.nan
    product = float((total_PM * advantage_PM).sum())
    return product / size


def off_centre(advantage_PM: Tensor) -> float:
    """Largest |MEAN of a group's advantages|, relative to their rms; NaN without any."""
    advantage_PM = advantage_PM.double()
    size = float(advantage_PM.square().mean().sqrt())
    if size == 0:
        return math.nan
    return float(advantage_PM.mean(dim=1).abs().max()) / size


def _spread(value_B: Tensor) -> float:
    scored = value_B[value_B.isfinite()].double()
    spread = float(scored.std(correction=0)) if len(scored) > 1 else 0.0
    return max(spread, 1e-9)


def _mean_gap(a_B: Tensor, b_B: Tensor) -> float:
    """MEAN |a - b| over what has both numbers; NaN without any."""
    gap_B = (a_B.float() - b_B.float()).abs()
    gap_B = gap_B[gap_B.isfinite()]
    return float(gap_B.mean()) if len(gap_B) else math.nan
