"""Losses of the reward: tensors and numbers in, `LossOutput` out. fp32 inside."""

from __future__ import annotations

import math

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
        raise ValueError(f"bradley_terry needs two (N,) tensors, got {tuple(win_N.shape)} and {tuple(lose_N.shape)}")
    tie_N = torch.zeros_like(win_N, dtype=torch.bool) if tie_N is None else tie_N
    if tie_N.shape != win_N.shape or tie_N.dtype != torch.bool:
        raise ValueError(f"tie_N must be bool {tuple(win_N.shape)}, got {tie_N.dtype} {tuple(tie_N.shape)}")
    if theta is not None and theta <= 1.0:
        raise ValueError(f"theta={theta} must be above 1, where a tie has no probability")
    if theta is not None and margin:
        raise ValueError(f"margin={margin} beside theta={theta}, which is a margin itself")
    if count is not None and count <= 0:
        raise ValueError(f"count={count} must be positive")
    margin_N = win_N.float() - lose_N.float() if win_N.dtype != torch.float64 else win_N - lose_N

    if theta is None:
        loss_N = (-F.logsigmoid(margin_N - margin)).masked_fill(tie_N, 0.0)
        counted = int((~tie_N).sum())
    else:
        shift = math.log(theta)
        decided_N = -F.logsigmoid(margin_N - shift)
        tied_N = decided_N - F.logsigmoid(-margin_N - shift) - math.log(theta**2 - 1.0)
        loss_N = torch.where(tie_N, tied_N, decided_N)
        counted = tie_N.numel()
    return LossOutput(loss_N.sum() / (max(counted, 1) if count is None else count), _metrics(margin_N[~tie_N].detach()))


def preference_loss(
    reward_N2: Tensor,
    label_N: Tensor,
    *,
    theta: float | None = None,
    margin: float = 0.0,
    count: float | None = None,
) -> LossOutput:
    """`bradley_terry` of rewards of (A, B) with labels 1 (A is better), -1 (B), 0 (a tie)."""
    a_first_N = label_N >= 0
    win_N = torch.where(a_first_N, reward_N2[:, 0], reward_N2[:, 1])
    lose_N = torch.where(a_first_N, reward_N2[:, 1], reward_N2[:, 0])
    return bradley_terry(win_N, lose_N, tie_N=label_N == 0, theta=theta, margin=margin, count=count)


def _metrics(margin_N: Tensor) -> dict[str, float]:
    if not margin_N.numel():
        return {}
    return {"accuracy": (margin_N > 0).float().mean().item(), "margin": margin_N.mean().item()}
