"""Preference losses of the reward model: tensors and numbers in, loss out, fp32 inside."""

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
    """Negative log-likelihood of preferences, MEAN over the counted pairs.

    With d = win - lose, and without theta (Bradley-Terry; DeScore 2605.05922, equation 3):
        decided: -log sig(d - margin);   a tie adds 0 and is NOT counted.
    With theta > 1 (ties by Rao and Kupper; VideoAlign 2501.13918, equations 1 and 2):
        decided: -log sig(d - log theta)
        tie:     -log sig(d - log theta) - log sig(-d - log theta) - log(theta^2 - 1)
        and every pair is counted.

    tie_N  bool; where it is True, the order of chosen and rejected is free.
    count  The divisor of the SUM when a batch is cut into micro-batches: the counted pairs
           over all micro-batches and ranks. By default the counted pairs of this call, at
           least 1, so that a batch of ties gives 0 and not NaN.

    Metrics: accuracy (d > 0) and margin, MEAN over decided pairs; absent if there is none.
    Raises ValueError for unequal shapes, theta <= 1, a margin with theta, or count <= 0.
    """
    if win_N.shape != lose_N.shape or win_N.dim() != 1:
        raise ValueError(
            "bradley_terry needs two (N,) tensors, "
            f"got {tuple(win_N.shape)} and {tuple(lose_N.shape)}"
        )
    if tie_N is None:
        tie_N = torch.zeros_like(win_N, dtype=torch.bool)
    if tie_N.shape != win_N.shape or tie_N.dtype != torch.bool:
        raise ValueError(
            f"tie_N must be bool {tuple(win_N.shape)}, got {tie_N.dtype} {tuple(tie_N.shape)}"
        )
    if theta is not None and theta <= 1.0:
        raise ValueError(
            f"theta={theta} must be above 1; at 1 a tie has no probability"
        )
    if theta is not None and margin:
        raise ValueError(f"margin={margin} and theta={theta} exclude each other")
    if count is not None and count <= 0:
        raise ValueError(f"count={count} must be positive")

    # fp32 at least; double inputs stay double.
    if win_N.dtype != torch.float64:
        win_N = win_N.float()
        lose_N = lose_N.float()
    margin_N = win_N - lose_N

    if theta is None:
        loss_N = (-F.logsigmoid(margin_N - margin)).masked_fill(tie_N, 0.0)
        pairs_counted = int((~tie_N).sum())
    else:
        shift = math.log(theta)
        decided_N = -F.logsigmoid(margin_N - shift)
        tied_N = decided_N - F.logsigmoid(-margin_N - shift) - math.log(theta**2 - 1.0)
        loss_N = torch.where(tie_N, tied_N, decided_N)
        pairs_counted = tie_N.numel()
    if count is None:
        count = max(pairs_counted, 1)
    return LossOutput(loss_N.sum() / count, _metrics(margin_N[~tie_N].detach()))


def preference_loss(
    reward_N2K: Tensor,
    label_NK: Tensor,
    *,
    weight_K: Sequence[float],
    theta: float | None = None,
    margin: float = 0.0,
    count_K: Sequence[float] | None = None,
) -> Tensor:
    """SUM over dimensions k of weight_k x `bradley_terry` of the rewards of (A, B).

    label_NK  1 (A is better), -1 (B), 0 (a tie), NaN (unlabelled: not counted).
    count_K   The divisor of each dimension's SUM, see `bradley_terry` and `counted`.
    """
    terms = []
    for k, weight in enumerate(weight_K):
        is_labelled_N = ~label_NK[:, k].isnan()
        label_M = label_NK[is_labelled_N, k]
        reward_A_M, reward_B_M = reward_N2K[is_labelled_N, :, k].unbind(1)
        result = bradley_terry(
            torch.where(label_M >= 0, reward_A_M, reward_B_M),
            torch.where(label_M >= 0, reward_B_M, reward_A_M),
            tie_N=label_M == 0,
            theta=theta,
            margin=margin,
            count=None if count_K is None else count_K[k],
        )
        terms.append(weight * result.loss)
    return torch.stack(terms).sum()


def counted(label_NK: Tensor, *, theta: float | None) -> Tensor:
    """Number (K,) of pairs that count in each dimension: labelled, and ties only with theta."""
    counts_NK = ~label_NK.isnan()
    if theta is None:
        counts_NK = counts_NK & (label_NK != 0)
    return counts_NK.sum(0)


def _metrics(margin_N: Tensor) -> dict[str, float]:
    if not margin_N.numel():
        return {}
    return {
        "accuracy": (margin_N > 0).float().mean().item(),
        "margin": margin_N.mean().item(),
    }
