"""What follows from the numbers of the comparison of reward models, by hand."""

from __future__ import annotations

import math

import pytest

from experiments.rm_claims import (
    FAILS,
    HOLDS,
    UNKNOWN,
    ClaimResult,
    claims_table,
    findings_of,
    lead_on,
    training_findings,
)
from experiments.rm_methods import METHODS, TESTS, Cell
from experiments.rm_results import Outcomes, RmOutcome


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ([0.01, 0.3], HOLDS),
        ([-0.3, -0.01], FAILS),
        ([-0.1, 0.3], UNKNOWN),
        ([None, None], UNKNOWN),
    ],
)
def test_verdict_is_the_side_of_the_interval(interval: list, verdict: str) -> None:
    assert ClaimResult("c", "m", {"mean": 0.1, "ci95": interval}).verdict == verdict


def test_no_number_is_no_verdict() -> None:
    finding = ClaimResult("c", "m", None)
    assert finding.verdict == UNKNOWN
    assert claims_table([finding])[-1] == f"| c | {UNKNOWN} | not in every seed | m |"


def test_lead_on_pairs_of_equal_stated_sums() -> None:
    """By hand: the seeds are right on 3 of 5 and on 5 of 5 such pairs, one a test."""
    outcomes: Outcomes = {}
    for seed, right in ((0, (1, 0, 1, 0, 1)), (1, (1, 1, 1, 1, 1))):
        by_test = {}
        for name, value in zip(TESTS, right, strict=True):
            # The other pairs state an order and do not count.
            by_test[name] = RmOutcome((float(value), 0.0, 1.0), (0.0, 1.0, -1.0))
        outcomes[Cell(seed, 10, "descore")] = by_test
    found = lead_on(outcomes, 10, 0.0)
    assert found["mean"] == pytest.approx((0.6 + 1.0) / 2 - 0.5)
    # Student's interval of two values 0.1 and 0.5: half width 12.706 * 0.2.
    assert found["ci95"][1] == pytest.approx(0.3 + 12.7062 * 0.2, rel=1e-5)
    assert lead_on(outcomes, 10, -1.0)["mean"] == pytest.approx(0.5)


def test_updates_to_the_goal_and_wobble() -> None:
    """The generative model is best after 40 updates; stage 1 is as good after 10 and 20."""
    theirs = [(10, 0.5), (20, 0.6), (30, 0.5), (40, 0.7)]
    curves = {
        "generative": {0: theirs, 1: theirs},
        "stage1": {0: [(10, 0.7), (20, 0.7)], 1: [(10, 0.6), (20, 0.8)]},
    }
    updates, steadiness = training_findings(curves)
    wanted = (math.log(4) + math.log(2)) / 2
    assert updates.value["mean"] == pytest.approx(wanted)
    # The last two values of each curve: 0.5 and 0.7 have a std of 0.1.
    assert steadiness.value["mean"] == pytest.approx(((0.1 - 0.0) + (0.1 - 0.1)) / 2)


def test_goal_that_is_not_reached_is_told() -> None:
    curves = {
        "generative": {0: [(10, 0.9), (20, 0.8)], 1: [(10, 0.6), (20, 0.5)]},
        "stage1": {0: [(10, 0.7), (20, 0.7)], 1: [(10, 0.7), (20, 0.8)]},
    }
    updates, _ = training_findings(curves)
    assert updates.value is None


def test_every_claim_has_a_number_once_all_methods_ran() -> None:
    outcomes: Outcomes = {}
    for seed in (0, 1):
        for number, name in enumerate(METHODS):
            size = 0 if name == "base" else 10
            if (seed, name) == (1, "base"):
                continue
            right = tuple(float((seed + number + i) % 3 > 0) for i in range(6))
            by_test = {
                test: RmOutcome(right, (0.0, 1.0, -1.0, 0.0, 1.0, -1.0), right)
                for test in TESTS
            }
            outcomes[Cell(seed, size, name)] = by_test
    findings = findings_of(outcomes, 10, {})
    without = [finding.text for finding in findings if finding.value is None]
    assert len(findings) == 15
    # Only the two that need the curves of training.
    assert len(without) == 2
