"""Losses of the reward: tensors and numbers in, `LossOutput` out. fp32 inside."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.types import LossOutput


def bradley_terry(
    win_N: Tensor,
    lose_N: Tensor,
    *,
    tie_N: Tensor | None = None,
    theta: float | None = None,
    margin: float = 0.0,
    count: float | None = None,
) -> LossOutput:
    """Negative log-likelihood of preferences, MEAN over the pairs that carry a preference. d = win - lose, (N,).

    Without theta (Bradley-Terry; DeScore 2605.05922 Eq. 3):
        decided: -log sig(d - margin);   a tie says nothing, it adds 0 and is NOT counted.
    With theta > 1 (with ties, Rao and Kupper; VideoAlign 2501.13918 Eq. 1-2 has theta = 5):
        decided: -log sig(d - log theta)
        tie:     -log sig(d - log theta) - log sig(-d - log theta) - log(theta^2 - 1);   every pair is counted.

    tie_N  bool, True where nobody won (the order of win and lose is then free)
    count  what the SUM is divided by, when the batch is cut in pieces: the number of counted pairs in all pieces of
           all ranks. Default: those in this call, at least 1, so a batch of ties is 0 and not NaN.

    Metrics: accuracy (d > 0; equal counts as wrong) and margin, MEAN over decided pairs; absent if there is none.
    ValueError for unequal shapes, theta <= 1, a margin beside theta, or count <= 0.
    """
    if win_N.shape != lose_N.shape or win_N.dim() != 1:
        raise ValueError(
            f"bradley_terry needs two (N,) tensors, got {tuple(win_N.shape)} and {tuple(lose_N.shape)}"
        )
    tie_N = torch.zeros_like(win_N, dtype=torch.bool) if tie_N is None else tie_N
    if tie_N.shape != win_N.shape or tie_N.dtype != torch.bool:
        raise ValueError(
            f"tie_N must be bool {tuple(win_N.shape)}, got {tie_N.dtype} {tuple(tie_N.shape)}"
        )
    if theta is not None and theta <= 1.0:
        raise ValueError(
            f"theta={theta} must be above 1, where a tie has no probability"
        )
    if theta is not None and margin:
        raise ValueError(
            f"margin={margin} beside theta={theta}, which is a margin itself"
        )
    if count is not None and count <= 0:
        raise ValueError(f"count={count} must be positive")
    margin_N = (
        win_N.float() - lose_N.float()
        if win_N.dtype != torch.float64
        else win_N - lose_N
    )

    if theta is None:
        loss_N = (-F.logsigmoid(margin_N - margin)).masked_fill(tie_N, 0.0)
        counted = int((~tie_N).sum())
    else:
        shift = math.log(theta)
        decided_N = -F.logsigmoid(margin_N - shift)
        tied_N = decided_N - F.logsigmoid(-margin_N - shift) - math.log(theta**2 - 1.0)
        loss_N = torch.where(tie_N, tied_N, decided_N)
        counted = tie_N.numel()
    return LossOutput(
        loss_N.sum() / (max(counted, 1) if count is None else count),
        _metrics(margin_N[~tie_N].detach()),
    )


def preference_loss(
    reward_N2K: Tensor,
    label_NK: Tensor,
    *,
    weight_K: Sequence[float],
    theta: float | None = None,
    margin: float = 0.0,
    count_K: Sequence[float] | None = None,
) -> Tensor:
    """SUM over dimensions k of weight_k x `bradley_terry` of the rewards of (A, B) in dimension k.

    label_NK  1 (A is better), -1 (B), 0 (a tie), NaN (nobody said: not counted)
    count_K   what each dimension's SUM is divided by, see `bradley_terry` and `counted`
    """
    terms = []
    for k, weight in enumerate(weight_K):
        known_N = ~label_NK[:, k].isnan()
        label_M, (a_M, b_M) = label_NK[known_N, k], reward_N2K[known_N, :, k].unbind(1)
        win_M, lose_M = (
            torch.where(label_M >= 0, a_M, b_M),
            torch.where(label_M >= 0, b_M, a_M),
        )
        count = None if count_K is None else count_K[k]
        found = bradley_terry(
            win_M, lose_M, tie_N=label_M == 0, theta=theta, margin=margin, count=count
        )
        terms.append(weight * found.loss)
    return torch.stack(terms).sum()


def counted(label_NK: Tensor, *, theta: float | None) -> Tensor:
    """(K,) pairs that carry a preference in each dimension: those with a label, ties only where theta counts them."""
    says_NK = ~label_NK.isnan() & ((label_NK != 0) | (theta is not None))
    return says_NK.sum(0)


def _metrics(margin_N: Tensor) -> dict[str, float]:
    if not margin_N.numel():
        return {}
    return {
        "accuracy": (margin_N > 0).float().mean().item(),
        "margin": margin_N.mean().item(),
    }
