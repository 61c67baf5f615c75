"""Samplers of the related algorithms: stochastic steps, shared noise, kernels and tails."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.distributed import derive_seed
from common.gaussian import log_prob
from generator.config import SamplerConfig
from generator.flow import (
    Kernel,
    euler_step,
)
from generator.sampler import initial_noise, member_noise, ode, ode_ab2
from generator.schedule import sigma_grid, stochastic_steps, tail_grid
from generator.wan import WanGenerator
from tests.generator.test_sampler import (
    SHAPE,
    SIGMAS,
    STEPS,
    bend,
    noise_of,
    sample_group,
)
from tests.kernels import cps_transition, sde_transition
from tests.tiny import tiny_config, tiny_generator

SDE = Kernel("sde", 1.0, 0.45)


def group_of(velocity: Callable[[Tensor, float], Tensor] = bend, **changes: object):
    values = {"seed": 7, "size": 3, "steps": [1], "batch": 2}
    return sample_group(velocity, **{**values, **changes})


# ---- which steps


def test_stochastic_steps_of_all_and_window() -> None:
    every = SamplerConfig(
        num_steps=10, stochastic="all", stochastic_first=1, stochastic_range=5
    )
    assert stochastic_steps(3, every) == (1, 2, 3, 4)
    moving = SamplerConfig(
        stochastic="window", stochastic_range=8, window_size=3, window_every=10
    )
    starts = [stochastic_steps(3, moving, iteration=i) for i in (0, 9, 10, 49, 50, 999)]
    assert starts == [(0, 1, 2), (0, 1, 2), (1, 2, 3), (4, 5, 6), (5, 6, 7), (5, 6, 7)]
    assert (
        every.steps_per_group,
        moving.steps_per_group,
        SamplerConfig().steps_per_group,
    ) == (4, 3, 1)


def test_stochastic_step_may_start_later() -> None:
    late = SamplerConfig(stochastic_first=2, stochastic_range=5)
    assert {stochastic_steps(seed, late) for seed in range(60)} == {(2,), (3,), (4,)}


# ---- what a walk with several stochastic steps is


def test_every_step_of_flow_grpo_by_another_route() -> None:
    """All six steps stochastic, a noise of its own for each member: one member walked by hand."""
    group = group_of(steps=range(STEPS), shared_noise=False)
    assert len(group.steps) == STEPS
    for member in range(3):
        x = noise_of(derive_seed(7, "initial", member), "noise").unsqueeze(0)
        for k, step in enumerate(group.steps):
            assert torch.allclose(step.latent_MCFHW[member : member + 1], x, atol=1e-6)
            law = sde_transition(
                x,
                bend(x, SIGMAS[k]),
                SIGMAS[k],
                SIGMAS[k + 1],
                noise_level=1.0,
                max_std=0.45,
            )
            x = law.mean + law.std * member_noise(7, member, SHAPE, number=k)
            assert torch.allclose(step.next_GCFHW[member : member + 1], x, atol=1e-5)
            assert step.log_prob_G[member].item() == pytest.approx(
                log_prob(law, x).item(), abs=1e-5
            )
        assert torch.allclose(group.clean_GCFHW[member : member + 1], x, atol=1e-5)


def test_noises_of_different_steps_and_members_are_different() -> None:
    drawn = [
        member_noise(7, member, SHAPE, number=number)
        for member in range(3)
        for number in range(3)
    ]
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == 9
    assert torch.equal(
        drawn[0], noise_of(7, "member", 0)
    )  # as before there were several steps


def test_shared_noise_is_shared_until_the_first_stochastic_step() -> None:
    first, second = group_of(steps=[1, 2]).steps
    assert first.latent_MCFHW.shape[0] == 1
    assert second.latent_MCFHW.shape[0] == 3
    assert torch.equal(second.latent_MCFHW, first.next_GCFHW)


@pytest.mark.parametrize(
    ("shared", "steps"),
    [(True, (1,)), (True, (1, 2, 3)), (False, (2,)), (False, tuple(range(6)))],
)
def test_velocity_samples_are_counted(*, shared: bool, steps: tuple[int, ...]) -> None:
    seen: list[int] = []

    def counted(x: Tensor, sigma: float) -> Tensor:
        seen.append(len(x))
        return bend(x, sigma)

    group_of(counted, shared_noise=shared, steps=steps)
    alone = steps[0] + 1 if shared else 0  # velocities of the one latent that all share
    assert sum(seen) == alone + 3 * (STEPS - alone)
    assert max(seen) <= 2


def test_stochastic_steps_with_a_gap_are_refused() -> None:
    with pytest.raises(ValueError, match="consecutive"):
        group_of(steps=[0, 2])


# ---- Flow-CPS


def test_cps_by_hand() -> None:
    """sigma 0.8 -> 0.5, eta 0.5: std = 0.5 sin(45 deg); x 1, v 0.25: video 0.8, noise 1.05."""
    law = cps_transition(
        torch.tensor([[1.0]]), torch.tensor([[0.25]]), 0.8, 0.5, noise_level=0.5
    )
    kept = math.sqrt(0.25 - 0.125)
    assert law.std == pytest.approx(0.5 * math.sin(math.pi / 4))
    assert law.mean.item() == pytest.approx(0.5 * 0.8 + kept * 1.05, abs=1e-6)


def test_cps_without_noise_is_the_euler_step() -> None:
    x, v = torch.randn(2, 2, 9, dtype=torch.float64)
    law = cps_transition(x, v, 0.8, 0.5, noise_level=0.0)
    assert law.std == 0.0
    torch.testing.assert_close(law.mean, euler_step(x, v, 0.8, 0.5), atol=1e-12, rtol=0)


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_cps_keeps_the_marginal_of_a_single_data_point(
    noise_level: float,
) -> None:
    """With a single data point c, v = (x - c) / sigma and x stays N((1 - sigma) c, sigma^2)."""
    torch.manual_seed(0)
    c, grid = 0.7, sigma_grid(12, shift=3.0).tolist()
    x = torch.randn(200_000, dtype=torch.float64)
    for sigma, after in pairwise(grid[:-1]):
        law = cps_transition(x, (x - c) / sigma, sigma, after, noise_level=noise_level)
        x = law.mean + law.std * torch.randn_like(x)
        assert x.mean().item() == pytest.approx(
            (1 - after) * c, abs=4 * after / math.sqrt(200_000)
        )
        assert x.std().item() == pytest.approx(after, rel=0.01)


@pytest.mark.parametrize(("sigma", "after"), [(0.95, 0.9), (0.8, 0.5), (0.3, 0.1)])
@pytest.mark.parametrize(
    "kernel", [SDE, Kernel("sde", 0.7, None), Kernel("cps", 0.6, None)]
)
def test_gain_is_the_derivative_of_the_mean(
    kernel: Kernel, sigma: float, after: float
) -> None:
    x, v = torch.randn(2, 1, 3, dtype=torch.float64)
    v.requires_grad_()
    (slope,) = torch.autograd.grad(kernel.transition(x, v, sigma, after).mean.sum(), v)
    assert slope[0].tolist() == pytest.approx(
        [-kernel.gain(sigma, after)] * 3, rel=1e-12
    )


def test_gains_by_hand() -> None:
    assert Kernel("cps", 1.0).gain(0.8, 0.5) == pytest.approx(
        0.8 * 0.5
    )  # nothing of the old noise is kept
    assert Kernel("cps", 0.0).gain(0.8, 0.5) == pytest.approx(0.3)  # delta, the ODE's
    assert Kernel("sde", 0.0, 0.45).gain(0.8, 0.5) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kernel": "cps", "noise_level": 0.5}, ["max_std", "null", "cps"]),
        (
            {"kernel": "cps", "noise_level": 1.5, "max_std": None},
            ["noise_level", "1.5"],
        ),
        (
            {
                "kernel": "cps",
                "noise_level": 0.5,
                "max_std": None,
                "stochastic_range": 16,
            },
            ["stochastic_range", "16"],
        ),
        ({"stochastic_first": 6}, ["stochastic_first", "6"]),
        ({"stochastic": "window", "window_size": 7}, ["window_size", "7", "6"]),
        ({"window_every": 0}, ["window_every", "0"]),
        ({"tail_steps": 0}, ["tail_steps", "0"]),
        ({"tail_guidance": 0.5}, ["tail_guidance", "0.5"]),
    ],
)
def test_contradicting_sampler_settings_raise(values: dict, words: list[str]) -> None:
    with pytest.raises(ValueError, match="SamplerConfig") as caught:
        SamplerConfig(**values)
    assert all(word in str(caught.value) for word in words)


def test_noise_without_a_ceiling_may_start_below_one() -> None:
    assert SamplerConfig(max_std=None, stochastic_first=1).max_std is None


# ---- the tail


@pytest.mark.parametrize(("walk", "order"), [(ode, 1.0), (ode_ab2, 2.0)])
def test_order_of_convergence(walk: Callable, order: float) -> None:
    """x' = v = x cos(3 sigma) has x(0) = x(1) exp(-sin(3) / 3).

    Halving the steps divides the error by 2^order.
    """
    exact = math.exp(-math.sin(3.0) / 3.0)
    errors = []
    for steps in (64, 128):
        x = walk(
            lambda x, sigma: x * math.cos(3 * sigma),
            torch.ones(1, 1, dtype=torch.float64),
            sigma_grid(steps, shift=2.0).tolist(),
        )
        errors.append(abs(x.item() - exact))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_ab2_is_exact_for_velocity_linear_in_sigma() -> None:
    """For v = sigma all steps after the first Euler step are exact, with any step lengths."""
    grid = [1.0, 0.9, 0.55, 0.5, 0.0]
    x = ode_ab2(
        lambda x, sigma: torch.full_like(x, sigma),
        torch.zeros(1, 1, dtype=torch.float64),
        grid,
    )
    first = -(1.0 - 0.9) * 1.0
    assert x.item() == pytest.approx(first - 0.9**2 / 2, abs=1e-12)


def test_tail_grid_is_the_grid_where_the_steps_are_the_grids() -> None:
    grid = sigma_grid(16, shift=3.0)
    torch.testing.assert_close(
        tail_grid(grid[5].item(), 11, shift=3.0), grid[5:], atol=1e-12, rtol=0
    )
    assert tail_grid(0.7, 1, shift=3.0).tolist() == [0.7, 0.0]


def wan(folder: Path, **sampler: object) -> WanGenerator:
    base = tiny_config(folder).sampler
    return tiny_generator(folder, sampler=dataclasses.replace(base, **sampler))


def rolled(generator: WanGenerator) -> tuple[Tensor, int]:
    """Clean latents of a group of seed 1, and the transformer's samples."""
    seen: list[int] = []
    hook = generator.module.get_base_model().register_forward_hook(
        lambda _, __, out: seen.append(len(out[0]))
    )
    (group,) = generator.rollout(["a cat"], group_size=2, seeds=[1])
    hook.remove()
    return group.clean_GCFHW, sum(seen)


def test_tail_options_change_only_tail_and_forwards(
    folder: Path,
) -> None:
    (k,) = stochastic_steps(1, wan(folder).cfg.sampler)
    left = 6 - 1 - k
    plain, cost = rolled(wan(folder))
    assert cost == 2 * (k + 1 + 2 * left)
    for options, want in (
        ({"tail_guidance": 1.0}, 2 * (k + 1) + 2 * left),
        ({"tail_steps": 2}, 2 * (k + 1 + 2 * 2)),
        ({"tail_solver": "ab2"}, cost),
        ({"tail_steps": 99}, cost),
    ):
        generator = wan(folder, **options)
        clean, found = rolled(generator)
        assert found == want, options
        same = torch.equal(clean, plain)
        assert same == (options == {"tail_steps": 99}), options
        (group,) = generator.rollout(["a cat"], group_size=2, seeds=[1])
        (other,) = wan(folder).rollout(["a cat"], group_size=2, seeds=[1])
        assert torch.equal(
            group.steps[0].next_GCFHW, other.steps[0].next_GCFHW
        )  # what is trained stays


@pytest.mark.parametrize(
    "sampler",
    [
        {"stochastic": "all", "stochastic_range": 6, "initial_noise": "member"},
        {"stochastic": "window", "window_size": 2},
        {"initial_noise": "member"},
        {"kernel": "cps", "noise_level": 0.7, "max_std": None},
    ],
)
def test_first_ratio_is_one_for_related_algorithms(folder: Path, sampler: dict) -> None:
    generator = wan(folder, **sampler)
    for group in generator.rollout(["a cat", "rain"], group_size=2, seeds=[1, 2]):
        assert len(group.steps) == generator.cfg.sampler.steps_per_group
        for step in group.steps:
            got = log_prob(generator.transition(group.prompt, step), step.next_GCFHW)
            torch.testing.assert_close(got.detach(), step.log_prob_G, atol=1e-5, rtol=0)


def test_member_noise_follows_its_seed(folder: Path) -> None:
    generator = wan(
        folder, initial_noise="member", stochastic="all", stochastic_range=6
    )
    (group,) = generator.rollout(["a cat"], group_size=3, seeds=[5])
    for member in range(3):
        want = initial_noise(derive_seed(5, "initial", member), generator.latent_shape)
        assert torch.equal(group.steps[0].latent_MCFHW[member], want)
