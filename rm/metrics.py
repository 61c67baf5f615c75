"""How often a reward agrees with people about pairs, with and without ties (Deutsch et al., 2305.14324)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PreferenceAccuracy:
    """Fractions in [0, 1]; NaN where there is nothing to count.

    with_ties     best over thresholds e of acc(e): |m| <= e predicts a tie, otherwise the sign of m decides
    without_ties  over pairs people decided: the sign of m is right; m = 0 is wrong
    threshold     the smallest e that reaches ``with_ties``; -1 means "never predict a tie"
    """

    with_ties: float
    without_ties: float
    threshold: float


def preference_accuracy(margin_N: Tensor, label_N: Tensor) -> PreferenceAccuracy:
    """Accuracy of margins m = r_A - r_B against labels 1 (A), -1 (B), 0 (tie).

        acc(e) = (right and |m| > e) + (tie and |m| <= e), divided by N, the number of all pairs

    The threshold is calibrated on the very data, as the benchmarks do. It is tried at -1 and at each unique |m| only:
    pairs with equal |m| change sides together (stepping through them one by one scores predictions that no threshold
    can make). O(N log N). A NaN margin (unjudged) is wrong under every threshold; a pair whose label is NaN (nobody
    said) is left out. ValueError for other labels.
    """
    if margin_N.dim() != 1 or margin_N.shape != label_N.shape:
        raise ValueError(
            f"preference_accuracy needs two (N,) tensors, got {tuple(margin_N.shape)} and {tuple(label_N.shape)}"
        )
    margin_N, label_N = (
        margin_N.detach().double().cpu(),
        label_N.detach().double().cpu(),
    )
    margin_N, label_N = margin_N[~label_N.isnan()], label_N[~label_N.isnan()]
    known_N = (label_N == 1) | (label_N == -1) | (label_N == 0)
    if not known_N.all():
        raise ValueError(
            f"labels must be 1, -1 or 0, got {label_N[~known_N][0].item()}"
        )
    total = len(label_N)
    if not total:
        return PreferenceAccuracy(float("nan"), float("nan"), -1.0)
    right_N = (margin_N * label_N) > 0
    decided = int((label_N != 0).sum())

    judged_N = ~margin_N.isnan()
    size_M, right_M, tie_M = (
        margin_N[judged_N].abs(),
        right_N[judged_N],
        (label_N == 0)[judged_N],
    )
    unique_U, group_M = size_M.unique(sorted=True, return_inverse=True)
    # raising e past one unique |m| gains the ties there and loses the right answers there
    change_U = torch.zeros(len(unique_U), dtype=torch.long).index_add_(
        0, group_M, tie_M.long() - right_M.long()
    )
    hits = torch.cat([right_M.sum().view(1), right_M.sum() + change_U.cumsum(0)])
    best = int((hits == hits.max()).nonzero()[0])
    return PreferenceAccuracy(
        with_ties=hits[best].item() / total,
        without_ties=int(right_N.sum()) / decided if decided else float("nan"),
        threshold=unique_U[best - 1].item() if best else -1.0,
    )


def accuracy_by_dimension(
    margin_NK: Tensor, label_NK: Tensor, names: Sequence[str]
) -> dict[str, float]:
    """``heldout/accuracy/<name>``: without ties, of the pairs with a label there, not NaN. {} for one dimension."""
    if len(names) == 1:
        return {}
    by_name = zip(names, margin_NK.unbind(1), label_NK.unbind(1), strict=True)
    return {
        f"heldout/accuracy/{name}": preference_accuracy(*both).without_ties
        for name, *both in by_name
    }
