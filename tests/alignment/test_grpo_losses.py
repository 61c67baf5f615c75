"""The GRPO loss against numbers from the paper, from hand and from finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.grpo_losses import grpo_group_loss, step_weights
from common import gaussian
from generator.schedule import sigma_grid
from tests.kernels import effective_noise, sde_transition

# spec alignment 1.3: 16 steps, shift 3, tau 0.45: (step, lambda_policy, lambda_KL)
TABLE = [
    (1, 18.98, 360.1),
    (2, 17.32, 300.2),
    (3, 15.75, 248.1),
    (4, 14.25, 203.1),
    (5, 12.82, 164.5),
]


@pytest.mark.parametrize(("step", "policy", "kl"), TABLE)
def test_weights_are_those_of_the_table(step: int, policy: float, kl: float) -> None:
    # the table's grid ends at 1/1000 instead of 0, hence the tolerance
    u = [1 - i * (1 - 1e-3) / 16 for i in (step, step + 1)]
    sigma, sigma_next = (3 * v / (1 + 2 * v) for v in u)
    weights = step_weights(0.45, sigma=sigma, sigma_next=sigma_next, gain=1.0)
    assert weights.policy == pytest.approx(policy, rel=2e-3)
    assert weights.kl == pytest.approx(kl, rel=4e-3)


@pytest.mark.parametrize("step", range(16))
def test_weights_from_the_std_equal_those_from_the_sampler_settings(step: int) -> None:
    sigmas = sigma_grid(16, shift=3.0)
    sigma, sigma_next = float(sigmas[step]), float(sigmas[step + 1])
    x = torch.zeros(1, 2)
    law = sde_transition(x, x, sigma, sigma_next, noise_level=1.0, max_std=0.45)
    s, delta = (
        effective_noise(sigma, sigma_next, noise_level=1.0, max_std=0.45),
        sigma - sigma_next,
    )
    weights = step_weights(law.std, sigma=sigma, sigma_next=sigma_next, gain=1.0)
    assert weights == pytest.approx((s / math.sqrt(delta), s**2 / delta), rel=1e-12)


def test_step_weights_without_noise_raise() -> None:
    with pytest.raises(ValueError, match="std"):
        step_weights(0.0, sigma=0.9, sigma_next=0.8, gain=1.0)


def test_loss_by_hand() -> None:
    """Ratios 1 and e^0.1, advantages 1 and -2, clip 0.05: min(r A, clip(r) A) is 1 and -2 e^0.1."""
    output = grpo_group_loss(
        torch.tensor([0.0, 0.1], dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
        torch.tensor([1.0, -2.0], dtype=torch.float64),
        torch.tensor([0.3], dtype=torch.float64),
        policy_weight=10.0,
        kl_weight_scaled=7.0,
        clip_low=0.05,
        clip_high=0.05,
    )
    by_hand = 10.0 * -(1.0 - 2.0 * math.exp(0.1)) / 2 + 7.0 * 0.3
    assert float(output.loss) == pytest.approx(by_hand, rel=1e-12)
    assert output.metrics["ratio_dev"] == pytest.approx(math.exp(0.1) - 1)
    assert output.metrics["kl"] == pytest.approx(0.3)
    assert output.metrics["loss"] == pytest.approx(by_hand)


def test_on_policy_ratio_is_one_with_the_gradient_of_the_log_prob() -> None:
    """d/dlogp of -w mean(r A) at r = 1 is -w A / G; the ratio to the old log-probs is a metric."""
    log_prob_G = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    output = grpo_group_loss(
        log_prob_G,
        torch.tensor([0.3, -0.3], dtype=torch.float64),
        torch.tensor([1.0, -2.0], dtype=torch.float64),
        None,
        policy_weight=10.0,
        kl_weight_scaled=0.0,
        clip_low=0.05,
        clip_high=0.05,
        on_policy=True,
    )
    assert float(output.loss.detach()) == pytest.approx(5.0, rel=1e-12)
    output.loss.backward()
    assert log_prob_G.grad.tolist() == pytest.approx([-5.0, 10.0], rel=1e-12)
    assert output.metrics["ratio_dev"] == pytest.approx(math.exp(0.1) - 1)
    assert output.metrics["ratio_mean"] == pytest.approx((1 + math.exp(0.1)) / 2)
    assert output.metrics["clip_frac"] == 0.0


def test_clip_of_none_is_never_active() -> None:
    log_prob_G = torch.tensor([3.0, -3.0], dtype=torch.float64, requires_grad=True)
    zero_G = torch.zeros(2, dtype=torch.float64)
    one_G = torch.ones(2, dtype=torch.float64)
    output = grpo_group_loss(
        log_prob_G, zero_G, one_G, None, policy_weight=1.0, kl_weight_scaled=0.0
    )
    assert output.metrics["clip_frac"] == 0.0
    output.loss.backward()
    assert log_prob_G.grad.tolist() == pytest.approx(
        [-math.exp(3) / 2, -math.exp(-3) / 2]
    )


# sigma, tau: clipped, and (tau None) the paper's own unclipped case where c~ = 3/2
CASES = [
    (0.9286, 0.9, 0.45),
    (0.8684, 0.8333, 0.45),
    (1.0, 0.9783, 0.45),
    (0.7, 0.65, None),
    (0.9, 0.8684, None),
]


@pytest.mark.parametrize(("sigma", "sigma_next", "tau"), CASES)
def test_grpo_loss_gradient_equals_the_equation(
    sigma: float, sigma_next: float, tau: float | None
) -> None:
    """d loss / dv = (c~ mean_g[A_g xi_g] + beta c~^2 (v - v_ref)) / D.

    The KL term is beta c~^2 mean|dv|^2 / 2.
    """
    torch.manual_seed(1)
    members, size, beta = 3, 8, 0.5
    x, v_ref = torch.randn(2, 1, size, dtype=torch.float64)
    v = (v_ref + 0.1 * torch.randn(1, size, dtype=torch.float64)).requires_grad_()
    xi = torch.randn(members, size, dtype=torch.float64)
    advantage_G = torch.tensor([1.0, -0.4, 0.3], dtype=torch.float64)
    noise = {"noise_level": 1.0, "max_std": tau}

    def loss_at(velocity: torch.Tensor) -> torch.Tensor:
        law = sde_transition(x, velocity, sigma, sigma_next, **noise)
        reference = sde_transition(x, v_ref, sigma, sigma_next, **noise)
        old = sde_transition(x, v.detach(), sigma, sigma_next, **noise)
        after = old.mean + old.std * xi
        weights = step_weights(law.std, sigma=sigma, sigma_next=sigma_next, gain=1.0)
        return grpo_group_loss(
            gaussian.log_prob(law, after),
            gaussian.log_prob(old, after),
            advantage_G,
            gaussian.kl_same_std(law, reference),
            policy_weight=weights.policy,
            kl_weight_scaled=beta * weights.kl,
        ).loss

    delta = sigma - sigma_next
    s = math.sqrt(sigma / (1 - sigma)) if tau is None else tau / math.sqrt(delta)
    c = 1 + s**2 * (1 - sigma) / (2 * sigma)
    if tau is None:
        assert c == pytest.approx(1.5)
    expected = (
        c * (advantage_G[:, None] * xi).mean(0) + beta * c**2 * (v - v_ref).detach()[0]
    ) / size

    loss = loss_at(v)
    assert float(loss.detach()) == pytest.approx(
        -s / math.sqrt(delta) * float(advantage_G.mean())
        + beta * c**2 / 2 * float((v - v_ref).detach().square().mean()),
        rel=1e-9,
    )
    (by_autograd,) = torch.autograd.grad(loss, v)
    assert torch.allclose(by_autograd[0], expected, rtol=1e-9, atol=1e-12)
    for i in range(0, size, 3):
        step = torch.zeros_like(v)
        step[0, i] = 1e-5
        with torch.no_grad():
            difference = (loss_at(v + step) - loss_at(v - step)) / 2e-5
        assert float(difference) == pytest.approx(float(expected[i]), rel=1e-6)
