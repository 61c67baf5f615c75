"""Think when unsure: bounds, thresholds and confidences against tables, hand and simulation."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from scipy import stats

from rm.cascade import (
    Thinking,
    area_under_risk_coverage,
    choose_threshold,
    clopper_pearson_lower,
    clopper_pearson_upper,
    discordant_pairs,
    fit_scale,
    group_confidence,
    harm,
    pair_confidence,
    passes,
    risk_coverage,
    threshold_from,
)


@pytest.mark.parametrize(
    ("losses", "n", "bound"),
    [
        (0, 240, 0.012405),
        (1, 240, 0.019613),
        (3, 240, 0.031988),
        (5, 240, 0.043303),
        (5, 600, 0.017441),
        (0, 60, 0.048703),
        (0, 148, 0.020038),
        (0, 149, 0.019905),
    ],
)
def test_clopper_pearson_upper_is_the_table(losses: int, n: int, bound: float) -> None:
    assert clopper_pearson_upper(losses, n, delta=0.05) == pytest.approx(
        bound, abs=5e-7
    )


def test_clopper_pearson_bounds_are_quantiles_of_the_beta_distribution() -> None:
    for losses, n, delta in ((0, 7, 0.1), (3, 11, 0.05), (40, 300, 0.01), (7, 7, 0.05)):
        upper = stats.beta.ppf(1 - delta, losses + 1, n - losses) if losses < n else 1
        lower = stats.beta.ppf(delta, losses, n - losses + 1) if losses else 0
        assert clopper_pearson_upper(losses, n, delta=delta) == pytest.approx(upper)
        assert clopper_pearson_lower(losses, n, delta=delta) == pytest.approx(lower)


def test_clopper_pearson_passes_where_its_upper_bound_does() -> None:
    for losses in range(12):
        for alpha in (0.02, 0.05):
            bound = clopper_pearson_upper(losses, 240, delta=0.05)
            found = passes(
                losses, 240, method="clopper_pearson", alpha=alpha, delta=0.05
            )
            assert found == (bound <= alpha)


def test_crc_of_240_pairs_at_2_percent_allows_3_losses() -> None:
    def allowed(losses: int) -> bool:
        return passes(losses, 240, method="crc", alpha=0.02, delta=0.05)

    assert allowed(3)
    assert not allowed(4)


def test_crc_threshold_of_five_pairs_by_hand() -> None:
    """(losses + 1) / 6 <= 1/2 allows 2: all five may be fast."""
    chosen = choose_threshold(
        [5, 4, 3, 2, 1], [0, 0, 1, 0, 1], method="crc", alpha=0.5, delta=0.05
    )
    assert chosen == 1
    # a third loss is one too many, and equal confidences are decided together
    chosen = choose_threshold(
        [5, 4, 3, 1, 1], [0, 1, 1, 0, 1], method="crc", alpha=0.5, delta=0.05
    )
    assert chosen == 3


def test_threshold_is_none_where_no_item_passes() -> None:
    for method in ("crc", "clopper_pearson"):
        found = threshold_from(
            [3.0, 2.0, 1.0],
            [0.0, 0.0, 0.0],
            method=method,
            risk="harm",
            alpha=0.02,
            delta=0.05,
        )
        assert found.confidence is None
        assert found.thought == 1
        assert not found.decides_fast(1e9)


def test_threshold_walks_down_and_stops_at_the_first_failure() -> None:
    """149 items without loss pass at 2 % and 5 %, 148 do not; later items cannot mend a failure."""
    confidence = [float(i) for i in range(300, 0, -1)]
    losses = [0.0] * 300
    # the 200th most confident item has a loss: with 300 items one loss is 0.015721
    losses[199] = 1.0
    found = threshold_from(
        confidence,
        losses,
        method="clopper_pearson",
        risk="harm",
        alpha=0.0125,
        delta=0.05,
    )
    # 0 of 300: 0.009936; 1 of 300: 0.015721
    assert found.confidence == 102.0
    assert found.decides_fast(102.0)
    assert not found.decides_fast(101.9)
    assert found.losses == 0
    assert found.thought == pytest.approx(101 / 300)


def test_missing_confidence_is_never_fast() -> None:
    found = threshold_from(
        [math.nan, *[1.0] * 200],
        [0.0] * 201,
        method="clopper_pearson",
        risk="harm",
        alpha=0.05,
        delta=0.05,
    )
    assert found.confidence == 1.0
    assert found.thought == pytest.approx(1 / 201)
    assert not found.decides_fast(math.nan)


def test_clopper_pearson_refuses_losses_between_0_and_1() -> None:
    with pytest.raises(ValueError, match="crc"):
        threshold_from(
            [1.0],
            [0.5],
            method="clopper_pearson",
            risk="disagreement",
            alpha=0.1,
            delta=0.1,
        )


def drawn_items(rng: random.Random, n: int) -> tuple[list[float], list[float]]:
    """Confidences uniform in (0, 1), with a loss in 0.3 (1 - c)^2 of the cases."""
    confidence = [rng.random() for _ in range(n)]
    losses = [float(rng.random() < 0.3 * (1 - c) ** 2) for c in confidence]
    return confidence, losses


def true_risk(threshold: float) -> float:
    """The integral of 0.3 (1 - c)^2 from the threshold to 1."""
    return 0.1 * (1 - min(threshold, 1)) ** 3


def test_clopper_pearson_breaks_its_promise_in_at_most_delta_of_simulated_calibrations() -> (
    None
):
    """600 calibrations at delta 0.1: more than 78 violations have a chance below 1 %."""
    rng = random.Random(0)
    violations = 0
    skipped = 0.0
    for _ in range(600):
        confidence, losses = drawn_items(rng, 300)
        chosen = choose_threshold(
            confidence, losses, method="clopper_pearson", alpha=0.03, delta=0.1
        )
        violations += true_risk(chosen) > 0.03
        skipped += 1 - min(chosen, 1)
    assert violations <= stats.binom.ppf(0.99, 600, 0.1) == 78
    # nor by never skipping: the bound is nearly exhausted
    assert violations >= 25
    assert skipped / 600 > 0.5


def test_crc_keeps_the_mean_risk_in_simulation() -> None:
    rng = random.Random(1)
    risks = []
    for _ in range(600):
        confidence, losses = drawn_items(rng, 100)
        chosen = choose_threshold(
            confidence, losses, method="crc", alpha=0.05, delta=0.1
        )
        risks.append(true_risk(chosen))
    mean = sum(risks) / len(risks)
    error = torch.tensor(risks).std().item() / math.sqrt(len(risks))
    assert mean <= 0.05 + 2 * error
    # at most 1 / (n + 1) below alpha is lost, and a bit more for steps
    assert mean >= 0.05 - 0.02


def test_group_confidence_by_hand() -> None:
    """U of (0, 1, 3) at sigma 1 is the mean of .239750, .016947 and .078650."""
    reward_G = torch.tensor([0.0, 1.0, 3.0])
    assert group_confidence(reward_G, sigma=1.0) == pytest.approx(
        1 - 2 * 0.111782, abs=2e-6
    )
    assert group_confidence(reward_G, sigma=1e-9) == 1
    assert group_confidence(torch.ones(4), sigma=1.0) == 0
    assert math.isnan(group_confidence(torch.tensor([0.0, math.nan, 1.0]), sigma=1.0))


def test_pair_confidence_is_the_absolute_margin() -> None:
    assert pair_confidence(torch.tensor([1.0, 3.5])) == 2.5


@pytest.mark.parametrize(
    ("fast", "slow", "label", "loss"),
    [
        (-1.0, 2.0, 1, 1.0),
        (1.0, 2.0, 1, 0.0),
        (-1.0, -2.0, 1, 0.0),
        # thinking is wrong: being fast only helps
        (1.0, -2.0, 1, 0.0),
        (1.0, -2.0, -1, 1.0),
        # no order is a wrong order, and a missing CoT is no right one
        (0.0, 2.0, 1, 1.0),
        (-1.0, math.nan, 1, 0.0),
    ],
)
def test_harm_is_a_right_order_that_thinking_would_have_found(
    fast: float, slow: float, label: int, loss: float
) -> None:
    assert harm(fast, slow, label) == loss


def test_discordance_is_half_of_one_minus_kendalls_tau() -> None:
    fast_G = torch.tensor([0.3, -1.0, 2.0, 0.7, 5.0])
    slow_G = torch.tensor([0.1, 0.5, 3.0, -2.0, 2.5])
    tau = stats.kendalltau(fast_G, slow_G).statistic
    found = discordant_pairs(fast_G, slow_G)
    assert len(found) == 10
    assert found.mean().item() == pytest.approx((1 - tau) / 2)
    # a missing reward agrees with nothing
    slow_G[1] = math.nan
    assert discordant_pairs(fast_G, slow_G).sum() >= 4


def test_fit_is_the_least_squares_line() -> None:
    fast_B = torch.tensor([0.0, 1.0, 2.0, 4.0, 9.0])
    slow_B = torch.tensor([1.0, 2.5, 2.0, 6.0, math.nan])
    line = stats.linregress(fast_B[:4], slow_B[:4])
    found = fit_scale(fast_B, slow_B)
    assert found.slope == pytest.approx(line.slope)
    assert found.offset == pytest.approx(line.intercept)
    residual = slow_B[:4] - line.intercept - line.slope * fast_B[:4]
    assert found.sigma == pytest.approx(residual.std(correction=0).item())
    with pytest.raises(ValueError, match="do not rise"):
        fit_scale(-fast_B, slow_B)
    with pytest.raises(ValueError, match="at least 3"):
        fit_scale(fast_B[3:], slow_B[3:])


def test_risk_coverage_by_hand() -> None:
    """Errors (0, 0, 1, 0), the most confident first."""
    curve = risk_coverage([4, 3, 2, 1], [0, 0, 1, 0])
    assert curve == pytest.approx([0, 0, 1 / 3, 1 / 4])
    assert area_under_risk_coverage([4, 3, 2, 1], [0, 0, 1, 0]) == pytest.approx(
        0.1458333, abs=1e-7
    )
    # the best order has the error last
    assert area_under_risk_coverage([4, 3, 1, 2], [0, 0, 1, 0]) == 0.0625


def test_thresholds_come_back_from_the_checkpoint(tmp_path: Path) -> None:
    pairs = threshold_from(
        [2.0] * 200,
        [0.0] * 200,
        method="clopper_pearson",
        risk="harm",
        alpha=0.02,
        delta=0.05,
        sha256=["a", "b"],
    )
    saved = Thinking(offset=0.1, slope=0.9, sigma=1.5, cots=1, pairs=pairs)
    saved.save(tmp_path)
    assert Thinking.load(tmp_path) == saved
    assert saved.threshold_of(1) is None
    assert saved.threshold_of(2) == pairs
    with pytest.raises(ValueError, match="--groups"):
        saved.threshold_of(3)
    (tmp_path / "thinking.json").write_text('{"sigma": -1}')
    with pytest.raises(ValueError, match=r"thinking\.json"):
        Thinking.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"calibrate\.py"):
        Thinking.load(tmp_path / "nowhere")
