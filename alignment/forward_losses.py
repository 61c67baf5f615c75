"""Losses of forward objectives: flow matching on a policy's videos, by their advantages.

Of a video only its clean latent x_0 is used. With eps ~ N(0, 1) and a noise level s,

    x_s = (1 - s) x_0 + s eps,   v = eps - x_0,   v_theta = the policy's velocity at (x_s, s),

and v_old is that of the policy that sampled. A video of advantage A > 0 is fitted, one of A < 0
is repelled. No transition has to have a density, so that any solver may sample.

MEAN over latent elements gives a number per sample, and MEAN over samples the loss. Velocities
are (B, ...), sigma_B and advantage_B are (B,); everything is fp32 or better.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from common.gaussian import widen
from common.policy_gradient import clipped_surrogate
from common.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]

# The smallest divisor of an adaptive weight.
LEAST_ERROR = 1e-5
# Exponent of "ghuber", and what keeps its slope finite at 0.
POWER = 0.25
TINY = 1e-10


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    target: Tensor,
    sigma_B: Tensor,
    advantage_B: Tensor,
    *,
    beta: float,
    advantage_clip: float,
    adaptive_weight: bool = True,
) -> LossOutput:
    """DiffusionNFT (2509.16117, as its release computes it); MEAN over samples.

        r   = 1/2 + clip(A, -m, m) / (2 m)                       m = advantage_clip
        v+  = beta v_theta + (1 - beta) v_old                    the policy to imitate
        v-  = (1 + beta) v_old - beta v_theta                    the policy to avoid
        e+- = mean( (x0+- - x_0)^2 ),  x0+- = x_s - s v+-, so that x0+- - x_0 = s (v - v+-)
        w+- = max( mean|x0+- - x_0|, 1e-5 ), a constant          1 without ``adaptive_weight``
        L   = m / beta [ r e+ / w+  +  (1 - r) e- / w- ]

    Without the weights, e = v_old - v and d = v_theta - v_old,

        L / m = s^2 [ mean(e^2) / beta + 2 (2 r - 1) mean(e d) + beta mean(d^2) ]:

    the middle term is advantage weighted matching, the last holds the policy to v_old. At
    v_theta = v_old the gradient does not depend on beta.
    """
    # how much a sample is to be imitated
    share_B = 0.5 + advantage_B.clamp(-advantage_clip, advantage_clip) / (
        2 * advantage_clip
    )
    v_old = v_old.detach()
    imitated = beta * v + (1 - beta) * v_old
    avoided = (1 + beta) * v_old - beta * v

    # errors of the implied clean latents
    terms = []
    for velocity in (imitated, avoided):
        error = _per_sample(sigma_B, v) * (widen(velocity) - widen(target))
        error_B = _mean(error.square())
        if adaptive_weight:
            # in fp64, as the release does: the mean of a large latent's absolute errors
            weight_B = _mean(error.detach().double().abs()).clamp(min=LEAST_ERROR)
            error_B = error_B / weight_B
        terms.append(error_B)
    # imitate the one, avoid the other
    loss_B = share_B * terms[0] + (1 - share_B) * terms[1]
    loss = (advantage_clip / beta * loss_B).mean()
    return LossOutput(loss.to(v.dtype), _distance(v, v_old, target))


def awm_loss(
    v: Tensor,
    v_old: Tensor,
    target: Tensor,
    sigma_B: Tensor,
    advantage_B: Tensor,
    *,
    weighting: Weighting,
    clip_low: float | None = None,
    clip_high: float | None = None,
    proximal_weight: float = 0.0,
) -> LossOutput:
    """Advantage weighted matching (AWM, 2509.25050); MEAN over samples.

        l    = -f( mean( (v_theta - v)^2 ), s ),   ratio = exp(l - l_old)
        loss = -min( ratio A, clip(ratio, 1 - low, 1 + high) A )
               + proximal_weight mean( (v_theta - v_old)^2 )

    f is `matching_error`. Where v_theta = v_old the ratio is 1 and its gradient that of A f.
    Clips of None never bind. Metrics: those of `nft_loss` and clip_frac.
    """
    v_old = v_old.detach()
    # log-likelihoods up to a constant are the negated errors
    errors_B = []
    for velocity in (v, v_old):
        mse_B = _mean((widen(velocity) - widen(target)).square())
        errors_B.append(matching_error(mse_B, sigma_B.to(mse_B), weighting=weighting))
    surrogate = clipped_surrogate(
        -errors_B[0],
        -errors_B[1],
        advantage_B.to(errors_B[0]),
        clip_low=math.inf if clip_low is None else clip_low,
        clip_high=math.inf if clip_high is None else clip_high,
    )
    # an old policy that is an average pulls the policy back
    proximal = _mean((widen(v) - widen(v_old)).square()).mean()
    metrics = {
        **_distance(v, v_old, target),
        "clip_frac": surrogate.metrics["clip_frac"],
    }
    return LossOutput(surrogate.loss + proximal_weight * proximal, metrics)


def dgpo_loss(
    v: Tensor,
    v_ref: Tensor,
    target: Tensor,
    advantage_B: Tensor,
    *,
    beta: float,
) -> LossOutput:
    """Direct group preference optimization (DGPO, ICLR 2026) of ONE whole group.

        e    = mean( (v_theta - v)^2 ),   e_ref the same of the reference policy
        S    = beta mean_B( A (e - e_ref) )                      a constant
        loss = sigmoid(S) mean_B( A e )

    Samples share their noise and level. S < 0 where the policy prefers the group's good videos
    already: sigmoid(S) lets go of it. For two videos with A = 1 and -1, beta times its gradient
    is that of `alignment.dpo_losses.flow_dpo_terms`, -log sigmoid(-S), at the same beta.
    (Luo-Yihong/DGPO; Flow-Factory's dgpo, without its clip, which never binds on-policy.)
    """
    error_B = _mean((widen(v) - widen(target)).square())
    reference_B = _mean((widen(v_ref.detach()) - widen(target)).square())
    advantage_B = advantage_B.to(error_B)
    # one weight for the group, without gradient
    lead = (advantage_B * (error_B.detach() - reference_B)).mean()
    weight = (beta * lead).sigmoid()
    loss = weight * (advantage_B * error_B).mean()
    return LossOutput(
        loss,
        {
            "flow_error": float(error_B.detach().mean()),
            "group_weight": float(weight),
        },
    )


def matching_error(mse_B: Tensor, sigma_B: Tensor, *, weighting: Weighting) -> Tensor:
    """Weight the flow-matching error of each sample by its noise level -> (B,).

    uniform  mse                t  s mse               t2  s^2 mse, the error of x_0
    huber    s sqrt(mse)        ghuber  s / p [(mse + 1e-10)^p - 1e-10^p],  p = 1/4

    (2509.25050, release; its default is ghuber, whose slope s mse^(-3/4) has the part of
    DiffusionNFT's adaptive weight.)
    """
    if weighting == "uniform":
        return mse_B
    if weighting == "t":
        return sigma_B * mse_B
    if weighting == "t2":
        return sigma_B.square() * mse_B
    if weighting == "huber":
        return sigma_B * (mse_B + TINY).sqrt()
    return sigma_B / POWER * ((mse_B + TINY) ** POWER - TINY**POWER)


def _distance(v: Tensor, v_old: Tensor, target: Tensor) -> dict[str, float]:
    """flow_error and old_distance: MEAN squares of v_theta - v and of v_theta - v_old."""
    v = widen(v.detach())
    error_B = _mean((v - widen(target)).square())
    distance_B = _mean((v - widen(v_old)).square())
    return {
        "flow_error": float(error_B.mean()),
        "old_distance": float(distance_B.mean()),
    }


def _mean(value: Tensor) -> Tensor:
    """MEAN over all dimensions but the first -> (B,)."""
    return value.flatten(1).mean(dim=1)


def _per_sample(value_B: Tensor, like: Tensor) -> Tensor:
    """Shape a number per sample so that it multiplies ``like`` (B, ...)."""
    return value_B.to(like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))
