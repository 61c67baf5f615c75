"""Which two of a prompt's videos make a pair: the best against the worst, where the rewards agree that it is so."""

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
    """A pair: places of its videos among their prompt's, and what they are worth together (`normalised_value`)."""

    prompt: int
    winner: int
    loser: int
    chosen_value: float
    rejected_value: float

    @property
    def margin(self) -> float:
        """How much better the winner is, in standard deviations of the mean reward's parts."""
        return self.chosen_value - self.rejected_value


@dataclass(frozen=True)
class Choices:
    """What came of the prompts: their pairs, and how many had none, by reason."""

    pairs: tuple[Choice, ...]
    unjudged: int  # fewer than two videos that all rewards could judge
    close: int  # the best is not ``min_margin`` better than the worst
    disagreed: int  # some reward prefers the loser


def normalised_value(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float]
) -> Tensor:
    """(P, K) of each reward -> (P, K): sum_k w_k (r_k - mean_k) / std_k / sum_k |w_k|, NaN where one could not judge.

    MEAN and population std go over all judged videos of all prompts, so that rewards of any unit count alike
    (Flow-DPO 2501.13918, section 4: normalised, then averaged). A reward that says the same of all counts 0.
    """
    used = {
        name: reward.double() for name, reward in rewards.items() if weights[name] != 0
    }
    if not used:
        raise ValueError("normalised_value needs a reward whose weight is not 0")
    total = torch.zeros_like(next(iter(used.values())))
    for name, reward in used.items():
        judged = reward[reward.isfinite()]
        std = float(judged.std(correction=0)) if judged.numel() else 0.0
        centred = reward - judged.mean() if judged.numel() else reward
        total = total + weights[name] * (centred / std if std > 0 else centred * 0)
    return total / math.fsum(abs(weights[name]) for name in used)


def choose(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], cfg: PairConfig
) -> Choices:
    """The best and the worst of each prompt's videos by `normalised_value`, of those that all rewards could judge.

    The earlier video wins a tie. A pair is dropped when its margin is below ``min_margin`` or zero, and with
    ``agreement`` when a reward, in the direction of its weight, prefers the loser.
    """
    value_PK = normalised_value(rewards, weights)
    pairs: list[Choice] = []
    counts = {"unjudged": 0, "close": 0, "disagreed": 0}
    for prompt, value_K in enumerate(value_PK):
        judged = value_K.isfinite()
        if int(judged.sum()) < 2:
            counts["unjudged"] += 1
            continue
        best = int(value_K.masked_fill(~judged, -math.inf).argmax())
        worst = int(value_K.masked_fill(~judged, math.inf).argmin())
        choice = Choice(
            prompt, best, worst, float(value_K[best]), float(value_K[worst])
        )
        if choice.margin <= 0 or choice.margin < cfg.min_margin:
            counts["close"] += 1
        elif cfg.agreement and any(
            weights[name] * float(reward[prompt, best] - reward[prompt, worst]) < 0
            for name, reward in rewards.items()
        ):
            counts["disagreed"] += 1
        else:
            pairs.append(choice)
    return Choices(tuple(pairs), **counts)
