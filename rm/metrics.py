"""Preference accuracy of a reward, with and without ties (Deutsch et al., arXiv 2305.14324)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rm.data import label_of_total, label_rows

if TYPE_CHECKING:
    from rm.data import Pair
    from rm.model import DeScore


@dataclass(frozen=True)
class PreferenceAccuracy:
    """Fractions in [0, 1]; NaN where there is nothing to count.

    with_ties     The best accuracy over thresholds e, where |margin| <= e predicts a tie.
    without_ties  The share of decided pairs whose margin has the right sign; 0 is wrong.
    threshold     The smallest e that reaches ``with_ties``; -1 means "never predict a tie".
    """

    with_ties: float
    without_ties: float
    threshold: float


def preference_accuracy(margin_N: Tensor, label_N: Tensor) -> PreferenceAccuracy:
    """Compute the accuracy of margins r_A - r_B against labels 1 (A), -1 (B), 0 (tie).

        acc(e) = (SUM correct and |m| > e  +  SUM tie and |m| <= e) / N

    N is the number of all labelled pairs. The threshold e is calibrated on the same data, as
    the benchmarks do: at -1 and at each unique |m|. Pairs with equal |m| change sides
    together, so no threshold is tried between them. A NaN margin is wrong under every
    threshold; a pair with a NaN label (unlabelled) is left out.

    Raises ValueError for other labels or unequal shapes.
    """
    if margin_N.dim() != 1 or margin_N.shape != label_N.shape:
        raise ValueError(
            "preference_accuracy needs two (N,) tensors, "
            f"got {tuple(margin_N.shape)} and {tuple(label_N.shape)}"
        )
    is_labelled_N = ~label_N.isnan().cpu()
    margin_N = margin_N.detach().double().cpu()[is_labelled_N]
    label_N = label_N.detach().double().cpu()[is_labelled_N]
    is_valid_N = (label_N == 1) | (label_N == -1) | (label_N == 0)
    if not is_valid_N.all():
        raise ValueError(
            f"labels must be 1, -1 or 0, got {label_N[~is_valid_N][0].item()}"
        )
    total = len(label_N)
    if not total:
        return PreferenceAccuracy(float("nan"), float("nan"), -1.0)

    # Without ties: the sign of the margin, over decided pairs.
    is_correct_N = (margin_N * label_N) > 0
    decided = int((label_N != 0).sum())
    without_ties = int(is_correct_N.sum()) / decided if decided else float("nan")

    # With ties: raising e past a unique |m| gains the ties there and loses the correct pairs.
    is_scored_N = ~margin_N.isnan()
    size_M = margin_N[is_scored_N].abs()
    correct_M = is_correct_N[is_scored_N].long()
    tie_M = (label_N == 0)[is_scored_N].long()
    unique_U, index_M = size_M.unique(sorted=True, return_inverse=True)
    change_U = torch.zeros(len(unique_U), dtype=torch.long)
    change_U.index_add_(0, index_M, tie_M - correct_M)
    never_tie = correct_M.sum()
    hits = torch.cat([never_tie.view(1), never_tie + change_U.cumsum(0)])
    best = int((hits == hits.max()).nonzero()[0])
    return PreferenceAccuracy(
        with_ties=hits[best].item() / total,
        without_ties=without_ties,
        threshold=unique_U[best - 1].item() if best else -1.0,
    )


def accuracy_by_dimension(
    margin_NK: Tensor, label_NK: Tensor, names: Sequence[str]
) -> dict[str, float]:
    """Compute ``heldout/accuracy/<name>`` without ties; {} if there is one dimension only."""
    if len(names) == 1:
        return {}
    metrics = {}
    for k, name in enumerate(names):
        accuracy = preference_accuracy(margin_NK[:, k], label_NK[:, k])
        metrics[f"heldout/accuracy/{name}"] = accuracy.without_ties
    return metrics


def heldout_metrics(
    model: DeScore, margin_NK: Tensor, pairs: Sequence[Pair], *, with_ties: bool
) -> dict[str, float]:
    """Compute the accuracy metrics of held-out pairs from their margins in each dimension."""
    names = list(model.dimensions)
    label_N = torch.tensor([label_of_total(pair, names) for pair in pairs])
    accuracy = preference_accuracy(model.total(margin_NK), label_N)
    metrics = {"heldout/accuracy": accuracy.without_ties}
    if with_ties:
        metrics["heldout/accuracy_with_ties"] = accuracy.with_ties
    label_NK = torch.tensor(label_rows(pairs, names))
    metrics.update(accuracy_by_dimension(margin_NK, label_NK, names))
    return metrics
