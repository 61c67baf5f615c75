"""The losses of training on given videos: Flow-DPO, Flow-RWR and plain fine-tuning. All are made of flow errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F

from common.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

BetaSchedule = Literal["constant", "quadratic"]


def beta_at(sigma_N: Tensor, *, beta: float, schedule: BetaSchedule) -> Tensor:
    """(N,): beta, or beta (1 - sigma)^2, which follows from Diffusion-DPO because |eps - eps'|^2 = (1 - sigma)^2
    |v - v'|^2 and constrains least where noise is strongest (Flow-DPO 2501.13918, after equation 6).
    """
    if schedule == "constant":
        return torch.full_like(sigma_N, beta)
    return beta * (1 - sigma_N).square()


class DpoTerms(NamedTuple):
    """Of each pair, (N,): its loss, and by how much its winner's and its loser's error differ from the reference's."""

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
    """Flow-DPO (2501.13918, equation 6), pair by pair:

        d_w  = chosen - reference_chosen,  d_l = rejected - reference_rejected
        loss = -log sigmoid( -(beta / 2) (d_w - d_l) )

    Every error is (N,), |v_theta(x_sigma) - (eps - x_0)|^2 as the MEAN over latent elements, of winner and loser at the
    SAME sigma and eps (`Generator.flow_error`); beta is in these units, where the paper's pseudo-code has a sum. At the
    start d_w = d_l = 0 and the loss is log 2. Gradient flows through chosen_N and rejected_N.
    """
    chosen_change_N, rejected_change_N = (
        chosen_N - reference_chosen_N.detach(),
        rejected_N - reference_rejected_N.detach(),
    )
    return DpoTerms(
        -F.logsigmoid(-0.5 * beta_N * (chosen_change_N - rejected_change_N)),
        chosen_change_N,
        rejected_change_N,
    )


def flow_dpo_loss(
    chosen_N: Tensor,
    rejected_N: Tensor,
    reference_chosen_N: Tensor,
    reference_rejected_N: Tensor,
    *,
    beta_N: Tensor,
) -> LossOutput:
    """`flow_dpo_terms`' loss, MEAN over pairs.

    Metrics: loss, accuracy (share of pairs with d_w < d_l, a tie one half), chosen_change and rejected_change (mean d_w, d_l),
    push (mean |beta / 2 (d_w - d_l)|: the sigmoid is flat far above 3).
    """
    terms = flow_dpo_terms(
        chosen_N, rejected_N, reference_chosen_N, reference_rejected_N, beta_N=beta_N
    )
    loss = terms.loss_N.mean()
    ahead_N = (terms.rejected_change_N - terms.chosen_change_N).detach()
    metrics = {
        "loss": float(loss.detach()),
        "accuracy": float(
            (ahead_N > 0).float().mean() + 0.5 * (ahead_N == 0).float().mean()
        ),
        "chosen_change": float(terms.chosen_change_N.detach().mean()),
        "rejected_change": float(terms.rejected_change_N.detach().mean()),
        "push": float((0.5 * beta_N * ahead_N).abs().mean()),
    }
    return LossOutput(loss, metrics)


def rwr_weights(value: Tensor, *, temperature: float) -> Tensor:
    """exp(r / temperature) over its MEAN, for all videos of a data set: weights that average to 1.

    Raises ValueError for a value that is not finite: what nobody judged has no weight.
    """
    if not bool(value.isfinite().all()):
        raise ValueError(
            f"rwr_weights needs finite rewards, {int((~value.isfinite()).sum())} of {value.numel()} are not"
        )
    weight = (value.double() / temperature).softmax(dim=0) * value.numel()
    return weight.float()
