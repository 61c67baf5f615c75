"""The losses of training on pairs: Flow-DPO, Flow-RWR and supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

BetaSchedule = Literal["constant", "quadratic"]


def beta_at(sigma_N: Tensor, *, beta: float, schedule: BetaSchedule) -> Tensor:
    """Return beta, or beta (1 - sigma)^2 for the quadratic schedule, (N,).

    The quadratic schedule follows from Diffusion-DPO because |eps - eps'|^2 =
    (1 - sigma)^2 |v - v'|^2. It constrains least where the noise is strongest (Flow-DPO
    2501.13918, after equation 6).
    """
    if schedule == "constant":
        return torch.full_like(sigma_N, beta)
    # 1 at sigma = 0, 0 at pure noise
    return beta * (1 - sigma_N).square()


class DpoTerms(NamedTuple):
    """The loss of each pair, and the change of its flow errors against the reference, (N,).

    The changes are NaN for methods that compute no reference.
    """

    loss_N: Tensor
    chosen_change_N: Tensor
    rejected_change_N: Tensor


def flow_dpo_terms(
    chosen_N: Tensor,
    rejected_N: Tensor,
    reference_chosen_N: Tensor,
    reference_rejected_N: Tensor,
    *,
    beta_N: Tensor,
) -> DpoTerms:
    """Flow-DPO's loss of each pair (2501.13918, equation 6).

        d_c  = chosen - reference_chosen,  d_r = rejected - reference_rejected
        loss = -log sigmoid( -(beta / 2) (d_c - d_r) )

    Every error is (N,), |v_theta(x_sigma) - (eps - x_0)|^2 as the MEAN over latent elements,
    of the chosen and the rejected video at the SAME sigma and eps (`Generator.flow_error`).
    beta is in these units, where the paper's pseudo-code has a sum. At the start
    d_c = d_r = 0 and the loss is log 2. Gradient flows through chosen_N and rejected_N.
    """
    # how far each error moved from the reference's
    chosen_change_N = chosen_N - reference_chosen_N.detach()
    rejected_change_N = rejected_N - reference_rejected_N.detach()
    loss_N = -F.logsigmoid(-0.5 * beta_N * (chosen_change_N - rejected_change_N))
    return DpoTerms(loss_N, chosen_change_N, rejected_change_N)


def rwr_weights(value: Tensor, *, temperature: float) -> Tensor:
    """Return exp(value / temperature) over its MEAN, for all videos of a data set.

    The weights average to 1. Raises ValueError for a value that is not finite: a video without
    a score has no weight.
    """
    unscored = int((~value.isfinite()).sum())
    if unscored:
        raise ValueError(
            "rwr_weights needs a finite reward for every video, "
            f"{unscored} of {value.numel()} have none"
        )
    # softmax divides by the sum: times the number of videos it divides by the mean
    weight = (value.double() / temperature).softmax(dim=0) * value.numel()
    return weight.float()
