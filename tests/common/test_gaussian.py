from __future__ import annotations

import math

import pytest
import torch

from common.gaussian import Gaussian, kl_same_std, log_prob


def test_log_prob_is_the_mean_of_torchs_normal():
    mean, x = (
        torch.randn(3, 2, 4, 5, dtype=torch.float64),
        torch.randn(3, 2, 4, 5, dtype=torch.float64),
    )
    expected_B = torch.distributions.Normal(mean, 0.45).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(
        log_prob(Gaussian(mean, 0.45), x), expected_B, rtol=1e-14, atol=1e-14
    )


def test_log_prob_by_hand():
    # offsets 1 and 3, std 2: mean of (1 + 9) / 2 = 5, 5 / 8 = 0.625
    got = log_prob(Gaussian(torch.zeros(1, 2), 2.0), torch.tensor([[1.0, 3.0]]))
    assert got.item() == pytest.approx(
        -0.625 - math.log(2.0) - 0.5 * math.log(2 * math.pi), abs=1e-6
    )


def test_one_mean_for_all_members_equals_a_mean_each():
    mean, x = torch.randn(1, 4, 2), torch.randn(5, 4, 2)
    torch.testing.assert_close(
        log_prob(Gaussian(mean, 0.3), x),
        log_prob(Gaussian(mean.expand(5, 4, 2), 0.3), x),
    )


def test_gradient_of_log_prob_is_the_score():
    # d/dmean of mean_n[-(x - mean)^2 / (2 s^2)] = (x - mean) / (n s^2)
    mean = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 6, dtype=torch.float64)
    log_prob(Gaussian(mean, 0.5), x).sum().backward()
    torch.testing.assert_close(
        mean.grad, ((x - mean.detach()) / (6 * 0.25)).sum(0, keepdim=True)
    )


def test_kl_equals_torchs():
    a, b = (
        torch.randn(2, 3, 4, dtype=torch.float64),
        torch.randn(2, 3, 4, dtype=torch.float64),
    )
    normal = torch.distributions.Normal
    expected_B = (
        torch.distributions.kl_divergence(normal(a, 0.7), normal(b, 0.7))
        .flatten(1)
        .mean(1)
    )
    torch.testing.assert_close(
        kl_same_std(Gaussian(a, 0.7), Gaussian(b, 0.7)), expected_B
    )


def test_kl_is_the_expected_log_ratio():
    p, q = (
        Gaussian(torch.full((1, 200_000), 0.3), 0.5),
        Gaussian(torch.full((1, 200_000), 0.1), 0.5),
    )
    x = p.mean + p.std * torch.randn(1, 200_000)
    # 0.2^2 / (2 * 0.25) = 0.08; the estimate's own deviation is 0.2 / 0.5 / sqrt(200,000) = 0.0009
    assert kl_same_std(p, q).item() == pytest.approx(0.08, abs=1e-6)
    assert (log_prob(p, x) - log_prob(q, x)).item() == pytest.approx(0.08, abs=0.004)


def test_half_precision_is_widened_before_the_difference():
    mean, x = torch.randn(1, 500).bfloat16(), torch.randn(2, 500).bfloat16()
    expected_B = (
        torch.distributions.Normal(mean.double(), 0.45).log_prob(x.double()).mean(1)
    )
    got_B = log_prob(Gaussian(mean, 0.45), x)
    assert got_B.dtype == torch.float32
    torch.testing.assert_close(
        got_B.double(), expected_B, rtol=1e-5, atol=0
    )  # bf16 arithmetic is off by 1e-3


@pytest.mark.parametrize("std", [-0.1, math.inf, math.nan])
def test_gaussian_with_invalid_std_raises(std):
    with pytest.raises(ValueError, match=r"Gaussian\.std"):
        Gaussian(torch.zeros(1, 2), std)


def test_log_prob_without_noise_raises():
    still = Gaussian(torch.zeros(1, 2), 0.0)
    with pytest.raises(ValueError, match="std"):
        log_prob(still, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="std"):
        kl_same_std(still, still)


def test_unfit_arguments_are_refused():
    with pytest.raises(ValueError, match="std"):
        kl_same_std(Gaussian(torch.zeros(1, 2), 0.5), Gaussian(torch.zeros(1, 2), 0.6))
    with pytest.raises(
        ValueError, match="shapes"
    ):  # (2, 3) against (3, 3) would need a rule nobody wrote down
        log_prob(Gaussian(torch.zeros(2, 3), 0.5), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="shapes"):
        log_prob(Gaussian(torch.zeros(2, 1), 0.5), torch.zeros(2, 3))
