"""Preference accuracy against brute force and against the published script."""

from __future__ import annotations

import math

import pytest
import torch

from rm.metrics import preference_accuracy


def brute_force(margins: list[float], labels: list[int]) -> tuple[float, float]:
    def accuracy(threshold: float) -> float:
        right = 0
        for m, h in zip(margins, labels, strict=True):
            predicted = 0 if abs(m) <= threshold else (m > 0) - (m < 0)
            # m = 0 above no threshold predicts nothing: wrong, also for a tie
            right += (predicted == h) and (abs(m) <= threshold or m != 0)
        return right / len(labels)

    decided = [(m, h) for m, h in zip(margins, labels, strict=True) if h]
    without = sum(m * h > 0 for m, h in decided) / len(decided) if decided else math.nan
    return max(accuracy(e) for e in {-1.0, *map(abs, margins)}), without


def stepwise(margins: list[float], labels: list[int]) -> float:
    """Do as the published script: move the threshold past single pairs, also of equal |m|."""
    order = sorted(range(len(margins)), key=lambda i: abs(margins[i]))
    hits = sum(m * h > 0 for m, h in zip(margins, labels, strict=True))
    best = hits
    for i in order:
        hits += (labels[i] == 0) - (margins[i] * labels[i] > 0)
        best = max(best, hits)
    return best / len(margins)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scores", ["integers", "continuous"])
def test_equals_brute_force(seed, scores):
    draw = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 40, (), generator=draw))
    labels = torch.randint(-1, 2, (size,), generator=draw)
    margins = (
        torch.randint(-3, 4, (size,), generator=draw).double()
        if scores == "integers"
        else torch.randn(size, generator=draw, dtype=torch.float64) + 0.5 * labels
    )
    found = preference_accuracy(margins, labels)
    with_ties, without_ties = brute_force(margins.tolist(), labels.tolist())
    assert found.with_ties == pytest.approx(with_ties, abs=1e-12)
    assert found.without_ties == pytest.approx(without_ties, abs=1e-12, nan_ok=True)
    # the threshold reaches what is reported
    predicted = torch.where(margins.abs() <= found.threshold, 0.0, margins.sign())
    right = (predicted == labels) & (
        (margins.abs() <= found.threshold) | (margins != 0)
    )
    assert right.double().mean().item() == pytest.approx(with_ties, abs=1e-12)


def test_equal_margins_change_sides_together():
    # a tie and a right answer with the same |m|: whatever the threshold, one of the two is wrong
    assert (
        preference_accuracy(torch.tensor([1.0, 1.0]), torch.tensor([0, 1])).with_ties
        == 0.5
    )
    assert (
        preference_accuracy(torch.tensor([1.0, 1.0]), torch.tensor([1, 0])).with_ties
        == 0.5
    )
    assert stepwise([1.0, 1.0], [0, 1]) == 1.0


def test_order_of_ties_does_not_raise_accuracy():
    """20,000 random integer scores, ties first: single steps give 0.5, thresholds only 0.38."""
    draw = torch.Generator().manual_seed(0)
    labels = (
        torch.multinomial(
            torch.tensor([0.34, 0.33, 0.33]), 20_000, replacement=True, generator=draw
        )
        - 1
    )
    scores = torch.randint(1, 4, (2, 20_000), generator=draw)
    margins = (scores[0] - scores[1]).double()
    order = (labels != 0).long().argsort(stable=True)
    margins, labels = margins[order], labels[order]
    found = preference_accuracy(margins, labels)
    assert found.with_ties == brute_force(margins.tolist(), labels.tolist())[0]
    assert found.with_ties < 0.38
    assert stepwise(margins.tolist(), labels.tolist()) > found.with_ties + 0.1
    shuffled = torch.randperm(20_000, generator=draw)
    assert preference_accuracy(margins[shuffled], labels[shuffled]) == found


def test_by_hand():
    margins, labels = (
        torch.tensor([2.0, -1.0, 0.5, 0.2, 0.0]),
        torch.tensor([1, -1, -1, 0, 0]),
    )
    found = preference_accuracy(margins, labels)
    assert found.without_ties == pytest.approx(2 / 3)
    assert found.with_ties == pytest.approx(4 / 5)  # e = 0.2 catches both ties
    assert found.threshold == pytest.approx(0.2)


def test_zero_margin_is_wrong_without_ties():
    assert (
        preference_accuracy(torch.zeros(4), torch.tensor([1, 1, -1, -1])).without_ties
        == 0.0
    )


def test_unscored_pair_counts_as_wrong():
    found = preference_accuracy(
        torch.tensor([math.nan, 1.0, math.nan]), torch.tensor([0, 1, 1])
    )
    assert found.with_ties == pytest.approx(1 / 3)
    assert found.without_ties == 0.5
    assert (
        preference_accuracy(torch.full((2,), math.nan), torch.tensor([0, 1])).with_ties
        == 0.0
    )


def test_accuracy_of_no_pairs_is_nan():
    assert math.isnan(preference_accuracy(torch.zeros(2), torch.zeros(2)).without_ties)
    assert math.isnan(preference_accuracy(torch.zeros(0), torch.zeros(0)).with_ties)


def test_accuracy_of_a_million_pairs_is_fast():
    draw = torch.Generator().manual_seed(0)
    margins, labels = (
        torch.randn(10**6, generator=draw),
        torch.randint(-1, 2, (10**6,), generator=draw),
    )
    assert 0.3 < preference_accuracy(margins, labels).without_ties < 0.7


def test_pairs_without_a_label_are_left_out_of_the_accuracy() -> None:
    margin_N = torch.tensor([1.0, -2.0, 3.0, 4.0])
    label_N = torch.tensor([1.0, -1.0, -1.0, math.nan])
    # two of the three labelled pairs are right
    assert preference_accuracy(margin_N, label_N).without_ties == pytest.approx(2 / 3)
