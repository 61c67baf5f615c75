"""Bradley-Terry with and without ties, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rm.losses import bradley_terry


def test_bradley_terry_by_hand():
    win, lose = torch.tensor([1.0, math.log(3.0)]), torch.tensor([1.0, 0.0])
    out = bradley_terry(win, lose)
    # sig(0) = 1/2, sig(log 3) = 3/4
    assert out.loss.item() == pytest.approx(
        (math.log(2) + math.log(4 / 3)) / 2, abs=1e-6
    )
    assert out.metrics == {"accuracy": 0.5, "margin": pytest.approx(math.log(3) / 2)}


def test_gradient_by_hand():
    win = torch.tensor([math.log(3.0)], dtype=torch.float64, requires_grad=True)
    bradley_terry(win, torch.zeros(1, dtype=torch.float64)).loss.backward()
    assert win.grad.item() == pytest.approx(-(1 - 0.75), abs=1e-12)


def test_ties_do_not_dilute():
    win, lose = torch.tensor([2.0, 0.5]), torch.tensor([0.0, 1.0])
    alone = bradley_terry(win, lose)
    tie = torch.tensor([False, True, False, True])
    mixed = bradley_terry(
        torch.tensor([2.0, 9.0, 0.5, -3.0]),
        torch.tensor([0.0, 1.0, 1.0, 1.0]),
        tie_N=tie,
    )
    assert mixed.loss.item() == pytest.approx(alone.loss.item(), abs=1e-7)
    assert mixed.metrics == alone.metrics


def test_only_ties_is_zero_with_zero_gradient():
    win = torch.tensor([2.0, 1.0], requires_grad=True)
    out = bradley_terry(win, torch.zeros(2), tie_N=torch.tensor([True, True]))
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert win.grad.tolist() == [0.0, 0.0]
    assert out.metrics == {}


def test_partial_losses_with_global_count_sum_to_full_loss():
    draw = torch.Generator().manual_seed(0)
    win, lose = torch.randn(2, 9, generator=draw).unbind()
    tie = torch.tensor([False, True, False] * 3)
    whole = bradley_terry(win, lose, tie_N=tie).loss
    pieces = [
        bradley_terry(win[s], lose[s], tie_N=tie[s], count=6).loss
        for s in (slice(0, 2), slice(2, 9))
    ]
    assert sum(pieces).item() == pytest.approx(whole.item(), abs=1e-6)


def test_ties_with_theta_by_hand():
    zero = torch.zeros(1)
    tie = torch.tensor([True])
    # theta = 5 and equal rewards: P(tie) = (25 - 1) / (1 + 5)^2 = 2/3, P(A wins) = 1 / (1 + 5)
    assert bradley_terry(zero, zero, tie_N=tie, theta=5.0).loss.item() == pytest.approx(
        math.log(1.5), abs=1e-6
    )
    assert bradley_terry(zero, zero, theta=5.0).loss.item() == pytest.approx(
        math.log(6.0), abs=1e-6
    )
    both = bradley_terry(
        torch.zeros(2), torch.zeros(2), tie_N=torch.tensor([True, False]), theta=5.0
    )
    assert both.loss.item() == pytest.approx(
        (math.log(1.5) + math.log(6.0)) / 2, abs=1e-6
    )  # a tie counts here


@pytest.mark.parametrize("margin", [-3.0, 0.0, 0.7, 8.0])
def test_probabilities_of_the_three_outcomes_sum_to_one(margin):
    a, b = (
        torch.tensor([margin], dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
    )
    losses = [
        bradley_terry(a, b, theta=3.0),
        bradley_terry(b, a, theta=3.0),
        bradley_terry(a, b, tie_N=torch.tensor([True]), theta=3.0),
    ]
    assert sum(math.exp(-out.loss.item()) for out in losses) == pytest.approx(
        1.0, abs=1e-12
    )


def test_extreme_margins_stay_finite():
    win = torch.tensor([500.0, -500.0], requires_grad=True)
    loss = bradley_terry(win, torch.zeros(2)).loss
    loss.backward()
    assert loss.item() == pytest.approx(250.0)
    assert win.grad.tolist() == pytest.approx([0.0, -0.5])


def test_bfloat16_is_summed_in_fp32():
    win = torch.full((3,), 1.0, dtype=torch.bfloat16)
    assert bradley_terry(win, torch.zeros_like(win)).loss.dtype == torch.float32


@pytest.mark.parametrize(
    "kwargs",
    [
        {"theta": 1.0},
        {"count": 0},
        {"tie_N": torch.tensor([0.0, 1.0])},
        {"tie_N": torch.tensor([True])},
        {"lose_N": torch.zeros(3)},
    ],
)
def test_wrong_arguments(kwargs):
    arguments = {"win_N": torch.zeros(2), "lose_N": torch.zeros(2), **kwargs}
    with pytest.raises(
        ValueError,
        match=next(iter(kwargs)).removesuffix("_N").replace("lose", "bradley_terry"),
    ):
        bradley_terry(arguments.pop("win_N"), arguments.pop("lose_N"), **arguments)
