"""Policy-gradient functions at their edges: infinite rewards, ratios below 1, small KL."""

from __future__ import annotations

import math

import pytest
import torch

from common.policy_gradient import (
    clipped_surrogate,
    group_advantages,
    k3_kl,
    token_surrogate,
)


def test_largest_deviation_counts_ratios_below_1() -> None:
    # ratios 0.5 and 1.1: the largest distance from 1 is 0.5
    log_prob = torch.tensor([0.5, 1.1]).log()
    output = clipped_surrogate(
        log_prob, torch.zeros(2), torch.ones(2), clip_low=math.inf, clip_high=math.inf
    )
    assert output.metrics["ratio_dev"] == pytest.approx(0.5, abs=1e-6)


def test_batch_scale_leaves_out_infinite_rewards() -> None:
    reward_PG = torch.tensor([[1.0, 3.0, math.inf], [math.nan, 5.0, 7.0]])
    # finite rewards 1, 3, 5, 7: mean 4, population variance (9 + 1 + 1 + 9) / 4 = 5
    unit = 1.0 / math.sqrt(5.0)
    want = torch.tensor([[-unit, unit, 0.0], [0.0, -unit, unit]])
    got = group_advantages(reward_PG, scale="batch", eps=0.0)
    torch.testing.assert_close(got, want)


def test_token_surrogate_has_no_gradient_through_the_old_policy() -> None:
    current = torch.tensor([[0.1, -0.2]], requires_grad=True)
    old = torch.tensor([[0.0, 0.1]], requires_grad=True)
    output = token_surrogate(
        current,
        old,
        torch.tensor([[2.0]]),
        clip_low=math.inf,
        clip_high=math.inf,
        mask=torch.ones(1, 2, dtype=torch.bool),
        count=2.0,
    )
    output.loss.backward()
    # d/dx of -(2 exp(x - old)) / 2
    want = [-math.exp(0.1), -math.exp(-0.3)]
    assert current.grad[0].tolist() == pytest.approx(want, rel=1e-6)
    assert old.grad is None


def test_small_kl_keeps_its_digits_in_fp32() -> None:
    # exp(d) - 1 - d = d^2 / 2 + d^3 / 6 + ...
    for d in (1e-4, -1e-4, 3e-5):
        got = k3_kl(torch.zeros(1), torch.tensor([d])).item()
        assert got > 0
        assert got == pytest.approx(d * d / 2, rel=2e-3)
