"""Turn the scores of a step into advantages and reward metrics, over the groups of all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alignment.reward_transforms import (
    conditioned,
    normalised_over_batch,
    rank,
    win_rate,
)
from common.distributed import gather_objects, gather_rows
from common.policy_gradient import group_advantages, group_std

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.config import GrpoConfig
    from alignment.rank_groups import RankGroups
    from common.types import Score


@dataclass(frozen=True)
class Advantages:
    """Advantages (P, M) of this rank's members, and reward metrics over all ranks.

    anything_to_learn  False when every advantage on every rank is 0
    means              ``reward/NAME`` of every reward, NaN when it scored no video
    details            parts and spreads of the rewards
    """

    advantage_PM: Tensor
    anything_to_learn: bool
    means: dict[str, float]
    details: dict[str, float]


def group_relative_advantages(
    scores: Mapping[str, Score],
    weights: Mapping[str, float],
    cfg: GrpoConfig,
    ranks: RankGroups,
    *,
    groups: int,
) -> Advantages:
    """Normalise each reward within its groups, then sum them by weight.

        A = sum_k w_k A_k        (LongCat-Video 2510.22200, equations 9 and 10)

    Before that a reward may be conditioned on another one and made a win rate or a rank, after
    it the sum may be normalised over the batch (`alignment.reward_transforms`); the metrics are
    those of the plain rewards.

    ``scores`` are of this rank's videos, (P * M,) each with P = ``groups``; of ranks that hold
    the same videos each has scores of its `RankGroups.scored_groups` only. The rows of all
    ranks are gathered, so that the largest spread is taken over all groups and the order of
    ranks changes nothing. A NaN score counts in no mean, and its member gets advantage 0 from
    that reward. All ranks must call this.
    """
    means = {}
    details = {}
    part_names = _parts_of_all_ranks(scores)
    rewards = {}
    for name, score in scores.items():
        # metrics of this reward
        local_PM = ranks.place(score.value_B.float(), groups)
        reward_PG = ranks.gather_groups(local_PM)
        rewards[name] = reward_PG
        means[f"reward/{name}"] = mean_of_scored(reward_PG)
        missing_B = torch.full_like(score.value_B, math.nan)
        for part in part_names[name]:
            part_B = score.parts.get(part, missing_B)
            all_B = gather_rows(ranks.place(part_B.float(), groups).flatten())
            details[f"reward/{name}.{part}"] = mean_of_scored(all_B)
        for key, value in _spread(reward_PG).items():
            details[f"reward/{name}_{key}"] = value

    # the weighted advantages of all rewards
    total_PG = torch.zeros(groups * ranks.shards, cfg.group_size)
    for name in rewards:
        shaped_PG = _shaped(name, rewards, cfg, details)
        advantage_PG = group_advantages(
            shaped_PG, scale=cfg.scale, eps=cfg.advantage_eps
        )
        total_PG += weights[name] * advantage_PG

    if cfg.advantage_norm == "batch":
        total_PG = normalised_over_batch(total_PG, eps=cfg.advantage_eps)
    # bound the sum, not the rewards
    if cfg.advantage_clip is not None:
        total_PG = total_PG.clamp(-cfg.advantage_clip, cfg.advantage_clip)
    details["train/advantage_abs"] = float(total_PG.abs().mean())
    return Advantages(ranks.local_part(total_PG), bool(total_PG.any()), means, details)


def _shaped(
    name: str,
    rewards: Mapping[str, Tensor],
    cfg: GrpoConfig,
    details: dict[str, float],
) -> Tensor:
    """A reward (P, G) as it is compared within groups: conditioned, then transformed."""
    reward_PG = rewards[name]
    condition = cfg.reward_given.get(name)
    if condition is not None:
        other_PG = rewards[condition.reward]
        met_PG = (other_PG >= condition.at_least).double()
        met_PG[~other_PG.isfinite()] = math.nan
        # a threshold that nobody or everybody meets changes nothing
        details[f"reward/{name}_met"] = mean_of_scored(met_PG)
        reward_PG = conditioned(reward_PG, other_PG, at_least=condition.at_least)
    if cfg.reward_transform == "win_rate":
        return win_rate(reward_PG, temperature=cfg.win_temperature)
    if cfg.reward_transform == "rank":
        return rank(reward_PG)
    return reward_PG


def _parts_of_all_ranks(scores: Mapping[str, Score]) -> dict[str, list[str]]:
    """Names of each reward's parts on any rank, sorted. All ranks must call this.

    A rank whose request failed has no parts, and a user's code may name them in any order. Every
    rank gathers the same columns, because collectives are matched by their order alone.
    """
    own = {name: list(score.parts) for name, score in scores.items()}
    names_of_ranks = gather_objects(own)
    agreed = {}
    for name in scores:
        union = set()
        for names in names_of_ranks:
            union.update(names[name])
        # a set's order differs from process to process
        agreed[name] = sorted(union)
    return agreed


def mean_of_scored(value: Tensor) -> float:
    """MEAN over the finite values, in fp64. NaN when there are none."""
    # NaN and infinity are no scores
    scored = value[value.isfinite()]
    if not scored.numel():
        return math.nan
    return float(scored.double().mean())


def _spread(reward_PG: Tensor) -> dict[str, float]:
    """How well a reward tells videos apart: over all videos, and within each group."""
    scored = reward_PG[reward_PG.isfinite()].double()
    std = float(scored.std(correction=0)) if scored.numel() else math.nan
    # the spread within groups is what GRPO learns from
    std_P = group_std(reward_PG)
    return {
        "std": std,
        "group_std_max": float(std_P.max()),
        "group_std_median": float(std_P.median()),
        "zero_spread": float((std_P == 0.0).double().mean()),
        "unscored": float((~reward_PG.isfinite()).sum()),
    }
