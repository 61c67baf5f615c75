"""The GRPO loop with the settings of related algorithms: Flow-GRPO, Flash-GRPO, MixGRPO."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from alignment.config import GrpoConfig
from alignment.grpo_losses import step_weights, weights_of_steps
from generator.flow import Kernel
from generator.schedule import sigma_grid
from tests.alignment.per_member import per_member_gradient
from tests.alignment.test_grpo import loop_of
from tests.fakes import FakeGenerator, FunctionReward, redness

RED = {"red": FunctionReward("red", redness)}
FLOW_GRPO = {"stochastic": "all", "stochastic_range": 8, "initial_noise": "member"}
FLASH = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]


@pytest.mark.parametrize("sister", ["flow_grpo", "mixgrpo"])
def test_ceiling_of_a_sister_binds_at_the_first_step_only(sister: str) -> None:
    """The papers have s = 0.7 sqrt(sigma / (1 - sigma)), infinite where sigma is 1."""
    root = Path(__file__).parents[2] / "configs"
    files = (root / "wan" / "grpo.yaml", root / "sisters" / f"{sister}.yaml")
    sampler = OmegaConf.merge(*map(OmegaConf.load, files)).generator.sampler
    kernel = Kernel("sde", sampler.noise_level, sampler.max_std)
    grid = sigma_grid(sampler.num_steps, shift=sampler.shift).tolist()
    for sigma, after in pairwise(grid[1:]):
        paper = 0.7 * math.sqrt(sigma / (1 - sigma))
        assert kernel.sde_noise(sigma, after) == pytest.approx(paper), sigma
    # the first step: close to the release's, which takes the second sigma there
    std = kernel.sde_noise(1.0, grid[1]) * math.sqrt(1 - grid[1])
    assert std == pytest.approx(0.7 * math.sqrt(grid[1]), rel=0.1)


def test_unit_weights_equal_flash_grpos_published_table() -> None:
    """20 steps of shift 3 on the older UniPC grid, with Flash-GRPO's s = sigma sigma_1."""
    u = [1 - i * (1 - 1e-3) / 20 for i in range(21)]
    shifted = [3 * (1 - v) / (1 + 2 * (1 - v)) for v in u][::-1][:-1]
    for i, want in enumerate(FLASH):
        sigma, after = shifted[i], shifted[i + 1]
        s, delta = sigma * shifted[1], sigma - after
        gain = delta * (1 + s**2 * (1 - sigma) / (2 * sigma))
        weights = step_weights(
            s * math.sqrt(delta), sigma=sigma, sigma_next=after, gain=gain, form="unit"
        )
        assert weights.policy == pytest.approx(want, abs=5e-5)


@pytest.mark.parametrize(
    "kernel",
    [Kernel("sde", 1.0, 0.45), Kernel("sde", 0.7, 0.9), Kernel("cps", 0.6, None)],
)
@pytest.mark.parametrize("step", [0, 3, 9])
def test_unit_weights_give_a_velocity_gradient_of_the_noise(
    kernel: Kernel, step: int
) -> None:
    """policy weight x d log p / d v = -xi / D, and the KL is |dv|^2 / 2, at any step."""
    from common.gaussian import kl_same_std, log_prob

    grid = sigma_grid(16, shift=3.0).tolist()
    sigma, after = grid[step], grid[step + 1]
    x, xi = torch.randn(2, 1, 6, dtype=torch.float64)
    v = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    law = kernel.transition(x, v, sigma, after)
    weights = step_weights(
        law.std,
        sigma=sigma,
        sigma_next=after,
        gain=kernel.gain(sigma, after),
        form="unit",
    )
    reached = (law.mean + law.std * xi).detach()
    (slope,) = torch.autograd.grad(weights.policy * log_prob(law, reached).sum(), v)
    torch.testing.assert_close(slope, -xi / 6, atol=1e-12, rtol=1e-9)
    other = kernel.transition(x, v.detach() + 0.3, sigma, after)
    law = kernel.transition(x, v.detach(), sigma, after)
    assert (weights.kl * kl_same_std(law, other)).item() == pytest.approx(
        0.3**2 / 2, rel=1e-9
    )


def test_paper_weights_by_hand_and_at_sigma_1() -> None:
    weights = step_weights(0.1, sigma=0.8, sigma_next=0.7, gain=1.0, form="paper")
    assert weights == pytest.approx((math.sqrt(0.8 / (0.1 * 0.2)), 0.8 / (0.1 * 0.2)))
    # without truncation std = sqrt(sigma delta / (1 - sigma)), and both forms are one
    std = math.sqrt(0.8 * 0.1 / 0.2)
    assert step_weights(std, sigma=0.8, sigma_next=0.7, gain=1.0) == pytest.approx(
        tuple(weights)
    )
    with pytest.raises(ValueError, match="sigma=1"):
        step_weights(0.45, sigma=1.0, sigma_next=0.9, gain=1.0, form="paper")
    assert step_weights(0.45, sigma=1.0, sigma_next=0.9, gain=1.0, form="none") == (
        1.0,
        1.0,
    )


@pytest.mark.parametrize(
    "sampler",
    [
        FLOW_GRPO,
        {"initial_noise": "member"},
        {"stochastic": "window", "window_size": 2},
    ],
)
def test_collapsed_update_has_the_gradient_of_a_forward_per_member(
    sampler: dict,
) -> None:
    generator = FakeGenerator(dtype=torch.float64, **sampler)
    with torch.no_grad():
        generator.module.bias_C += torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    loop = loop_of(RED, generator=generator, lr=0.0)
    batch = loop.prompts.at(0)
    groups = generator.rollout(batch.prompts, group_size=4, seeds=batch.seeds)
    generator.grad_forwards = 0
    result = loop.step(0)
    assert loop.engine.steps == 1
    collapsed_forwards = generator.grad_forwards
    want, _ = per_member_gradient(generator, groups, result.advantage_PM, loop.cfg)
    member_forwards = generator.grad_forwards - collapsed_forwards
    scale = float(torch.cat(want).abs().max())
    difference = torch.cat(loop.engine.last_gradient) - torch.cat(want)
    assert scale > 1e-4
    assert float(difference.abs().max()) < 1e-12 * scale
    # members share the start of a window's first step, not of its second
    shared = "initial_noise" not in sampler
    assert member_forwards == 4 * 4 * generator.how.steps_per_group
    assert collapsed_forwards == member_forwards - (4 * 3 if shared else 0)


def test_flow_grpo_gradient_equals_the_formula() -> None:
    """The gradient is the MEAN over steps of gain / std mean_g[A_g mean(xi)] / C."""
    generator = FakeGenerator(dtype=torch.float64, **FLOW_GRPO)
    loop = loop_of(RED, generator=generator, kl_weight=0.0, reweight="none")
    batch = loop.prompts.at(0)
    groups = generator.rollout(batch.prompts, group_size=4, seeds=batch.seeds)
    laws = [
        [generator.transition(group.prompt, step) for step in group.steps]
        for group in groups
    ]  # before the step
    advantage_PG = loop.step(0).advantage_PM.double()
    expected = torch.zeros(3, dtype=torch.float64)
    for group, own, advantage_G in zip(groups, laws, advantage_PG, strict=True):
        for step, law in zip(group.steps, own, strict=True):
            xi_GC = (
                ((step.next_GCFHW - law.mean) / law.std).mean(dim=(2, 3, 4)).detach()
            )
            push = step.gain / step.std
            expected += (
                push
                * (advantage_G[:, None] * xi_GC).mean(0)
                / 3
                / len(groups)
                / len(group.steps)
            )
    assert torch.allclose(loop.engine.last_gradient[1], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (FLOW_GRPO, {"reweight": "none", "scale": "group"}),
        (
            {"stochastic": "window", "window_size": 2, "initial_noise": "member"},
            {"kl_weight": 0.0},
        ),
        (
            {"initial_noise": "member"},
            {"reweight": "unit", "normalize_step_weights": True, "kl_weight": 0.0},
        ),
        ({"kernel": "cps", "noise_level": 0.7, "max_std": None}, {"reweight": "unit"}),
    ],
)
def test_related_algorithms_raise_the_reward(sampler: dict, options: dict) -> None:
    loop = loop_of(RED, generator=FakeGenerator(**sampler), lr=3e-2, **options)
    history = [loop.step(step).metrics for step in range(30)]
    assert all(row["train/ratio_max_dev"] < 1e-5 for row in history)
    first, last = (
        sum(row["reward/red"] for row in part) / 5
        for part in (history[:5], history[-5:])
    )
    assert last > first + 0.1


def test_normalize_step_weights_divides_by_the_mean_over_groups() -> None:
    generator = FakeGenerator()
    loop = loop_of(RED, generator=generator)
    batch = loop.prompts.at(0)
    groups = generator.rollout(batch.prompts, group_size=4, seeds=batch.seeds)
    steps = [step for group in groups for step in group.steps]
    weights = weights_of_steps(steps, form="finite", normalize=True)
    assert sum(w.policy for w in weights) / len(weights) == pytest.approx(1.0)
    assert sum(w.kl for w in weights) / len(weights) == pytest.approx(1.0)
    # without it they are those of the step, and not 1 on average
    plain = weights_of_steps(steps, form="finite", normalize=False)
    assert sum(w.policy for w in plain) / len(plain) != pytest.approx(1.0)


def test_several_updates_on_a_rollout_are_clipped() -> None:
    options = {"clip_low": 1e-3, "clip_high": 1e-3, "kl_weight": 0.0, "lr": 5e-2}
    once, thrice = (
        loop_of(RED, updates=n, ratio=ratio, **options)
        for n, ratio in ((1, None), (3, "plain"))
    )
    one, three = once.step(0), thrice.step(0)
    assert (once.engine.steps, thrice.engine.steps) == (1, 3)
    assert one.metrics["train/clip_frac"] == 0.0
    assert three.metrics["train/clip_frac"] > 0.0
    assert torch.equal(one.advantage_PM, three.advantage_PM)  # one rollout, scored once
    with pytest.raises(ValueError, match="updates=2"):
        GrpoConfig(updates=2)
