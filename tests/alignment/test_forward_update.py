"""The GRPO loop with forward objectives on the fakes: what is trained, by whom, and resuming."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.config import ForwardConfig, GrpoConfig, OldPolicyConfig
from alignment.forward_losses import awm_loss, nft_loss
from alignment.grpo import GrpoLoop, backwards_per_update
from alignment.objectives import build_objective
from alignment.prompts import PromptSchedule
from alignment.rewards.brightness import Brightness
from common.distributed import seeded_generator
from engine.old_policy import OldPolicy
from tests.alignment.test_grpo import PROMPTS
from tests.fakes import FakeGenerator, FunctionReward, PlainEngine, redness

RED = {"red": FunctionReward("red", redness)}
SOLVER = {"stochastic": "none", "initial_noise": "member"}
LEVELS = (0.9, 0.6, 0.3)


def loop_of(
    *,
    rewards: dict | None = None,
    generator: FakeGenerator | None = None,
    prompts: int = 4,
    lr: float = 1e-2,
    forward: dict | None = None,
    **options: Any,
) -> GrpoLoop:
    options = {"objective": "nft", "group_size": 4, "scale": "batch", **options}
    if options["objective"] == "nft":
        options.setdefault("advantage_clip", 5.0)
    if options["objective"] == "dgpo":
        forward = {"micro_batch": options["group_size"], **(forward or {})}
    cfg = GrpoConfig(**options, forward=ForwardConfig(**(forward or {})))
    generator = generator or FakeGenerator(num_steps=4, **SOLVER)
    rewards = RED if rewards is None else rewards
    engine = PlainEngine(
        generator.module,
        accumulation=backwards_per_update(cfg, prompts, ranks=1, steps_per_group=0),
        lr=lr,
    )
    return GrpoLoop(
        cfg,
        generator=generator,
        rewards=rewards,
        weights=dict.fromkeys(rewards, 1.0),
        engine=engine,
        prompts=PromptSchedule(PROMPTS, seed=3, prompts_per_step=prompts),
        fps=8.0,
        levels=LEVELS,
        old=OldPolicy(cfg.forward.old_policy.decay, generator.module),
        grad_norm=engine.grad_norm,
    )


def moved() -> FakeGenerator:
    """A policy in fp64 whose velocity differs from its reference's by a constant per channel."""
    generator = FakeGenerator(num_steps=4, dtype=torch.float64, **SOLVER)
    with torch.no_grad():
        generator.module.bias_C += torch.tensor([0.4, -0.2, 0.6], dtype=torch.float64)
    return generator


def old_policy(**options: Any) -> dict:
    return {"old_policy": OldPolicyConfig(**options)}


def weights_of(loop: GrpoLoop) -> list[Tensor]:
    return [p.detach().clone() for p in loop.generator.module.parameters()]


# ------------------------------------------------------------------ the rollout


def test_rollout_without_stochastic_steps_walks_the_whole_grid() -> None:
    """Each member is the ODE from its own noise; the group has no step."""
    from common.distributed import derive_seed
    from generator.sampler import initial_noise, ode
    from tests.fakes import SHAPE

    generator = FakeGenerator(num_steps=4, **SOLVER)
    (group,) = generator.rollout(["a"], group_size=3, seeds=[7])
    assert group.steps == ()
    for member in range(3):
        noise = initial_noise(derive_seed(7, "initial", member), SHAPE)
        with torch.no_grad():
            want = ode(generator.velocity, noise[None], generator.sigmas)[0]
        assert torch.equal(group.clean_GCFHW[member], want)


# ------------------------------------------------------------------ what is trained


def test_gradient_is_the_advantage_weighted_flow_error_of_each_member() -> None:
    """On-policy NFT: the MEAN of A grad( mean e^2 / mean|s e| ) s^2, by a separate route."""
    generator = moved()
    loop = loop_of(generator=generator, prompts=2, kl_weight=0.0)
    batch = loop.batch(0)
    groups = generator.rollout(batch.prompts, group_size=4, seeds=batch.seeds)
    result = loop.step(0)

    samples = []
    parts = zip(groups, batch.seeds, result.advantage_PM, strict=True)
    for group, seed, advantage_M in parts:
        for member in range(4):
            clean = group.clean_GCFHW[member].double()
            draw = seeded_generator(seed, "levels", member, 0)
            level = int(torch.randperm(3, generator=draw)[0])
            draw = seeded_generator(seed, "forward", member, level, 0)
            eps = torch.randn(clean.shape, generator=draw).double()
            samples.append((clean, eps, LEVELS[level], float(advantage_M[member])))
    # every level is drawn by someone
    assert {s for _, _, s, _ in samples} == set(LEVELS)

    # the policy before the step
    again = moved()
    total = [torch.zeros_like(p) for p in loop.engine.parameters]
    for clean, eps, s, advantage in samples:
        x = (1 - s) * clean + s * eps
        e = again.module(x[None], s)[0] - (eps - clean)
        weight = float((s * e).detach().abs().mean())
        loss = advantage * s**2 * e.square().mean() / weight / len(samples)
        trained = [p for p in again.module.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(loss, trained)
        total = [a + b for a, b in zip(total, gradient, strict=True)]
    for found, want in zip(loop.engine.last_gradient, total, strict=True):
        assert float(want.abs().max()) > 1e-3
        # levels are fp32
        assert torch.allclose(found, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("objective", ["nft", "awm"])
def test_micro_batches_change_nothing_but_rounding(objective: str) -> None:
    gradients = []
    for micro_batch in (1, 4, 8):
        forward = {"timesteps_per_sample": 2, "micro_batch": micro_batch}
        loop = loop_of(
            generator=moved(), objective=objective, forward=forward, kl_weight=0.1
        )
        loop.step(0)
        assert loop.engine.backwards == 4 * 8 // micro_batch
        assert loop.engine.steps == 1
        gradients.append(torch.cat(loop.engine.last_gradient))
    assert float(gradients[0].abs().max()) > 1e-3
    for other in gradients[1:]:
        assert torch.allclose(other, gradients[0], rtol=1e-10, atol=1e-14)


def test_kl_term_is_the_mean_squared_distance_to_the_reference() -> None:
    """MEAN of (0.4, -0.2, 0.6)^2 is 0.56 / 3; its gradient is 2 bias / 3 for each channel."""
    still = {
        "still": FunctionReward("still", lambda video, _: float(video.float().mean()))
    }
    runs = [
        loop_of(generator=moved(), rewards=still, kl_weight=weight)
        for weight in (0.0, 0.5)
    ]
    with_kl = [loop.step(0).metrics for loop in runs][1]
    assert with_kl["train/kl"] == pytest.approx(0.56 / 3, rel=1e-5)
    difference = runs[1].engine.last_gradient[1] - runs[0].engine.last_gradient[1]
    bias = torch.tensor([0.4, -0.2, 0.6], dtype=torch.float64)
    assert torch.allclose(difference, 0.5 * 2 * bias / 3, rtol=1e-6)


def test_settings_reach_the_losses() -> None:
    """Every setting differs from its default, and changes the loss."""
    draw = torch.Generator().manual_seed(4)
    nft = loop_of(forward={"beta": 0.3, "adaptive_weight": False}, advantage_clip=4.0)
    awm = loop_of(
        objective="awm",
        forward={"weighting": "t", "proximal_weight": 0.7},
        clip_low=0.01,
        clip_high=0.02,
    )
    (group,) = nft.generator.rollout(["a"], group_size=4, seeds=[7])
    (batch, *_) = nft.objective.noised(group, torch.tensor([3.0, 1.0, 1.0, 1.0]), 7)
    v, v_old = (torch.randn(batch.clean_BCFHW.shape, generator=draw) for _ in range(2))
    target = batch.noise_BCFHW - batch.clean_BCFHW
    tensors = (v, v_old, target, batch.sigma_B, batch.advantage_B)

    want = nft_loss(*tensors, beta=0.3, advantage_clip=4.0, adaptive_weight=False)
    assert torch.equal(nft.objective.objective(batch, v, v_old).loss, want.loss)
    options = {"weighting": "t", "proximal_weight": 0.7}
    for one, other in ((v, v_old), (v_old, v)):
        # one of the two orders is clipped from below, the other from above
        for sign in (1.0, -1.0):
            tensors = (one, other, target, batch.sigma_B, torch.tensor([3.0 * sign]))
            signed = replace(batch, advantage_B=tensors[4])
            want = awm_loss(*tensors, clip_low=0.01, clip_high=0.02, **options)
            found = awm.objective.objective(signed, one, other)
            assert torch.equal(found.loss, want.loss)


def test_levels_of_a_video_are_distinct_and_members_do_not_depend_on_the_rank() -> None:
    loop = loop_of(forward={"timesteps_per_sample": 3, "micro_batch": 3})
    (group,) = loop.generator.rollout(["a"], group_size=4, seeds=[7])
    whole = list(loop.objective.noised(group, torch.arange(4.0), 7))
    for batch in whole:
        assert sorted(batch.sigma_B.tolist()) == pytest.approx(sorted(LEVELS))
        assert batch.noise_BCFHW.std() > 0.5
        # a noise of its own for every level
        assert not torch.equal(batch.noise_BCFHW[0], batch.noise_BCFHW[1])
    assert [batch.advantage_B.tolist() for batch in whole] == [
        [i] * 3 for i in range(4)
    ]
    # the rank that holds members 2 and 3 draws the same
    loop.objective.first_member = 2
    (rest,) = loop.generator.rollout(["a"], group_size=2, seeds=[7], first_member=2)
    for got, want in zip(
        loop.objective.noised(rest, torch.tensor([2.0, 3.0]), 7), whole[2:], strict=True
    ):
        for name in ("clean_BCFHW", "noise_BCFHW", "sigma_B", "advantage_B"):
            assert torch.equal(getattr(got, name), getattr(want, name))
    # a further update on the rollout draws anew
    other = next(iter(loop.objective.noised(group, torch.arange(4.0), 7, number=1)))
    assert not torch.equal(other.noise_BCFHW, whole[0].noise_BCFHW)


def test_reward_without_spread_changes_no_weight() -> None:
    loop = loop_of(
        rewards={"flat": FunctionReward("flat", lambda *_: 0.5)}, kl_weight=0.1
    )
    before = weights_of(loop)
    assert loop.step(0).metrics["train/skipped"] == 1.0
    assert loop.engine.steps == 0
    assert all(map(torch.equal, before, weights_of(loop)))


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("nft", {}),
        ("nft", {"forward": {"beta": 0.3, **old_policy(max_decay=0.2, ramp_rate=0.1)}}),
        ("awm", {"advantage_clip": 1.0}),
        ("awm", {"updates": 2, "clip_low": 1.0, "clip_high": 1.0}),
    ],
)
def test_forward_objective_raises_the_reward(objective: str, options: dict) -> None:
    loop = loop_of(
        rewards={"bright": Brightness()},
        objective=objective,
        lr=6e-2,
        kl_weight=0.0,
        **options,
    )
    history = [loop.step(step).metrics for step in range(20)]
    first, last = (
        sum(row["reward/bright"] for row in part) / 5
        for part in (history[:5], history[-5:])
    )
    assert last > first + 0.02
    assert math.isfinite(history[-1]["train/flow_error"])


# ------------------------------------------------------------------ the old policy


@pytest.mark.parametrize(
    ("schedule", "decays"),
    [
        ({"max_decay": 0.0}, {1: 0.0, 600: 0.0}),
        ({"ramp_rate": 0.001, "max_decay": 0.5}, {300: 0.3, 600: 0.5}),
        (
            {"flat_steps": 75, "ramp_rate": 0.0075, "max_decay": 0.999},
            {74: 0.0, 100: 0.1875, 300: 0.999},
        ),
    ],
)
def test_decays_are_those_of_the_release(schedule: dict, decays: dict) -> None:
    cfg = OldPolicyConfig(**schedule)
    assert {step: cfg.decay(step) for step in decays} == pytest.approx(decays)


def test_old_policy_follows_by_its_schedule_and_samples() -> None:
    """d = 0.25 and 0.5: the old weights are the averages by hand, and make the rollouts."""
    loop = loop_of(forward=old_policy(ramp_rate=0.25, max_decay=0.5), lr=0.1)
    want = weights_of(loop)
    for step, decay in enumerate((0.25, 0.5, 0.5)):
        expected = FakeGenerator(num_steps=4, **SOLVER)
        with torch.no_grad():
            for parameter, value in zip(
                expected.module.parameters(), want, strict=True
            ):
                parameter.copy_(value)
        batch = loop.batch(step)
        groups = expected.rollout(batch.prompts, group_size=4, seeds=batch.seeds)
        videos = expected.decode(torch.cat([group.clean_GCFHW for group in groups]))

        result = loop.step(step, keep_groups=9)
        assert torch.equal(result.video_BTYXC, videos)
        now = weights_of(loop)
        # the frozen weight is no part of the average
        want = [decay * a + (1 - decay) * b for a, b in zip(want, now, strict=True)]
        for name, average in loop.objective.old.average.items():
            index = [n for n, _ in loop.generator.module.named_parameters()].index(name)
            assert torch.allclose(average, want[index], atol=1e-7)
        want = [
            loop.objective.old.average.get(name, value)
            for (name, _), value in zip(
                loop.generator.module.named_parameters(), want, strict=True
            )
        ]
        want = [value.clone() for value in want]
    assert result.metrics["train/old_distance"] > 0.0


def test_old_velocities_are_those_of_the_old_policy() -> None:
    """Old and new differ by a constant of 0.4, -0.2 and 0.6: mean square 0.56 / 3."""
    generator = FakeGenerator(num_steps=4, **SOLVER)
    loop = loop_of(generator=generator, forward=old_policy(max_decay=0.5), lr=0.0)
    with torch.no_grad():
        generator.module.bias_C += torch.tensor([0.4, -0.2, 0.6])
    metrics = loop.step(0).metrics
    assert metrics["train/old_distance"] == pytest.approx(0.56 / 3, rel=1e-4)


def test_later_updates_keep_the_velocities_of_the_rollouts_policy() -> None:
    """Two updates with d = 0: the second is compared with the weights before the first."""
    loop = loop_of(updates=2, lr=0.1)
    before = weights_of(loop)
    numbers = []
    noised = loop.objective.noised

    def recorded(*of: Any, number: int) -> Any:
        numbers.append(number)
        return noised(*of, number=number)

    loop.objective.noised = recorded
    metrics = loop.step(0).metrics
    # each update draws anew for its four groups
    assert numbers == [0] * 4 + [1] * 4
    assert loop.engine.steps == 2
    # 0 in the first update, and not in the second
    assert metrics["train/old_distance"] > 0.0
    assert loop.objective.old.next_decay() == 0.0
    after = weights_of(loop)
    for name, average in loop.objective.old.average.items():
        index = [n for n, _ in loop.generator.module.named_parameters()].index(name)
        assert torch.equal(average, after[index])
        assert not torch.equal(average, before[index])


def test_resumed_run_equals_the_whole_run_bit_by_bit(tmp_path: Path) -> None:
    """The old policy is state: with it in the checkpoint, steps 2 and 3 are those of one run."""
    forward = old_policy(ramp_rate=0.2, max_decay=0.6)

    def stepped(loop: GrpoLoop, steps: range) -> list[dict[str, float]]:
        rows = [loop.step(step).metrics for step in steps]
        return [{k: v for k, v in row.items() if "second" not in k} for row in rows]

    whole = loop_of(forward=forward, lr=0.1)
    want = stepped(whole, range(4))

    first = loop_of(forward=forward, lr=0.1)
    stepped(first, range(2))
    first.objective.old.save(tmp_path)
    resumed = loop_of(forward=forward, lr=0.1)
    resumed.generator.module.load_state_dict(first.generator.module.state_dict())
    resumed.engine.optimizer.load_state_dict(first.engine.optimizer.state_dict())
    resumed.objective.old.load(tmp_path)
    got = stepped(resumed, range(2, 4))
    assert got == want[2:]
    assert all(map(torch.equal, weights_of(whole), weights_of(resumed)))
    assert (tmp_path / "old_policy.safetensors").is_file()


# ------------------------------------------------------------------ whole groups

DGPO = {"objective": "dgpo", "forward": ForwardConfig(micro_batch=4)}


def test_dgpo_micro_batch_is_a_group_of_one_level_and_noise() -> None:
    loop = loop_of(objective="dgpo", forward={"timesteps_per_sample": 2})
    batch = loop.batch(0)
    group = loop.generator.rollout(batch.prompts[:1], group_size=4, seeds=[7])[0]
    advantage_M = torch.tensor([1.0, 0.5, -0.5, -1.0])
    parts = list(loop.objective.noised(group, advantage_M, 7))
    assert len(parts) == 2
    levels = set()
    for part in parts:
        assert torch.equal(part.clean_BCFHW, group.clean_GCFHW)
        assert torch.equal(part.advantage_B, advantage_M)
        assert torch.equal(
            part.noise_BCFHW, part.noise_BCFHW[:1].expand_as(part.noise_BCFHW)
        )
        (level,) = set(part.sigma_B.tolist())
        levels.add(level)
    assert len(levels) == 2
    assert not torch.equal(parts[0].noise_BCFHW, parts[1].noise_BCFHW)


def test_dgpo_gradient_weighs_each_group_against_the_reference() -> None:
    """MEAN over groups of sigmoid(S) mean(A grad e), plus the KL term, by a separate route."""
    beta, kl_weight = 10.0, 0.5
    generator = moved()
    loop = loop_of(
        generator=generator,
        objective="dgpo",
        prompts=2,
        kl_weight=kl_weight,
        forward={"group_beta": beta},
    )
    batch = loop.batch(0)
    groups = generator.rollout(batch.prompts, group_size=4, seeds=batch.seeds)
    result = loop.step(0)
    assert result.metrics["train/kl"] == pytest.approx(0.56 / 3, rel=1e-5)

    again = moved()
    total = [torch.zeros_like(p) for p in loop.engine.parameters]
    weights = []
    parts = zip(groups, batch.seeds, result.advantage_PM, strict=True)
    for group, seed, advantage_M in parts:
        draw = seeded_generator(seed, "levels", 0, 0)
        level = int(torch.randperm(3, generator=draw)[0])
        draw = seeded_generator(seed, "forward", 0, level, 0)
        eps = torch.randn(group.clean_GCFHW[0].shape, generator=draw).double()
        clean = group.clean_GCFHW.double()
        x = (1 - LEVELS[level]) * clean + LEVELS[level] * eps
        v = again.module(x, LEVELS[level])
        with torch.no_grad(), again.reference():
            reference = again.module(x, LEVELS[level])
        e = (v - (eps - clean)).square().mean((1, 2, 3, 4))
        e_ref = (reference - (eps - clean)).square().mean((1, 2, 3, 4))
        A = advantage_M.double()
        S = beta * float((A * (e.detach() - e_ref)).sum()) / 4
        weights.append(1 / (1 + math.exp(-S)))
        loss = weights[-1] * (A * e).sum() / 4
        loss = (loss + kl_weight * (v - reference).square().mean()) / 2
        trained = [p for p in again.module.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(loss, trained)
        total = [a + b for a, b in zip(total, gradient, strict=True)]
    for found, want in zip(loop.engine.last_gradient, total, strict=True):
        assert float(want.abs().max()) > 1e-3
        assert torch.allclose(found, want, rtol=1e-5, atol=1e-8)
    # a policy that moved has another weight than a half
    assert abs(sum(weights) / 2 - 0.5) > 1e-3
    assert result.metrics["train/group_weight"] == pytest.approx(
        sum(weights) / 2, rel=1e-4
    )


def test_group_beta_is_the_largest_usual_one_by_default() -> None:
    """Recipes have 10 to 100."""
    assert ForwardConfig().group_beta == 100.0


def test_dgpo_without_kl_weight_uses_the_reference_but_not_its_kl() -> None:
    gradients = []
    for kl_weight in (0.0, 0.3):
        loop = loop_of(generator=moved(), objective="dgpo", kl_weight=kl_weight)
        assert loop.step(0).metrics["train/kl"] == pytest.approx(0.56 / 3, rel=1e-5)
        gradients.append(loop.engine.last_gradient[1])
    # the gradient of 0.3 mean bias^2
    bias = torch.tensor([0.4, -0.2, 0.6], dtype=torch.float64)
    assert torch.allclose(gradients[1] - gradients[0], 0.3 * 2 * bias / 3)


def test_dgpo_rewarded_colour_rises() -> None:
    loop = loop_of(objective="dgpo", lr=0.1, kl_weight=0.0)
    rewards = [loop.step(step).metrics["reward/red"] for step in range(12)]
    assert sum(rewards[-3:]) > sum(rewards[:3])


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"objective": "nft"}, "advantage_clip"),
        (
            {
                "objective": "nft",
                "advantage_clip": 5.0,
                "clip_low": 1.0,
                "clip_high": 1.0,
            },
            "clip_low",
        ),
        ({"objective": "awm", "updates": 2}, "clip_low"),
        (
            {"objective": "awm", "forward": ForwardConfig(**old_policy(max_decay=0.3))},
            "clip_low",
        ),
        ({"objective": "awm", "divergence_clip": 1e-5}, "divergence_clip"),
        ({"objective": "awm", "ratio": "plain"}, "ratio"),
        ({"objective": "awm", "normalize_step_weights": True}, "normalize_step"),
        ({"objective": "awm", "forward": ForwardConfig(micro_batch=3)}, "micro_batch"),
        ({"forward": ForwardConfig(beta=1.0)}, "objective=policy"),
        ({"objective": "dgpo"}, "micro_batch=4"),
        ({**DGPO, "ranks_per_group": 2}, "ranks_per_group=1"),
        ({**DGPO, "clip_low": 0.1, "clip_high": 0.1}, "clip_low"),
        ({**DGPO, "updates": 2}, "old policy"),
        (
            {
                "objective": "dgpo",
                "forward": ForwardConfig(micro_batch=4, **old_policy(max_decay=0.3)),
            },
            "old policy",
        ),
    ],
)
def test_settings_of_another_objective_are_refused(options: dict, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        GrpoConfig(**options)


def test_range_of_timesteps_that_does_not_rise_is_refused() -> None:
    with pytest.raises(ValueError, match="timestep_range"):
        ForwardConfig(timestep_range=(0.5, 0.5))


@pytest.mark.parametrize(
    ("steps", "part", "places"),
    [
        (10, (0.0, 0.99), range(9)),
        (4, (0.0, 0.99), range(3)),
        (14, (0.1, 0.6), range(1, 8)),
    ],
)
def test_trained_places_of_a_grid(steps: int, part: tuple, places: range) -> None:
    """NVlabs: int(0.99 x 10) = 9 levels of 10; the last step, near the video, is left out."""
    assert ForwardConfig(timestep_range=part).trained_places(steps) == places


def test_missing_old_policy_is_refused() -> None:
    loop = loop_of(updates=2)
    with pytest.raises(ValueError, match="OldPolicy"):
        build_objective(
            loop.cfg,
            generator=loop.generator,
            engine=loop.engine,
            levels=LEVELS,
            first_member=0,
            old=None,
            grad_norm=lambda: None,
        )
    # on-policy there is no copy, even if one is given
    assert loop_of().objective.old is None


def test_generator_without_flow_velocity_is_refused() -> None:
    class Bare:
        module = FakeGenerator().module
        how = None

    with pytest.raises(ValueError, match="flow_velocity"):
        loop_of(generator=Bare())
