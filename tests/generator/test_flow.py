"""The kernel and its weights: closed forms, published tables, and float64 by autograd."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from common.gaussian import kl_same_std, log_prob
from generator.flow import (
    Kernel,
    euler_step,
    guide,
    interpolate,
    velocity_target,
)
from generator.schedule import sigma_grid
from tests.kernels import effective_noise, sde_transition
from tests.tiny import stochastic_step

TAU = 0.45


class Weights(NamedTuple):
    policy: float
    kl: float


def loss_weights(
    sigma: float, after: float, *, noise_level: float, max_std: float | None
) -> Weights:
    """Weights of LongCat's terms: s / sqrt(delta) and its square, with the clipped s.

    `alignment.grpo_losses` computes them from the std.
    """
    policy = effective_noise(
        sigma, after, noise_level=noise_level, max_std=max_std
    ) / math.sqrt(sigma - after)
    return Weights(policy, policy**2)


# shift: (sigma, raw s sqrt(delta), c~, policy weight, KL weight) of the 16-step grid,
# steps 0 to 7, with tau = 0.45. Computed from the equations of LongCat-Video 2510.22200;
# the first raw value is that of sigma = 0.999999.
TABLES = {
    3.0: [
        (1.0000, 147.4, 1.000, 20.70, 428.5),
        (0.9783, 1.033, 1.095, 18.98, 360.1),
        (0.9545, 0.739, 1.186, 17.32, 300.2),
        (0.9286, 0.609, 1.273, 15.75, 248.1),
        (0.9000, 0.533, 1.356, 14.25, 203.1),
        (0.8684, 0.481, 1.437, 12.82, 164.5),
        (0.8333, 0.443, 1.500, 11.29, 127.5),
        (0.7941, 0.413, 1.500, 9.35, 87.4),
    ],
    12.0: [
        (1.0000, 74.3, 1.000, 81.45, 6634),
        (0.9945, 1.060, 1.090, 72.12, 5201),
        (0.9882, 0.772, 1.170, 63.35, 4013),
        (0.9811, 0.651, 1.239, 55.15, 3042),
        (0.9730, 0.584, 1.297, 47.52, 2258),
        (0.9635, 0.541, 1.345, 40.46, 1637),
        (0.9524, 0.514, 1.382, 33.96, 1153),
        (0.9391, 0.498, 1.409, 28.03, 786),
    ],
}


@pytest.mark.parametrize("shift", TABLES)
@pytest.mark.parametrize("step", range(8))
def test_published_table(shift: float, step: int) -> None:
    want_sigma, raw, gain, policy, kl = TABLES[shift][step]
    sigma, after = sigma_grid(16, shift=shift).tolist()[step : step + 2]
    assert sigma == pytest.approx(want_sigma, abs=0.55e-4)
    near = min(sigma, 0.999999)
    unbounded = effective_noise(near, after, noise_level=1.0, max_std=None) * math.sqrt(
        near - after
    )
    assert unbounded == pytest.approx(raw, rel=2e-3)
    weights = loss_weights(sigma, after, noise_level=1.0, max_std=TAU)
    # the rest agrees in every printed digit
    kernel = Kernel("sde", 1.0, TAU)
    assert kernel.gain(sigma, after) / (sigma - after) == pytest.approx(
        gain, abs=0.55e-3
    )
    assert weights.policy == pytest.approx(policy, abs=0.55e-2)
    assert weights.kl == pytest.approx(kl, abs=0.55 if kl % 1 == 0 else 0.055)


def test_weights_are_the_papers_where_nothing_is_clipped() -> None:
    sigma, after = 0.6, 0.55
    weights = loss_weights(sigma, after, noise_level=1.0, max_std=None)
    assert weights.policy == pytest.approx(math.sqrt(sigma / (0.05 * (1 - sigma))))
    assert weights.kl == pytest.approx(sigma / (0.05 * (1 - sigma)))
    gain = Kernel("sde", 1.0, None).gain(sigma, after)
    assert gain / 0.05 == pytest.approx(1.5)


def test_grid_by_hand() -> None:
    grid = sigma_grid(4, shift=3.0)
    assert grid.tolist() == pytest.approx([1, 2.25 / 2.5, 1.5 / 2, 0.75 / 1.5, 0])
    assert sigma_grid(5, shift=1.0).tolist() == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2, 0]
    )
    for shift in (0.5, 3.0, 12.0):
        values = sigma_grid(50, shift=shift).tolist()
        assert values[0] == 1.0
        assert values[-1] == 0.0
        assert all(a > b for a, b in pairwise(values))


def test_stochastic_step_is_uniform_and_fixed_by_the_seed() -> None:
    counts = torch.tensor([stochastic_step(seed, 6) for seed in range(6000)]).bincount(
        minlength=6
    )
    assert counts.sum() == 6000
    assert (
        (counts - 1000).abs() < 4 * math.sqrt(6000 * (1 / 6) * (5 / 6))
    ).all()  # four sigma of a binomial
    assert stochastic_step(17, 6) == stochastic_step(17, 6)


def test_zero_noise_is_the_euler_step_to_the_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 4, generator=draw), torch.randn(2, 3, 4, generator=draw)
    law = sde_transition(x, v, 0.8, 0.7, noise_level=0.0, max_std=TAU)
    assert law.std == 0.0
    assert torch.equal(law.mean, euler_step(x, v, 0.8, 0.7))
    assert torch.allclose(law.mean, x - 0.1 * v, atol=1e-6)


def test_mean_by_hand() -> None:
    # sigma .8 -> .7, a = 1: s^2 = 4,
    # mean = x (1 - 4 * .1 / 1.6) - v * .1 * (1 + 4 * .2 / 1.6) = .75 x - .15 v
    law = sde_transition(
        torch.tensor([2.0]),
        torch.tensor([3.0]),
        0.8,
        0.7,
        noise_level=1.0,
        max_std=None,
    )
    assert law.mean.item() == pytest.approx(0.75 * 2 - 0.15 * 3)
    assert law.std == pytest.approx(2 * math.sqrt(0.1))


def test_finite_at_pure_noise_only_with_a_ceiling() -> None:
    law = sde_transition(
        torch.ones(1), torch.ones(1), 1.0, 0.98, noise_level=1.0, max_std=TAU
    )
    assert law.std == pytest.approx(TAU)
    assert law.mean.item() == pytest.approx(
        1 - TAU**2 / 2 - 0.02
    )  # s^2 delta = tau^2, and (1 - sigma) = 0
    with pytest.raises(ValueError, match="infinite"):
        sde_transition(
            torch.ones(1), torch.ones(1), 1.0, 0.98, noise_level=1.0, max_std=None
        )


def test_gradient_of_log_prob_has_the_stated_sign_and_size() -> None:
    """d log p / d v = -c~ sqrt(delta) / s * xi / D, from the definition of the step (float64)."""
    draw = torch.Generator().manual_seed(1)
    sigma, after = 0.9, 0.86
    x = torch.randn(1, 2, 3, generator=draw, dtype=torch.float64)
    v = torch.randn(1, 2, 3, generator=draw, dtype=torch.float64).requires_grad_()
    xi = torch.randn(1, 2, 3, generator=draw, dtype=torch.float64)
    law = sde_transition(x, v, sigma, after, noise_level=1.0, max_std=TAU)
    sample = (law.mean + law.std * xi).detach()
    (gradient,) = torch.autograd.grad(log_prob(law, sample).sum(), v)
    s = TAU / math.sqrt(sigma - after)  # clipped here: sqrt(9) * .2 = .6 > .45
    gain = 1 + s**2 * (1 - sigma) / (2 * sigma)
    assert torch.allclose(
        gradient, -gain * math.sqrt(sigma - after) / s * xi / 6, atol=1e-13
    )


@pytest.mark.parametrize(
    ("sigma", "after"), [(0.9286, 0.90), (0.8684, 0.83), (0.70, 0.65)]
)
def test_reweighted_terms_are_free_of_the_schedule(sigma: float, after: float) -> None:
    """Equations 6 to 8: policy weight * gradient = -c~ xi / D.

    KL weight * KL = c~^2 / 2 * mean |v - v_ref|^2.
    """
    draw = torch.Generator().manual_seed(2)
    x, other, xi = (
        torch.randn(1, 8, generator=draw, dtype=torch.float64) for _ in range(3)
    )
    v = torch.randn(1, 8, generator=draw, dtype=torch.float64).requires_grad_()
    s = effective_noise(sigma, after, noise_level=1.0, max_std=TAU)
    gain = 1 + s**2 * (1 - sigma) / (2 * sigma)
    weights = loss_weights(sigma, after, noise_level=1.0, max_std=TAU)
    law = sde_transition(x, v, sigma, after, noise_level=1.0, max_std=TAU)
    (gradient,) = torch.autograd.grad(
        weights.policy * log_prob(law, (law.mean + law.std * xi).detach()).sum(), v
    )
    assert torch.allclose(gradient, -gain * xi / 8, atol=1e-12)
    reference = sde_transition(x, other, sigma, after, noise_level=1.0, max_std=TAU)
    kl = weights.kl * kl_same_std(law, reference)
    assert kl.item() == pytest.approx(
        gain**2 / 2 * (v - other).square().mean().item(), rel=1e-10
    )


@pytest.mark.parametrize("noise_level", [0.0, 0.5, 1.0])
def test_sde_keeps_the_marginal(noise_level: float) -> None:
    """For data N(0, s0^2) the velocity is linear in x, so x has a known spread at each sigma."""
    data_std, steps = 0.5, 400
    sigmas = sigma_grid(steps, shift=1.0).tolist()[
        8:
    ]  # away from sigma = 1, where the SDE's noise is unbounded
    variance = (1 - sigmas[0]) ** 2 * data_std**2 + sigmas[0] ** 2
    x = math.sqrt(variance) * torch.randn(
        60_000, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    draw = torch.Generator().manual_seed(4)
    for sigma, after in pairwise(sigmas):
        variance = (1 - sigma) ** 2 * data_std**2 + sigma**2
        v = x * (sigma - (1 - sigma) * data_std**2) / variance  # E[eps - x0 | x]
        law = sde_transition(x, v, sigma, after, noise_level=noise_level, max_std=None)
        x = law.mean + law.std * torch.randn(
            x.shape, generator=draw, dtype=torch.float64
        )
    assert x.std().item() == pytest.approx(data_std, rel=0.02)


# ---- the anchor kernel: data N(0, 0.25) has the flow map x_a = x_t sqrt(V_a / V_t)


def variance_at(sigma: float) -> float:
    return (1 - sigma) ** 2 * 0.25 + sigma**2


def std_after(kernel: Kernel, sigma: float, after: float) -> float:
    """Spread of the next x in closed form, where x has the marginal of sigma."""
    anchor = kernel.target(sigma, after)
    if anchor == sigma:
        slope = (sigma - (1 - sigma) * 0.25) / variance_at(sigma)
    else:
        moved = math.sqrt(variance_at(anchor) / variance_at(sigma))
        slope = (1 - moved) / (sigma - anchor)
    one = torch.ones(1, dtype=torch.float64)
    law = kernel.transition(one, slope * one, sigma, after)
    return math.sqrt(law.mean.item() ** 2 * variance_at(sigma) + law.std**2)


@pytest.mark.parametrize(
    ("sigma", "after", "want", "sde"),
    [(0.9, 0.8, 0.8062, 0.8253), (0.9, 0.5, 0.5590, 0.6025), (1, 0.94, 0.9405, 0.9512)],
)
def test_anchor_keeps_the_marginal_of_any_step(
    sigma: float, after: float, want: float, sde: float
) -> None:
    """sde has an error of first order in the step; its spreads here were sampled."""
    assert math.sqrt(variance_at(after)) == pytest.approx(want, abs=1e-4)
    for noise_level in (0.0, 0.3, 1.0):
        anchored = Kernel("anchor", noise_level, TAU)
        found = std_after(anchored, sigma, after)
        assert found == pytest.approx(math.sqrt(variance_at(after)), rel=1e-12)
    assert std_after(Kernel("sde", 1.0, TAU), sigma, after) == pytest.approx(
        sde, rel=3e-3
    )


@pytest.mark.parametrize(
    ("anchor", "std", "eta"),
    [(0.0, 0.5, 1.0), (0.2, 0.4841229, 0.8391387), (0.4, 0.3726780, 0.5354409)],
)
def test_anchor_on_straight_paths_is_cps(anchor: float, std: float, eta: float) -> None:
    """Where u does not depend on its end, both remove noise and add fresh noise."""
    draw = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64)
    kernel = Kernel("anchor", 1.0, std)
    assert kernel.target(0.8, 0.5) == pytest.approx(anchor, abs=1e-6)
    law = kernel.transition(x, v, 0.8, 0.5)
    other = Kernel("cps", eta).transition(x, v, 0.8, 0.5)
    assert law.std == pytest.approx(other.std, abs=1e-6)
    torch.testing.assert_close(law.mean, other.mean, atol=1e-6, rtol=0)
    gain = Kernel("cps", eta).gain(0.8, 0.5)
    assert kernel.gain(0.8, 0.5) == pytest.approx(gain, abs=1e-6)


def test_anchor_by_hand() -> None:
    # std 0.3 of 0.5: old noise 0.4, q = 0.8, a = 4/9, alpha = 0.5 / (5/9) = 0.9;
    # mean = 0.9 (2 - (0.8 - 4/9) 3) = 0.84, gain = 0.9 (0.8 - 4/9) = 0.32
    kernel = Kernel("anchor", 1.0, 0.3)
    law = kernel.transition(torch.tensor([2.0]), torch.tensor([3.0]), 0.8, 0.5)
    assert law.std == 0.3
    assert law.mean.item() == pytest.approx(0.84, abs=1e-6)
    assert kernel.gain(0.8, 0.5) == pytest.approx(0.32)
    # without noise the anchor is the end of the step, and the step a jump
    still = Kernel("anchor", 0.0, 0.3)
    assert still.target(0.8, 0.5) == pytest.approx(0.5)
    # a std above sigma_next is consistency sampling: jump to the video, noise from there
    full = Kernel("anchor", 1.0, 0.9)
    assert (full.target(0.8, 0.5), full._anchor_std(0.5)) == (0.0, 0.5)


def test_interpolation_and_velocity_agree() -> None:
    clean, noise = torch.tensor([[2.0]]), torch.tensor([[6.0]])
    assert interpolate(clean, noise, torch.tensor([0.25])).item() == 3.0
    assert (
        velocity_target(clean, noise).item() == 4.0
    )  # eps - x0: the derivative of the line above


def test_guidance_by_hand() -> None:
    assert guide(torch.tensor(3.0), torch.tensor(1.0), 4.0).item() == 9.0
    assert guide(torch.tensor(3.0), torch.tensor(1.0), 1.0).item() == 3.0
    half = torch.tensor(1.0, dtype=torch.bfloat16)
    assert guide(half, half, 5.0).dtype == torch.float32
