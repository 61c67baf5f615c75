"""GRPO's losses: tensors and numbers in, `LossOutput` out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from common.distributed import max_over_ranks, mean_over_ranks, sum_over_ranks
from common.gaussian import SINGULAR_GAP
from common.policy_gradient import clipped_surrogate
from common.types import LossOutput
from common.updates import all_ranks

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import Step


Reweight = Literal["none", "finite", "paper", "unit"]


@dataclass(frozen=True)
class TrustRegion:
    """How far the policy of now is from the one that sampled, and how far it may go.

    With x' = mu_old + std xi of a member,

        log r = mean(xi (mu - mu_old)) / std - D,

    so that r leans below 1 by D, while the other part shrinks with the number of elements:
    at the size of a video nearly every r is below 1, and a clip binds for negative advantages
    only. A normalized ratio has no such bias (GRPO-Guard 2510.22319):

        rho = exp(std (log r + D)) = exp( mean(xi (mu - mu_old)) ),   loss / std

    where the division gives the first update the gradient of the plain ratio. With a
    ``divergence_clip`` the term of a member is 0 where D >= divergence_clip and
    A (log r + D) > 0 (Flow-DPPO 2606.11025, with the unbiased sign).

    divergence_M     D = mean( (mu - mu_old)^2 ) / (2 std^2), `common.gaussian.kl_same_std` of the
                     transition of now and the one that sampled, with gradient
    std              the noise of the step
    normalized       the ratio is rho
    divergence_clip  the largest D at which a member may move the policy further; None for none
    """

    divergence_M: Tensor
    std: float
    normalized: bool = False
    divergence_clip: float | None = None


class StepWeights(NamedTuple):
    """Factors that give both GRPO terms the same size at every noise level."""

    policy: float
    kl: float


def step_weights(
    std: float,
    *,
    sigma: float,
    sigma_next: float,
    gain: float,
    form: Reweight = "finite",
) -> StepWeights:
    """Compute lambda_policy, and lambda_KL = its square, with delta = sigma - sigma_next.

    finite  std / delta. LongCat-Video 2510.22200, equations 6 to 8, with the truncated noise:
            the policy term then pushes the velocity by c~ A xi, with c~ from 3/2 where nothing
            is truncated to 1 at sigma = 1 (issue 80 of its repository).
    paper   sqrt(sigma / (delta (1 - sigma))), as those equations stand, for noise that is not
            truncated. With truncated noise the push grows without bound towards sigma = 1
            (327 times at 1 - 1e-6), where this form raises ValueError.
    unit    std / gain: the push is A xi at every step and for every kernel (Flash-GRPO
            2605.15980, rectification).
    none    1: the push is gain / std, which vanishes towards pure noise.

    std and gain of a step include its truncation, so no sampler setting is needed. Raises
    ValueError unless sigma > sigma_next, std > 0 and gain > 0.
    """
    # sampling walks sigma down
    delta = sigma - sigma_next
    if not delta > 0.0 or not std > 0.0 or not gain > 0.0:
        raise ValueError(
            "step_weights needs sigma > sigma_next, std > 0 and gain > 0, "
            f"got {sigma}, {sigma_next}, {std} and {gain}"
        )
    if form == "none":
        return StepWeights(1.0, 1.0)
    if form == "paper":
        # so close to 1 the paper's weights are infinite
        if 1.0 - sigma < SINGULAR_GAP:
            raise ValueError(
                f"reweight=paper has infinite weights at sigma={sigma}: "
                "start the stochastic steps later, or use reweight=finite"
            )
        policy = math.sqrt(sigma / (delta * (1.0 - sigma)))
    elif form == "finite":
        policy = std / delta
    else:
        policy = std / gain
    return StepWeights(policy, policy**2)


def weights_of_steps(
    steps: Sequence[Step], *, form: Reweight, normalize: bool
) -> list[StepWeights]:
    """Compute the `step_weights` of stochastic steps, in order. All ranks must call this.

    With ``normalize`` they are divided by their MEAN over the steps of all ranks.
    """
    weights = []
    for step in steps:
        weight = step_weights(
            step.std,
            sigma=step.sigma,
            sigma_next=step.sigma_next,
            gain=step.gain,
            form=form,
        )
        weights.append(weight)
    if not normalize:
        return weights
    # sums over ranks, because ranks may hold different steps
    count = sum_over_ranks(len(weights))
    policy = sum_over_ranks(sum(weight.policy for weight in weights)) / count
    kl = sum_over_ranks(sum(weight.kl for weight in weights)) / count
    return [StepWeights(weight.policy / policy, weight.kl / kl) for weight in weights]


def grpo_group_loss(
    log_prob_G: Tensor,
    old_log_prob_G: Tensor,
    advantage_G: Tensor,
    kl: Tensor | None,
    *,
    policy_weight: float,
    kl_weight_scaled: float,
    clip_low: float | None = None,
    clip_high: float | None = None,
    on_policy: bool = False,
    trust: TrustRegion | None = None,
) -> LossOutput:
    """GRPO's loss of one group at one stochastic step; MEAN over members.

        r_g  = exp(log_prob_g - old_log_prob_g)
        loss = lambda_policy * -mean_g[ min(r_g A_g, clip(r_g, 1 - low, 1 + high) A_g) ]
               + beta lambda_KL * KL

    (LongCat-Video 2510.22200, equation 8, as a loss to minimise.) With s the diffusion
    coefficient of the step, xi_g the noise of member g and
    c~ = 1 + s^2 (1 - sigma) / (2 sigma), at r = 1 and with the weights of `step_weights`

        d loss = c~ mean_g[ A_g mean(xi_g dv) ]  +  beta c~^2 mean( (v - v_ref) dv )

    where the inner means go over latent elements, as in `common.gaussian`. policy_weight is
    lambda_policy, and kl_weight_scaled is beta lambda_KL. A member without a score has
    advantage 0 and still counts in the mean, so that every group has the same weight.
    log-probs and advantages are (G,); kl is (M,), with M = 1 for members that share their
    transition, and its MEAN is taken; None for no KL term. Clips of None never bind. Gradient
    flows through log_prob_G and kl.

    With ``on_policy`` the old log-prob in the loss is log_prob_G, detached, and r = 1 by
    construction: for the first update on a rollout, whose policy is the policy of now.

    ``trust`` is for later updates, see `TrustRegion`; the metrics then have old_kl (D) and the
    numbers of members that `trust_metrics` reads.

    Metrics: loss, kl (the plain KL, unweighted), ratio_mean, ratio_dev (max |r - 1|), clip_frac.
    The ratios are always to ``old_log_prob_G``: on-policy they show whether the rollout and the
    update compute the same transition.
    """
    # the ratios to what the rollout recorded
    replay = clipped_surrogate(
        log_prob_G.detach(),
        old_log_prob_G,
        advantage_G,
        clip_low=math.inf,
        clip_high=math.inf,
    )

    # the policy term
    clip_low = math.inf if clip_low is None else clip_low
    clip_high = math.inf if clip_high is None else clip_high
    counts = {}
    if trust is None:
        surrogate = clipped_surrogate(
            log_prob_G,
            log_prob_G if on_policy else old_log_prob_G,
            advantage_G,
            clip_low=clip_low,
            clip_high=clip_high,
        )
    else:
        log_ratio_G = log_prob_G - old_log_prob_G
        surrogate = _trusted_surrogate(
            log_ratio_G, advantage_G, trust, clip_low=clip_low, clip_high=clip_high
        )
        counts = surrogate.metrics
    loss = policy_weight * surrogate.loss
    metrics = {
        "ratio_mean": replay.metrics["ratio_mean"],
        "ratio_dev": replay.metrics["ratio_dev"],
        "clip_frac": surrogate.metrics["clip_frac"],
    }

    # the KL to the reference policy
    if kl is not None:
        loss = loss + kl_weight_scaled * kl.mean()
        metrics["kl"] = float(kl.detach().mean())
    return LossOutput(loss, {"loss": float(loss.detach()), **counts, **metrics})


def _trusted_surrogate(
    log_ratio_G: Tensor,
    advantage_G: Tensor,
    trust: TrustRegion,
    *,
    clip_low: float,
    clip_high: float,
) -> LossOutput:
    """Compute the policy term within a `TrustRegion`, and count members by sign of advantage."""
    # 1. The ratio that the clips bound.
    unbiased_G = log_ratio_G + trust.divergence_M
    bounded_G = trust.std * unbiased_G if trust.normalized else log_ratio_G

    # 2. Members that would move the policy further than the divergence allows.
    outside_G = torch.zeros_like(advantage_G, dtype=torch.bool)
    if trust.divergence_clip is not None:
        further_G = advantage_G * unbiased_G.detach() > 0.0
        outside_G = further_G & (trust.divergence_M.detach() >= trust.divergence_clip)

    # 3. PPO's term of the others; the MEAN goes over all members.
    kept_G = torch.where(outside_G, 0.0, advantage_G)
    surrogate = clipped_surrogate(
        bounded_G,
        torch.zeros_like(bounded_G),
        kept_G,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    loss = surrogate.loss / trust.std if trust.normalized else surrogate.loss

    # 4. Which members are above 1, and which are held back, by the sign of their advantage.
    ratio_G = bounded_G.detach().exp()
    held_G = {
        "positive": outside_G | (ratio_G > 1.0 + clip_high),
        "negative": outside_G | (ratio_G < 1.0 - clip_low),
    }
    metrics = {
        "clip_frac": surrogate.metrics["clip_frac"],
        "old_kl": float(trust.divergence_M.detach().mean()),
        "members": float(len(advantage_G)),
    }
    for sign, of_sign_G in (
        ("positive", advantage_G > 0.0),
        ("negative", advantage_G < 0.0),
    ):
        metrics[sign] = float(of_sign_G.sum())
        metrics[f"above_{sign}"] = float((of_sign_G & (ratio_G > 1.0)).sum())
        metrics[f"held_{sign}"] = float((of_sign_G & held_G[sign]).sum())
    return LossOutput(loss, metrics)


def trust_metrics(outputs: Sequence[LossOutput]) -> dict[str, float]:
    """Metrics of a later update on a rollout, over the members of all ranks.

    old_kl            MEAN over backwards of D, the divergence from the policy that sampled
    ratio_above_SIGN  share of ratios above 1 among members of positive or negative advantage,
                      NaN without such members
    clip_frac_high, clip_frac_low  share of all members that are held back, by their positive
                      or negative advantage

    All ranks must call this.
    """
    # the numbers of members, and D, over all backwards
    sums = {"backwards": float(len(outputs))}
    for output in outputs:
        for name, value in output.metrics.items():
            sums[name] = sums.get(name, 0.0) + value
    totals = all_ranks(sums)
    # shares of each sign, and of all members
    metrics = {"train/old_kl": totals["old_kl"] / totals["backwards"]}
    for sign in ("positive", "negative"):
        share = math.nan
        if totals[sign]:
            share = totals[f"above_{sign}"] / totals[sign]
        metrics[f"train/ratio_above_{sign}"] = share
    metrics["train/clip_frac_high"] = totals["held_positive"] / totals["members"]
    metrics["train/clip_frac_low"] = totals["held_negative"] / totals["members"]
    return metrics


def update_metrics(
    outputs: Sequence[LossOutput], grad_norm: float | Tensor | None
) -> dict[str, float]:
    """MEAN over the backwards of all ranks, except ratio_max_dev, which is the maximum.

    All ranks must call this.
    """
    means = {} if grad_norm is None else {"train/grad_norm": float(grad_norm)}
    # means over this rank's backwards
    for key in ("kl", "loss", "ratio_mean", "clip_frac"):
        if key in outputs[0].metrics:
            total = sum(output.metrics[key] for output in outputs)
            means[f"train/{key}"] = total / len(outputs)
    # the largest, since a mean would hide it
    deviation = max(output.metrics["ratio_dev"] for output in outputs)
    return {**mean_over_ranks(means), "train/ratio_max_dev": max_over_ranks(deviation)}
