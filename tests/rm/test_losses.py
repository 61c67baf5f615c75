"""Bradley-Terry with and without ties, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rm.losses import bradley_terry, preference_loss


def loss_of(chosen, rejected, tie=None, **options) -> torch.Tensor:
    if tie is None:
        tie = [False] * len(chosen)
    return bradley_terry(chosen, rejected, torch.tensor(tie), **options)


def test_bradley_terry_by_hand():
    win, lose = torch.tensor([1.0, math.log(3.0)]), torch.tensor([1.0, 0.0])
    # sig(0) = 1/2, sig(log 3) = 3/4
    assert loss_of(win, lose).tolist() == pytest.approx(
        [math.log(2), math.log(4 / 3)], abs=1e-6
    )


def test_gradient_by_hand():
    win = torch.tensor([math.log(3.0)], dtype=torch.float64, requires_grad=True)
    loss_of(win, torch.zeros(1, dtype=torch.float64)).sum().backward()
    assert win.grad.item() == pytest.approx(-(1 - 0.75), abs=1e-12)


def test_ties_do_not_dilute():
    win, lose = torch.tensor([2.0, 0.5]), torch.tensor([0.0, 1.0])
    mixed = loss_of(
        torch.tensor([2.0, 9.0, 0.5, -3.0]),
        torch.tensor([0.0, 1.0, 1.0, 1.0]),
        [False, True, False, True],
    )
    assert mixed[[1, 3]].tolist() == [0.0, 0.0]
    assert torch.equal(mixed[[0, 2]], loss_of(win, lose))


def test_only_ties_is_zero_with_zero_gradient():
    win = torch.tensor([2.0, 1.0], requires_grad=True)
    loss = loss_of(win, torch.zeros(2), [True, True]).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert win.grad.tolist() == [0.0, 0.0]


def test_partial_losses_with_global_count_sum_to_full_loss():
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(9, 2, 1, generator=draw)
    labels = torch.tensor([[1.0], [0.0], [-1.0]] * 3)
    whole, *pieces = (
        preference_loss(rewards[s], labels[s], weight_K=(1.0,), count_K=(6,))
        for s in (slice(0, 9), slice(0, 2), slice(2, 9))
    )
    assert sum(pieces).item() == pytest.approx(whole.item(), abs=1e-6)


def test_ties_with_theta_by_hand():
    zero = torch.zeros(2)
    # theta = 5 and equal rewards: P(tie) = (25 - 1) / (1 + 5)^2 = 2/3, P(A wins) = 1 / (1 + 5)
    assert loss_of(zero, zero, [True, False], theta=5.0).tolist() == pytest.approx(
        [math.log(1.5), math.log(6.0)], abs=1e-6
    )


@pytest.mark.parametrize("margin", [-3.0, 0.0, 0.7, 8.0])
def test_probabilities_of_the_three_outcomes_sum_to_one(margin):
    a, b = (
        torch.tensor([margin], dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
    )
    losses = [
        loss_of(a, b, theta=3.0),
        loss_of(b, a, theta=3.0),
        loss_of(a, b, [True], theta=3.0),
    ]
    assert sum(math.exp(-loss.item()) for loss in losses) == pytest.approx(
        1.0, abs=1e-12
    )


def test_extreme_margins_stay_finite():
    win = torch.tensor([500.0, -500.0], requires_grad=True)
    loss = loss_of(win, torch.zeros(2)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(500.0)
    assert win.grad.tolist() == pytest.approx([0.0, -1.0])


def test_bfloat16_is_computed_in_fp32():
    win = torch.full((3,), 1.0, dtype=torch.bfloat16)
    assert loss_of(win, torch.zeros_like(win)).dtype == torch.float32
