"""Measure scores and advantages: the same videos again, spoilt videos, and how scores lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from alignment.reward_check import MUST, RewardClip, check, score_clips
from alignment.rewards.errors import RewardFailedError, reward_errors

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.grpo import StepResult
    from common.types import RewardModel, Score
    from launch.diagnosis.reward_measures import RewardRecorder

# Videos of a step that are scored again.
CHECKED = 8
# Fewer scores than these do not tell whether scores repeat.
FEW_OTHERS = 6


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
            right_B = score_clips(reward, clips).value_B
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
    found |= _different(alone_B.float(), recorded_B, spread)
    # Scores that come a step late, or always the same.
    if recorder.alone_before_B is not None:
        late = _mean_gap(recorder.alone_before_B, recorded_B)
        same = torch.equal(recorder.value_before_B, score.value_B)
        found["late_gap"] = late / spread
        # A constant is no sign of a cache.
        varied = len(score.value_B.unique()) > 1
        found["as_before"] = float(same and varied)
    recorder.alone_before_B = alone_B.float()
    recorder.value_before_B = score.value_B
    # Colours that a reward reads in another order.
    change_B = swapped_B - right_B
    found["swapped_channels/fell"] = float((change_B < 0).sum())
    found["swapped_channels/rose"] = float((change_B > 0).sum())
    # How many scores fell, stayed and rose in each case.
    for answer in cases:
        name = answer.case.replace(" ", "_")
        found[f"{name}/fell"] = answer.below
        found[f"{name}/same"] = answer.same
        found[f"{name}/rose"] = answer.above
    return found


def _different(
    alone_B: Tensor,
    recorded_B: Tensor,
    spread: float,
) -> dict[str, float]:
    """Count recorded scores that the same videos do not have alone; their value, if it is one."""
    gap_B = (alone_B - recorded_B).abs()
    different_B = recorded_B[gap_B > 1e-3 * spread]
    found = {
        "differ": float(len(different_B)),
        "compared": float(len(alone_B)),
    }
    if len(different_B.unique()) == 1:
        found["default"] = float(different_B[0])
    return found


def _with_channels_swapped(clips: Sequence[RewardClip]) -> list[RewardClip]:
    swapped = []
    for clip in clips:
        video_TYXC = clip.video_TYXC.flip(-1)
        swapped.append(replace(clip, video_TYXC=video_TYXC))
    return swapped


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
    shares = counts / len(scored)
    found["at_max"] = float(shares[-1])
    found["at_min"] = float(shares[0])
    found["usual"] = float(shares.max())
    others = scored[scored != values[counts.argmax()]]
    # 1 if all other scores differ from each other; unknown with too few of them.
    if len(others) >= FEW_OTHERS:
        distinct = len(others.unique())
        found["others_distinct"] = distinct / len(others)
    return found


def clips_of(
    result: StepResult,
    fps: float,
) -> tuple[list[RewardClip], list[int]]:
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
            prompt = result.batch.prompts[group]
            clips.append(RewardClip(video_TYXC, fps, prompt))
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
    mean_P = advantage_PM.mean(dim=1)
    return float(mean_P.abs().max()) / size


def _spread(value_B: Tensor) -> float:
    scored = value_B[value_B.isfinite()].double()
    if len(scored) < 2:
        return 1e-9
    return max(float(scored.std(correction=0)), 1e-9)


def _mean_gap(a_B: Tensor, b_B: Tensor) -> float:
    """MEAN |a - b| over what has both numbers; NaN without any."""
    gap_B = (a_B.float() - b_B.float()).abs()
    gap_B = gap_B[gap_B.isfinite()]
    return float(gap_B.mean()) if len(gap_B) else math.nan
