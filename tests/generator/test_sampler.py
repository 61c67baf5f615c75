"""The shared-prefix rollout on velocities whose answers are known, without a model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common.distributed import derive_seed
from common.memory import AdaptiveBatcher
from common.types import Group
from generator.flow import Kernel
from generator.sampler import Members, Walk, initial_noise, ode, rollout_group
from generator.schedule import sigma_grid
from tests.tiny import stochastic_step

STEPS = 6
SIGMAS = sigma_grid(STEPS, shift=3.0).tolist()
SHAPE = (2, 1, 3, 4)


def bend(x: Tensor, sigma: float) -> Tensor:
    """Nonlinear in x, so that a wrong order of steps shows."""
    return torch.tanh(x) * (1 + sigma) - 0.3


def sample_group(
    velocity: Callable[[Tensor, float], Tensor], *, batch: int = 4, **changes: object
) -> Group:
    """rollout_group with this module's grid; changes are fields of Members or of Walk."""
    values = {"seed": 11, "size": 4, "shape": SHAPE, "sigmas": SIGMAS} | changes
    values.setdefault("kernel", Kernel("sde", 1.0, 0.45))
    values.setdefault("tail", lambda x, sigmas: ode(velocity, x, sigmas))
    return rollout_group(
        velocity,
        Members("a prompt", values.pop("seed"), values.pop("size")),
        Walk(**values),
        batch=AdaptiveBatcher(batch, what="latents"),
    )


def roll(
    velocity: Callable[[Tensor, float], Tensor],
    *,
    stochastic_range: int = 3,
    **changes: object,
) -> Group:
    """`sample_group` whose stochastic step is drawn from the seed."""
    step = stochastic_step(changes.get("seed", 11), stochastic_range)
    return sample_group(velocity, steps=[step], **changes)


def noise_of(*parts: int | str) -> Tensor:
    return torch.randn(
        SHAPE, generator=torch.Generator().manual_seed(derive_seed(*parts))
    )


@pytest.mark.parametrize("seed", range(8))
def test_members_differ_by_their_noise_alone(seed: int) -> None:
    """With v = 0 only step k moves: next = x_T (1 - tau^2 / (2 sigma)) + tau xi_g."""
    group = roll(lambda x, _: torch.zeros_like(x), seed=seed)
    k = stochastic_step(seed, 3)
    (step,) = group.steps
    assert (step.sigma, step.sigma_next, step.std) == (
        SIGMAS[k],
        SIGMAS[k + 1],
        pytest.approx(0.45),
    )
    assert torch.equal(step.latent_MCFHW, noise_of(seed, "noise").unsqueeze(0))
    for member in range(4):
        want = noise_of(seed, "noise") * (
            1 - 0.45**2 / (2 * SIGMAS[k])
        ) + 0.45 * noise_of(seed, "member", member)
        assert torch.allclose(step.next_GCFHW[member], want, atol=1e-6)
    assert torch.equal(group.clean_GCFHW, step.next_GCFHW)


def test_all_steps_of_the_range_are_drawn() -> None:
    assert {roll(bend, seed=seed).steps[0].sigma for seed in range(40)} == set(
        SIGMAS[:3]
    )


@pytest.mark.parametrize("seed", [11, 12, 13, 14])
def test_velocity_samples_are_counted(seed: int) -> None:
    seen: list[int] = []

    def counted(x: Tensor, sigma: float) -> Tensor:
        seen.append(len(x))
        return bend(x, sigma)

    roll(counted, seed=seed, size=5, batch=2)
    k = stochastic_step(seed, 3)
    assert sum(seen) == (k + 1) + 5 * (STEPS - k - 1)
    assert seen[: k + 1] == [1] * (k + 1)
    assert max(seen) == 2


def test_last_step_can_be_the_stochastic_one() -> None:
    seeds = [seed for seed in range(60) if stochastic_step(seed, STEPS) == STEPS - 1]
    group = roll(bend, seed=seeds[0], stochastic_range=STEPS)
    assert group.steps[0].sigma_next == 0
    assert torch.equal(group.clean_GCFHW, group.steps[0].next_GCFHW)


def test_perfect_velocity_lands_on_the_data() -> None:
    """For one data point x0, v = (x - x0) / sigma leads there from anywhere, noise or not."""
    data = noise_of(99, "data")
    group = roll(lambda x, sigma: (x - data) / sigma)
    assert torch.allclose(
        group.clean_GCFHW, data.expand_as(group.clean_GCFHW), atol=1e-5
    )
    assert (
        group.steps[0].next_GCFHW[0] - group.steps[0].next_GCFHW[1]
    ).abs().max() > 0.1


def test_stored_log_prob_is_that_of_the_noise() -> None:
    """log p = -mean(xi^2) / 2 - ln tau - ln(2 pi) / 2, since next = mean + tau xi."""
    group = roll(bend, seed=5)
    for member, got in enumerate(group.steps[0].log_prob_G.tolist()):
        want = (
            -noise_of(5, "member", member).square().mean().item() / 2
            - math.log(0.45)
            - math.log(2 * math.pi) / 2
        )
        assert got == pytest.approx(want, abs=1e-5)


def test_zero_noise_is_the_ode_and_has_no_density() -> None:
    group = roll(bend, kernel=Kernel("sde", 0.0, 0.45))
    whole = ode(bend, noise_of(11, "noise").unsqueeze(0), SIGMAS)
    assert torch.allclose(group.clean_GCFHW, whole.expand(4, *SHAPE), atol=1e-6)
    assert group.steps[0].log_prob_G.isnan().all()


def test_neither_batch_nor_group_size_changes_a_member() -> None:
    whole = roll(bend, size=5, batch=5)
    parts = roll(bend, size=5, batch=2)
    fewer = roll(bend, size=2, batch=5)
    assert torch.allclose(whole.clean_GCFHW, parts.clean_GCFHW, atol=1e-6)
    assert torch.allclose(whole.clean_GCFHW[:2], fewer.clean_GCFHW, atol=1e-6)
    assert torch.equal(whole.steps[0].next_GCFHW[:2], fewer.steps[0].next_GCFHW)


def test_equal_seeds_give_equal_rollouts() -> None:
    state = torch.get_rng_state()
    first, again, other = roll(bend, seed=1), roll(bend, seed=1), roll(bend, seed=2)
    assert torch.equal(first.clean_GCFHW, again.clean_GCFHW)
    assert not torch.allclose(
        first.steps[0].latent_MCFHW, other.steps[0].latent_MCFHW, atol=0.1
    )
    assert torch.equal(
        torch.get_rng_state(), state
    )  # and the global generator is left alone
    assert torch.equal(initial_noise(1, SHAPE), noise_of(1, "noise"))


def test_walk_with_step_off_the_grid_is_refused() -> None:
    seed = next(seed for seed in range(60) if stochastic_step(seed, 6) == 5)
    with pytest.raises(ValueError, match=r"\[5\]"):
        roll(bend, seed=seed, stochastic_range=6, sigmas=[1.0, 0.5, 0.0])
