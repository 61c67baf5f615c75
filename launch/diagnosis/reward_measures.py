"""Measure rewards: what reaches them in a step, and how they answer spoilt videos."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
# Fewer scores than these do not tell whether scores repeat.
FEW_OTHERS = 6


@dataclass
class RewardRecorder:
    """A reward that notes what it is given; its scores are those of the reward inside."""

    reward: RewardModel
    fps: list[float] = field(default_factory=list)
    prompt_of: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    largest: float = 0.0
    # Of the step before: its videos, its scores, and the scores of some alone.
    videos_before: set[str] = field(default_factory=set)
    value_before_B: Tensor | None = None
    alone_before_B: Tensor | None = None

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
        self.shape = tuple(video_BTYXC.shape[1:])
        self.largest = max(self.largest, float(video_BTYXC.max()))
        for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=False):
            self.prompt_of[fingerprint(video_TYXC)] = prompt
        return self.reward.score(video_BTYXC, prompts, fps=fps)

    def forget(self) -> None:
        """Start a new step."""
        self.fps.clear()
        self.prompt_of.clear()
        self.largest = 0.0


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
    changed = 0
    lost = []
    for b, video_TYXC in enumerate(result.video_BTYXC):
        prompt = recorder.prompt_of.get(fingerprint(video_TYXC))
        if prompt is None:
            lost.append(video_TYXC)
        elif prompt not in result.batch.prompts:
            changed += 1
        elif prompt != result.batch.prompts[b // members]:
            wrong += 1
    count = len(result.video_BTYXC)
    found = {
        "wrong_prompt": wrong / count,
        "changed_prompt": changed / count,
        "other_video": len(lost) / count,
    }
    if lost and recorder.prompt_of:
        found |= _mistake_of(recorder, lost[0])
    recorder.videos_before = {fingerprint(video) for video in result.video_BTYXC}
    # And which frame rate?
    if recorder.fps:
        found["fps"] = recorder.fps[-1]
        found["fps_ratio"] = recorder.fps[-1] / fps
    return found


def _mistake_of(recorder: RewardRecorder, video_TYXC: Tensor) -> dict[str, float]:
    """What was done to a video that did not reach the reward as it is: 1 by its name."""
    # Found by making the mistakes on purpose.
    found = {}
    for name, changed in pixel_mistakes(video_TYXC[None]).items():
        if fingerprint(changed[0]) in recorder.prompt_of:
            found[f"other/{name}"] = 1.0
    if recorder.videos_before & set(recorder.prompt_of):
        found["other/before"] = 1.0
    # Or by its range and size.
    if recorder.largest <= 1 < float(video_TYXC.max()):
        found["other/unit"] = 1.0
    elif recorder.shape and recorder.shape[0] != video_TYXC.shape[0]:
        found["other/frames"] = 1.0
    elif recorder.shape and recorder.shape != tuple(video_TYXC.shape):
        found["other/size"] = 1.0
    return found


def pixel_mistakes(video_BTYXC: Tensor) -> dict[str, Tensor]:
    """Videos as common mistakes leave them, by name."""
    levels = video_BTYXC.float()
    return {
        "channels": video_BTYXC.flip(-1),
        "reversed": video_BTYXC.flip(1),
        "upside-down": video_BTYXC.flip(2),
        "mirrored": video_BTYXC.flip(3),
        "transposed": video_BTYXC.transpose(2, 3),
        "inverted": 255 - video_BTYXC,
        "frozen": video_BTYXC[:, :1].expand_as(video_BTYXC),
        # -1..1 taken for 0..1
        "clipped": (2 * levels - 255).clamp(min=0).to(video_BTYXC.dtype),
    }


def answers(
    recorder: RewardRecorder,
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
    reward = recorder.reward
    if len({clip.prompt for clip in clips}) < 2:
        return {}
    # Whatever the reward raises, training goes on without these numbers.
    try:
        with reward_errors(reward.name, RewardFailedError):
            alone_B = _one_by_one(reward, clips[::2])
            again_B = _one_by_one(reward, clips[:3:2])
            cases = check(reward, clips, cases=MUST)
            swapped_B = score_clips(reward, _with_channels_swapped(clips)).value_B
    except RewardFailedError:
        return {}

    # Differences in spreads of the step's scores.
    recorded_B = score.value_B[places[::2]].float()
    spread = _spread(score.value_B)
    found = {
        "alone_gap": _mean_gap(alone_B, recorded_B) / spread,
        "turned_gap": _mean_gap(alone_B, -recorded_B) / spread,
        "random": _mean_gap(alone_B[: len(again_B)], again_B) / spread,
    }
    # Recorded scores that the same videos do not have alone, if they are one value.
    differs_B = (alone_B.float() - recorded_B).abs() > 1e-3 * spread
    found["differ"] = float(differs_B.sum())
    found["compared"] = float(len(alone_B))
    if differs_B.any() and len(recorded_B[differs_B].unique()) == 1:
        found["default"] = float(recorded_B[differs_B][0])
    # Scores that come a step late, or always the same.
    if recorder.alone_before_B is not None:
        found["late_gap"] = _mean_gap(recorder.alone_before_B, recorded_B) / spread
        found["as_before"] = float(torch.equal(recorder.value_before_B, score.value_B))
    recorder.alone_before_B = alone_B.float()
    recorder.value_before_B = score.value_B
    found |= _answer("swapped_channels", score.value_B[places], swapped_B)
    # How many scores fell, stayed and rose in each case.
    for answer in cases:
        name = answer.case.replace(" ", "_")
        found[f"{name}/fell"] = answer.below
        found[f"{name}/same"] = answer.same
        found[f"{name}/rose"] = answer.above
    return found


def _with_channels_swapped(clips: Sequence[RewardClip]) -> list[RewardClip]:
    return [replace(clip, video_TYXC=clip.video_TYXC.flip(-1)) for clip in clips]


def _answer(name: str, right_B: Tensor, spoilt_B: Tensor) -> dict[str, float]:
    """How many scores fell, stayed and rose."""
    change_B = spoilt_B.double() - right_B.double()
    return {
        f"{name}/fell": float((change_B < 0).sum()),
        f"{name}/same": float((change_B == 0).sum()),
        f"{name}/rose": float((change_B > 0).sum()),
    }


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
    # Equal to the last bit: a clamp makes such scores, or a default for what failed.
    values, counts = scored.unique(return_counts=True)
    found["at_max"] = float(counts[-1]) / len(scored)
    found["at_min"] = float(counts[0]) / len(scored)
    usual = values[counts.argmax()]
    others = scored[scored != usual]
    found["usual"] = float(counts.max()) / len(scored)
    # 1 if all other scores differ from each other; NaN with too few of them.
    if len(others) >= FEW_OTHERS:
        found["others_distinct"] = len(others.unique()) / len(others)
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
