"""Signs of hacking: the paired test and the KL weight, by hand and against scipy."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from alignment.drift import adapted_kl_weight, paired_change


def test_paired_change_by_hand() -> None:
    """(-.1, -.1, -.1, .1): mean -.05, SE .05, z -1; 16 copies: SE .0109, z -4.58."""
    once = paired_change([0.9, 0.9, 0.9, 1.1], [1.0] * 4)
    assert once.mean == pytest.approx(-0.05)
    assert once.error == pytest.approx(0.05)
    assert once.z == pytest.approx(-1.0)
    often = paired_change([0.9, 0.9, 0.9, 1.1] * 16, [1.0] * 64)
    assert often.error == pytest.approx(0.0109, abs=5e-5)
    assert often.z == pytest.approx(-4.58, abs=5e-3)


def test_paired_change_is_the_statistic_of_the_paired_t_test() -> None:
    now = [0.3, -1.2, 2.2, None, 0.8, math.nan]
    before = [0.1, -1.0, 1.0, 3.0, 0.1, 2.0]
    want = stats.ttest_rel([0.3, -1.2, 2.2, 0.8], [0.1, -1.0, 1.0, 0.1])
    assert paired_change(now, before).z == pytest.approx(want.statistic)


def test_paired_change_without_spread() -> None:
    assert paired_change([1.0, 2.0], [1.0, 2.0]).z == 0
    assert paired_change([0.0, 0.0], [1.0, 1.0]).z == -math.inf
    assert math.isnan(paired_change([1.0], [0.0]).z)


@pytest.mark.parametrize(
    ("kl", "weight"),
    [
        # above 1.5 x 0.2, below 0.2 / 1.5, between
        (0.31, 1.5),
        (0.29, 1.0),
        (0.14, 1.0),
        (0.13, 1 / 1.5),
        (math.nan, 1.0),
    ],
)
def test_kl_weight_moves_by_half_outside_of_the_band(kl: float, weight: float) -> None:
    found = adapted_kl_weight(1.0, kl, target=0.2, first=1.0)
    assert found == pytest.approx(weight)


def test_kl_weight_stays_within_a_hundredfold() -> None:
    weight = 1.0
    for _ in range(50):
        weight = adapted_kl_weight(weight, 0.0, target=0.2, first=1.0)
    assert weight == 0.01
    for _ in range(50):
        weight = adapted_kl_weight(weight, 9.0, target=0.2, first=1.0)
    assert weight == 100.0
