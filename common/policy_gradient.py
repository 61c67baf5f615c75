"""Policy-gradient losses shared by every loop: advantages, clipped surrogates, KL, masked means.

Who divides. A loss is the MEAN over its own elements; the engine then divides by the number of
micro-batches of a step, and data parallelism averages over ranks. With equal micro-batches that is
the mean over everything. When they are unequal (ties, members without a score, text tokens) the
caller passes ``count``, and the loss is SUM / count. For the result to be the global mean, after
the engine's and the ranks' divisions, the caller computes once per step

    count = (elements summed over all ranks and micro-batches) / (ranks * micro-batches)

A loop that adds gradients itself, without those divisions, passes the plain global number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from common.gaussian import widen
from common.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

AdvantageScale = Literal["none", "group", "max_group", "batch"]


def group_std(reward_PG: Tensor) -> Tensor:
    """Standard deviation of every group -> (P,), fp64, ddof 0 over members with a finite reward.

    It is 0 with fewer than two such members.
    """
    return _centre(reward_PG).std_P


def group_advantages(
    reward_PG: Tensor,
    *,
    scale: AdvantageScale,
    eps: float = 1e-4,
    correction: int = 0,
) -> Tensor:
    """Advantage of every member within its group -> (P, G), the reward's dtype, fp32 at least.

        none       A = R - mean_group                              (Dr. GRPO 2503.20783)
        group      A = (R - mean_group) / (std_group + eps)        (GRPO 2402.03300)
        max_group  A = (R - mean_group) / (max_groups std + eps)   (LongCat 2510.22200, equation 9)
        batch      A = (R - mean_group) / (std of all R + eps)     (Flash-GRPO 2605.15980)

    The largest std and that of all R go over the rows given here, the groups of all ranks. Mean and
    std go over members with a finite reward; other members get 0. ``correction`` is subtracted from
    their number in a group's std: 0 is the population's std, 1 the sample's. A group with
    fewer than two finite rewards, or without any spread, is exactly 0. Raises ValueError for a
    reward that is not (P, G).
    """
    centred = _centre(reward_PG, correction)
    std_P1 = centred.std_P[:, None]

    # 1. The divisor of every group.
    if scale == "none":
        divisor_P1 = torch.ones_like(std_P1)
    elif scale == "group":
        divisor_P1 = std_P1 + eps
    elif scale == "max_group":
        divisor_P1 = (std_P1.max() + eps).expand_as(std_P1)
    else:
        finite = reward_PG[reward_PG.isfinite()].detach().double()
        std = finite.std(correction=0) if finite.numel() else finite.new_zeros(())
        divisor_P1 = (std + eps).expand_as(std_P1)

    # 2. A row without spread has a zero numerator; a divisor of 1 keeps eps = 0 from making 0 / 0.
    divisor_P1 = torch.where(std_P1 > 0.0, divisor_P1, 1.0)
    advantage_PG = centred.value_PG / divisor_P1
    return advantage_PG.to(torch.promote_types(reward_PG.dtype, torch.float32))


def clipped_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> LossOutput:
    """PPO's clipped objective, negated; MEAN over all elements of three equal shapes.

        r = exp(log_prob - old_log_prob)
        loss = -mean[ min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) ]  (PPO 1707.06347, eq. 7)

    An infinite clip_low and clip_high switch the clip off. The gradient flows through ``log_prob``
    only. Metrics: ratio_mean, ratio_dev (the maximum of |r - 1|), clip_frac (elements where a clip
    binds). Raises ValueError for unequal shapes.
    """
    if not log_prob.shape == old_log_prob.shape == advantage.shape:
        shapes = [tuple(t.shape) for t in (log_prob, old_log_prob, advantage)]
        raise ValueError(
            f"log_prob, old_log_prob and advantage must have equal shapes, got {shapes}"
        )
    # The old policy is a constant.
    log_ratio = widen(log_prob) - widen(old_log_prob).detach()
    objective, metrics = _surrogate(
        log_ratio,
        advantage,
        torch.ones_like(log_ratio, dtype=torch.bool),
        clip_low=clip_low,
        clip_high=clip_high,
    )
    return LossOutput(-objective.mean(), metrics)


def token_surrogate(
    log_prob_BL: Tensor,
    old_log_prob_BL: Tensor,
    advantage_B1: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    mask: Tensor,
    count: Tensor | float,
    dual_clip: float | None = None,
) -> LossOutput:
    """`clipped_surrogate` over text tokens: SUM over the mask / count, equal weight per token.

        loss = -sum_mask[ min(r A, clip(r) A) ] / count                (DAPO 2503.14476, equation 8)

    Log-probs and mask are (B, L); the advantage is (B, 1) or (B, L). Values outside the mask are
    ignored. ``count`` is the global number of tokens, see the head of this file.
    ``dual_clip`` c > 1 bounds the term of a negative advantage by c A (dual-clip PPO
    1912.09729, equation 5). Metrics go over the mask of this call. Raises ValueError for unfit
    shapes or a count <= 0.
    """
    if not log_prob_BL.shape == old_log_prob_BL.shape == mask.shape:
        shapes = [tuple(t.shape) for t in (log_prob_BL, old_log_prob_BL, mask)]
        raise ValueError(
            f"log_prob, old_log_prob and mask must have equal shapes, got {shapes}"
        )
    if advantage_B1.shape not in (log_prob_BL.shape, (*log_prob_BL.shape[:-1], 1)):
        raise ValueError(
            f"advantage {tuple(advantage_B1.shape)} must be (B, 1) or {tuple(log_prob_BL.shape)}"
        )
    mask = mask.bool()
    # outside the mask log-probs may be NaN; 0 keeps exp and its gradient finite there
    log_ratio = torch.where(
        mask, widen(log_prob_BL) - widen(old_log_prob_BL).detach(), 0.0
    )
    advantage = torch.where(mask, advantage_B1, 0.0)
    objective, metrics = _surrogate(
        log_ratio,
        advantage,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    return LossOutput(-masked_mean(objective, mask, count=count), metrics)


def k3_kl(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """KL(p || ref) per element: exp(d) - 1 - d with d = log ref - log p.

    It is unbiased under samples of p and never negative (J. Schulman, Approximating KL divergence,
    2020; GRPO 2402.03300, equation 4).
    """
    # expm1 keeps the digits of a small d.
    d = widen(ref_log_prob) - widen(log_prob)
    return torch.expm1(d) - d


def masked_mean(
    x: Tensor,
    mask: Tensor,
    *,
    count: Tensor | float | None = None,
) -> Tensor:
    """SUM of x over the mask / count -> scalar; count defaults to the size of the mask, 1 at least.

    x outside the mask is ignored, so NaN may stand there. An empty mask gives 0 with a zero
    gradient. Raises ValueError for unequal shapes or a count <= 0.
    """
    if x.shape != mask.shape:
        raise ValueError(
            f"x {tuple(x.shape)} and mask {tuple(mask.shape)} must have equal shapes"
        )
    # Divide by the given count, or by the mask's size.
    mask = mask.bool()
    if count is None:
        count = mask.sum().clamp(min=1)
    elif not float(count) > 0.0:
        raise ValueError(f"count must be > 0, got {float(count)}")
    return torch.where(mask, x, 0.0).sum() / count


class _Centred(NamedTuple):
    # R - mean over members with a finite reward, 0 for the other members
    value_PG: Tensor
    std_P: Tensor


def _centre(reward_PG: Tensor, correction: int = 0) -> _Centred:
    """Centre every row over its finite rewards, in fp64: equal rewards have no spread."""
    if reward_PG.dim() != 2:
        raise ValueError(f"reward must be (P, G), got shape {tuple(reward_PG.shape)}")
    # Mean over the members that have a reward.
    finite_PG = reward_PG.isfinite()
    reward_PG = torch.where(finite_PG, reward_PG.detach().double(), 0.0)
    # A row without any finite reward has mean 0.
    count_P1 = finite_PG.sum(dim=1, keepdim=True)
    mean_P1 = reward_PG.sum(dim=1, keepdim=True) / count_P1.clamp(min=1)

    # Spread is found by comparison: the mean of three times 0.1 is not 0.1, and eps would amplify
    # the rounding. A row with fewer than two finite rewards has no spread either.
    low_P1 = torch.where(finite_PG, reward_PG, torch.inf).amin(dim=1, keepdim=True)
    high_P1 = torch.where(finite_PG, reward_PG, -torch.inf).amax(dim=1, keepdim=True)
    usable_PG = finite_PG & (high_P1 > low_P1)
    value_PG = torch.where(usable_PG, reward_PG - mean_P1, 0.0)
    divisor_P = (count_P1.squeeze(1) - correction).clamp(min=1)
    std_P = (value_PG.square().sum(dim=1) / divisor_P).sqrt()
    return _Centred(value_PG, std_P)


def _surrogate(
    log_ratio: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Per element the objective to maximise, and metrics: MEAN over the mask, ratio_dev the max."""
    advantage = advantage.detach()
    ratio = log_ratio.exp()

    # PPO's clip
    plain = ratio * advantage
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage
    objective = torch.minimum(plain, clipped)
    bound = clipped < plain

    # the second clip, for negative advantages
    if dual_clip is not None:
        floor = torch.where(advantage < 0.0, dual_clip * advantage, -torch.inf)
        bound = bound | (floor > objective)
        objective = torch.maximum(objective, floor)

    # Metrics carry no gradient.
    ratio = ratio.detach()
    # an empty tensor has no maximum
    deviation = 0.0
    if mask.numel():
        deviation = float(torch.where(mask, (ratio - 1.0).abs(), 0.0).max())
    return objective, {
        "ratio_mean": float(masked_mean(ratio, mask)),
        "ratio_dev": deviation,
        "clip_frac": float(masked_mean(bound.to(ratio.dtype), mask)),
    }
