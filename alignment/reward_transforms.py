"""Change rewards within their groups before they become advantages: conditions and win rates.

Rewards are (P, G) over whole groups. NaN and infinity are no scores: such a member stays NaN and
is no opponent of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def win_rate(reward_PG: Tensor, *, temperature: float) -> Tensor:
    """Probability to be preferred to another member of the group -> (P, G).

        R_g = mean_{j != g} sigmoid( (r_g - r_j) / T )

    (Pref-GRPO 2508.20751, with the Bradley-Terry probability of two scores for the judge.) It is
    bounded, so that an outlier does not set the spread of its group, and members that are nearly
    equal stay near 1/2. Over scored members it sums to half their number; a member without an
    opponent gets 1/2. ``temperature`` is in units of the reward.
    """

    def win(gap: Tensor) -> Tensor:
        return torch.sigmoid(gap / temperature)

    return _mean_win(reward_PG, win)


def rank(reward_PG: Tensor) -> Tensor:
    """Share of the group's other members that are worse, ties as half -> (P, G).

    It is the limit of `win_rate` at temperature 0, and does not depend on the reward's scale.
    """

    def win(gap: Tensor) -> Tensor:
        # a tie is half a win
        return torch.heaviside(gap, torch.full_like(gap, 0.5))

    return _mean_win(reward_PG, win)


def conditioned(reward_PG: Tensor, other_PG: Tensor, *, at_least: float) -> Tensor:
    """Let a reward count only where another one reaches ``at_least`` -> (P, G).

    Other members get the least reward of their group: not 0, which may be the best value of a
    negative reward. A member whose other reward is missing has none. (After GDPO 2601.05242,
    conditioned rewards; the least reward is ours.)
    """
    finite_PG = reward_PG.isfinite()
    other_finite_PG = other_PG.isfinite()

    # the least reward of each group
    scored_PG = reward_PG.masked_fill(~finite_PG, math.inf)
    least_P = scored_PG.amin(1)
    least_PG = least_P[:, None].expand_as(reward_PG)

    # the threshold itself is good enough
    met_PG = other_PG >= at_least
    value_PG = torch.where(met_PG, reward_PG, least_PG)

    # without either score there is none
    both_PG = finite_PG & other_finite_PG
    return value_PG.masked_fill(~both_PG, math.nan)


def normalised_over_batch(advantage_PG: Tensor, *, eps: float) -> Tensor:
    """Give the summed advantages of a step mean 0 and standard deviation 1 -> (P, G).

        A <- (A - mean A) / (std A + eps)      over all members of all groups, ddof 0

    (GDPO 2601.05242.) So the size of an update does not grow with the number of rewards. A group
    without any advantage has nothing to learn and stays exactly 0.
    """
    learned_P = advantage_PG.any(1)
    if not learned_P.any():
        return advantage_PG
    # in fp64, as the spread of groups
    value_PG = advantage_PG.double()
    mean = value_PG.mean()
    std = value_PG.std(correction=0)
    scaled_PG = (value_PG - mean) / (std + eps)
    scaled_PG[~learned_P] = 0.0
    return scaled_PG.to(advantage_PG.dtype)


def _mean_win(
    reward_PG: Tensor,
    win: Callable[[Tensor], Tensor],
) -> Tensor:
    """MEAN over a member's opponents of ``win`` of the gap to each -> (P, G)."""
    finite_PG = reward_PG.isfinite()
    reward = reward_PG.detach().double()
    value_PG = reward.masked_fill(~finite_PG, 0.0)

    # every member against every other that has a score
    gap_PGJ = value_PG.unsqueeze(2) - value_PG.unsqueeze(1)
    pair_PGJ = finite_PG.unsqueeze(2) & finite_PG.unsqueeze(1)
    # nobody is an opponent of itself
    pair_PGJ.diagonal(dim1=1, dim2=2).zero_()
    win_PGJ = win(gap_PGJ)
    wins_PG = (win_PGJ * pair_PGJ).sum(2)
    count_PG = pair_PGJ.sum(2)

    # alone there is nobody to lose to
    rate_PG = wins_PG / count_PG
    rate_PG = rate_PG.masked_fill(count_PG == 0, 0.5)
    rate_PG = rate_PG.masked_fill(~finite_PG, math.nan)
    return rate_PG.to(reward_PG.dtype)
