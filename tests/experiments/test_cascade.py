"""experiments/cascade.py: decided pairs, shares of thinking and halves by hand."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.cascade import ScoredPairs, pooled, split_results
from launch.evaluation.thinking import Guarantee, HeldoutPairs


def test_decided_pairs_by_hand() -> None:
    """Fast rewards are right, wrong with harm, wrong as the slow ones are; the fourth is a tie."""
    fast_N2 = torch.tensor([[4.0, 0.0], [0.0, 1.0], [0.0, 2.0], [3.0, 0.0]])
    slow_N2 = torch.tensor([[8.0, 0.0], [2.0, 0.5], [0.0, math.nan], [6.0, 0.0]])
    pairs = HeldoutPairs([1, 1, 1, 0], fast_N2, slow_N2)
    found = ScoredPairs.of(pairs)
    slope = pairs.fit().slope
    assert found.confidence == pytest.approx([4 * slope, slope, 2 * slope], rel=1e-5)
    assert found.fast == [1, 0, 0]
    assert found.slow == [1, 1, 0]
    assert found.harm == [0, 1, 0]
    # a missing reward agrees with nothing
    assert found.differs == [0, 1, 1]
    # the least confident pair first
    assert found.by_share(1 / 3) == [0, 1, 0]
    assert found.right(found.by_share(1 / 3)) == [1, 1, 0]
    assert found.thought(2 * slope - 1e-3) == [0, 1, 0]
    assert found.thought(None) == [1, 1, 1]


def test_pairs_that_all_models_share_count_once() -> None:
    by_seed = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    assert pooled(by_seed, shared=True)["n"] == 3
    assert pooled(by_seed, shared=False)["n"] == 6
    assert pooled(by_seed, shared=True)["mean"] == pytest.approx(0.5)


def test_halves_of_pairs_that_thinking_never_mends_think_about_none() -> None:
    count = 400
    pairs = ScoredPairs(
        confidence=[float(i) for i in range(count)],
        fast=[1.0] * count,
        slow=[1.0, 0.0] * (count // 2),
        harm=[0.0] * count,
        differs=[0.0, 1.0] * (count // 2),
    )
    promise = Guarantee("clopper_pearson", "harm", 0.02, 0.05)
    found = split_results(pairs, promise, 0)
    # all but those below the least confident pair of the other half
    assert found["thought"]["mean"] < 0.02
    assert found["gain"]["mean"] == pytest.approx(0.5, abs=0.02)
    assert found["violations"] == 0
    # half of the orders differ: the model always thinks
    promise = Guarantee("clopper_pearson", "disagreement", 0.02, 0.05)
    assert split_results(pairs, promise, 0)["thought"]["mean"] > 0.99
