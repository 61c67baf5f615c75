"""Choose which two of a prompt's videos make a pair: the best and the worst by the rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alignment.config import PairConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """A pair of videos of a prompt: their numbers and their values (`normalised_value`)."""

    prompt: int
    chosen: int
    rejected: int
    chosen_value: float
    rejected_value: float

    @property
    def margin(self) -> float:
        """How much better the chosen video is, in standard deviations of the rewards."""
        return self.chosen_value - self.rejected_value


@dataclass(frozen=True)
class Choices:
    """The pairs of all prompts, and how many prompts have none, by reason.

    unscored   Fewer than two videos have a score by every reward.
    close      The best is not ``min_margin`` better than the worst.
    disagreed  Some reward prefers the rejected video.
    """

    pairs: tuple[Choice, ...]
    unscored: int
    close: int
    disagreed: int


def normalised_value(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float]
) -> Tensor:
    """Average the rewards after normalising each, (P, K) each -> (P, K).

        value = sum_k w_k (r_k - mean_k) / std_k / sum_k |w_k|

    MEAN and population std go over all scored videos of all prompts, so that the unit of a
    reward does not matter (Flow-DPO 2501.13918, section 4: normalised, then averaged). A reward
    that gives every video the same score counts 0. The value is NaN where any reward is.
    """
    used = {}
    for name, reward in rewards.items():
        # a reward of weight 0 is logged, not used
        if weights[name] != 0:
            used[name] = reward.double()
    if not used:
        raise ValueError("normalised_value needs a reward whose weight is not 0")

    total = torch.zeros_like(next(iter(used.values())))
    for name, reward in used.items():
        scored = reward[reward.isfinite()]
        # without any score all stay NaN; without a spread all become 0
        std = float(scored.std(correction=0)) if scored.numel() else 0.0
        centred = reward - scored.mean() if scored.numel() else reward
        normalised = centred / std if std > 0 else centred * 0
        total = total + weights[name] * normalised
    return total / math.fsum(abs(weights[name]) for name in used)


def choose(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], cfg: PairConfig
) -> Choices:
    """Choose the best and the worst of each prompt's videos by `normalised_value`.

    Only videos that every reward scored take part; of equal videos the earlier is taken. A
    pair is dropped when its margin is below ``min_margin`` or zero, and with ``agreement``
    when a reward, in the direction of its weight, prefers the rejected video.
    """
    value_PK = normalised_value(rewards, weights)
    pairs: list[Choice] = []
    counts = {"unscored": 0, "close": 0, "disagreed": 0}
    for prompt, value_K in enumerate(value_PK):
        # the best and the worst of the videos that have a score
        scored_K = value_K.isfinite()
        if int(scored_K.sum()) < 2:
            counts["unscored"] += 1
            continue
        best = int(value_K.masked_fill(~scored_K, -math.inf).argmax())
        worst = int(value_K.masked_fill(~scored_K, math.inf).argmin())
        choice = Choice(
            prompt, best, worst, float(value_K[best]), float(value_K[worst])
        )

        # drop the pair, or keep it
        if choice.margin <= 0 or choice.margin < cfg.min_margin:
            counts["close"] += 1
        elif cfg.agreement and _disagree(choice, rewards, weights):
            counts["disagreed"] += 1
        else:
            pairs.append(choice)
    return Choices(tuple(pairs), **counts)


def _disagree(
    choice: Choice, rewards: Mapping[str, Tensor], weights: Mapping[str, float]
) -> bool:
    """Return True when some reward prefers the rejected video."""
    for name, reward_PK in rewards.items():
        reward_K = reward_PK[choice.prompt]
        gain = reward_K[choice.chosen] - reward_K[choice.rejected]
        # a negative weight turns the reward's preference round
        if weights[name] * float(gain) < 0:
            return True
    return False
