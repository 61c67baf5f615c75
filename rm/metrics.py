"""Preference accuracy of a reward, with and without ties (Deutsch et al., arXiv 2305.14324)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from common.distributed import gather_objects
from rm.data import label_of_total, label_rows

if TYPE_CHECKING:
    from rm.data import Pair
    from rm.model import DeScore


Row = TypeVar("Row", bound=tuple)


class PreferenceAccuracy(NamedTuple):
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
    """
    is_labelled_N = ~label_N.isnan().cpu()
    margin_N = margin_N.detach().double().cpu()
    margin_N = margin_N[is_labelled_N]
    label_N = label_N.detach().double().cpu()
    label_N = label_N[is_labelled_N]
    total = len(label_N)
    if not total:
        return PreferenceAccuracy(math.nan, math.nan, -1.0)

    # Without ties: the sign of the margin, over decided pairs.
    is_correct_N = (margin_N * label_N) > 0
    decided = int((label_N != 0).sum())
    without_ties = math.nan
    if decided:
        without_ties = int(is_correct_N.sum()) / decided

    # With ties: raising e past a unique |m| gains the ties there and loses the correct pairs.
    is_scored_N = ~margin_N.isnan()
    size_M = margin_N[is_scored_N].abs()
    correct_M = is_correct_N[is_scored_N].long()
    tie_M = (label_N == 0)[is_scored_N].long()
    unique_U, index_M = size_M.unique(sorted=True, return_inverse=True)
    change_U = torch.zeros(len(unique_U), dtype=torch.long)
    change_U.index_add_(0, index_M, tie_M - correct_M)
    never_tie = correct_M.sum()
    hits = torch.cat(
        [
            never_tie.view(1),
            never_tie + change_U.cumsum(0),
        ]
    )
    best = int((hits == hits.max()).nonzero()[0])
    return PreferenceAccuracy(
        with_ties=hits[best].item() / total,
        without_ties=without_ties,
        threshold=unique_U[best - 1].item() if best else -1.0,
    )


def gather_in_order(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of all ranks, sorted by the number that each starts with."""
    gathered: list[Row] = []
    for rank_rows in gather_objects(rows):
        gathered += rank_rows
    return sorted(gathered)


def total_labels(pairs: Sequence[Pair], names: Collection[str]) -> Tensor:
    """Labels (N,) that the summed reward is compared with."""
    return torch.tensor([label_of_total(pair, names) for pair in pairs])


def heldout_metrics(
    model: DeScore, margin_NK: Tensor, pairs: Sequence[Pair], *, with_ties: bool
) -> dict[str, float]:
    """Compute the accuracy metrics of held-out pairs from their margins in each dimension."""
    names = list(model.dimensions)
    accuracy = preference_accuracy(
        model.total(margin_NK),
        total_labels(pairs, names),
    )
    metrics = {"heldout/accuracy": accuracy.without_ties}
    if with_ties:
        metrics["heldout/accuracy_with_ties"] = accuracy.with_ties

    # A single dimension is the total already.
    if len(names) > 1:
        label_NK = torch.tensor(label_rows(pairs, names))
        for k, name in enumerate(names):
            accuracy = preference_accuracy(margin_NK[:, k], label_NK[:, k])
            metrics[f"heldout/accuracy/{name}"] = accuracy.without_ties
    return metrics
