"""Preference losses of the reward model: tensors and numbers in, loss out, fp32 inside."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    chosen_N: Tensor,
    rejected_N: Tensor,
    tie_N: Tensor,
    *,
    theta: float | None = None,
    margin: float = 0.0,
) -> Tensor:
    """Negative log-likelihood (N,) of preferences.

    With d = chosen - rejected, and without theta (Bradley-Terry; DeScore 2605.05922, equation 3):
        decided: -log sig(d - margin);   a tie gives 0.
    With theta > 1 (ties by Rao and Kupper; VideoAlign 2501.13918, equations 1 and 2):
        decided: -log sig(d - log theta)
        tie:     -log sig(d - log theta) - log sig(-d - log theta) - log(theta^2 - 1)

    tie_N  bool; where it is True, the order of chosen and rejected is free.
    """
    # fp32 at least; double inputs stay double.
    dtype = torch.promote_types(chosen_N.dtype, torch.float32)
    d_N = chosen_N.to(dtype) - rejected_N.to(dtype)
    if theta is None:
        return (-F.logsigmoid(d_N - margin)).masked_fill(tie_N, 0.0)

    # With ties, the decided side must lead by log theta.
    shift = math.log(theta)
    decided_N = -F.logsigmoid(d_N - shift)
    tied_N = decided_N - F.logsigmoid(-d_N - shift) - math.log(theta**2 - 1.0)
    return torch.where(tie_N, tied_N, decided_N)


def preference_loss(
    reward_N2K: Tensor,
    label_NK: Tensor,
    *,
    weight_K: Sequence[float],
    count_K: Sequence[float],
    theta: float | None = None,
    margin: float = 0.0,
) -> Tensor:
    """SUM over dimensions of weight x `bradley_terry` of the rewards of (A, B) / count.

    label_NK  1 (A is better), -1 (B), 0 (a tie), NaN (unlabelled: not counted).
    count_K   The `counted` pairs over all micro-batches and ranks, at least 1.
    """
    terms = []
    for k, weight in enumerate(weight_K):
        # Only labelled pairs; ties keep the order A, B.
        is_labelled_N = ~label_NK[:, k].isnan()
        label_M = label_NK[is_labelled_N, k]
        reward_A_M, reward_B_M = reward_N2K[is_labelled_N, :, k].unbind(1)
        loss_M = bradley_terry(
            torch.where(label_M >= 0, reward_A_M, reward_B_M),
            torch.where(label_M >= 0, reward_B_M, reward_A_M),
            label_M == 0,
            theta=theta,
            margin=margin,
        )
        terms.append(weight * (loss_M.sum() / count_K[k]))
    return torch.stack(terms).sum()


def counted(label_NK: Tensor, *, theta: float | None) -> Tensor:
    """Number (K,) of pairs that count in each dimension: labelled, and ties only with theta."""
    counts_NK = ~label_NK.isnan()
    if theta is None:
        counts_NK = counts_NK & (label_NK != 0)
    return counts_NK.sum(0)
