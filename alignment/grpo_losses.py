"""GRPO's losses: tensors and numbers in, `LossOutput` out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from common.distributed import max_over_ranks, mean_over_ranks, sum_over_ranks
from common.gaussian import SINGULAR_GAP
from common.policy_gradient import clipped_surrogate
from common.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import Step


Reweight = Literal["none", "finite", "paper", "unit"]


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
    surrogate = clipped_surrogate(
        log_prob_G,
        log_prob_G if on_policy else old_log_prob_G,
        advantage_G,
        clip_low=math.inf if clip_low is None else clip_low,
        clip_high=math.inf if clip_high is None else clip_high,
    )
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
    return LossOutput(loss, {"loss": float(loss.detach()), **metrics})


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
