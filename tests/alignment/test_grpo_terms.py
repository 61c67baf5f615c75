"""The terms of GRPO's loss as the loop puts them together, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from alignment.grpo_losses import StepWeights
from common import gaussian
from common.types import RewardUnavailableError, Score
from tests.alignment.test_grpo import advantages_of, loop_of
from tests.fakes import FakeGenerator, FunctionReward, Scripted, redness

BIAS = torch.tensor([0.4, -0.2, 0.6], dtype=torch.float64)


def moved_generator() -> FakeGenerator:
    """A policy whose velocity differs from its reference's by a constant in each channel."""
    generator = FakeGenerator(dtype=torch.float64)
    with torch.no_grad():
        generator.module.bias_C += BIAS
    return generator


@pytest.mark.parametrize("reweight", ["finite", "none"])
def test_kl_term_has_the_squared_weight_of_its_step(reweight: str) -> None:
    """Loss = -lambda mean A + beta lambda^2 (gain bias)^2 / (2 std^2), MEAN over channels."""
    loop = loop_of(
        {"red": FunctionReward("red", redness)},
        generator=moved_generator(),
        reweight=reweight,
        kl_weight=0.3,
        prompts=1,
        lr=0.0,
    )
    batch = loop.prompts.at(0)
    (group,) = loop.generator.rollout(batch.prompts, group_size=4, seeds=batch.seeds)
    (step,) = group.steps
    weight = 1.0 if reweight == "none" else step.std / (step.sigma - step.sigma_next)
    kl = float(((step.gain * BIAS) ** 2).mean()) / (2 * step.std**2)

    result = loop.step(0)
    mean_advantage = float(result.advantage_PM[0].double().mean())
    by_hand = -weight * mean_advantage + 0.3 * weight**2 * kl
    assert result.metrics["train/kl"] == pytest.approx(kl, rel=1e-5)
    assert loop.engine.losses == pytest.approx([by_hand], rel=1e-5)
    # far enough from the plain KL that a missing weight shows
    assert reweight == "none" or abs(weight**2 - 1) > 0.1


def test_another_weight_of_the_kl_holds_from_the_next_update_on() -> None:
    """The budget of the guards sets it between two steps: loss = -w mean(A) + kl_weight KL w."""
    loop = loop_of(
        {"red": FunctionReward("red", redness)},
        generator=moved_generator(),
        kl_weight=0.0,
    )
    (group,) = loop.generator.rollout(["a"], group_size=4, seeds=[5])
    (step,) = group.steps
    kl = float(((step.gain * BIAS) ** 2).mean()) / (2 * step.std**2)

    def loss() -> float:
        weights = StepWeights(1.0, 4.0)
        output = loop.objective.loss("a", step, torch.zeros(4), weights)
        return float(output.loss.detach())

    assert loss() == pytest.approx(0.0, abs=1e-12)
    loop.set_kl_weight(0.3)
    assert loss() == pytest.approx(0.3 * 4.0 * kl, rel=1e-4)


def test_ratio_is_clipped_by_its_side() -> None:
    """Ratios 0.7, 1.4, 1.7 and 1 with clips of -0.2 and +0.5."""
    loop = loop_of(
        {"red": FunctionReward("red", redness)},
        generator=moved_generator(),
        clip_low=0.2,
        clip_high=0.5,
        kl_weight=0.0,
        # with one update the ratio would be 1 by construction
        updates=2,
        ratio="plain",
    )
    (group,) = loop.generator.rollout(["a"], group_size=4, seeds=[5])
    (step,) = group.steps
    policy = loop.generator.transition("a", step)
    ratio_G = torch.tensor([0.7, 1.4, 1.7, 1.0])
    now_G = gaussian.log_prob(policy, step.next_GCFHW).detach()
    old = replace(step, log_prob_G=now_G - ratio_G.log())
    advantage_G = torch.tensor([-1.0, 1.0, 1.0, 0.0])

    output = loop.objective.loss("a", old, advantage_G, StepWeights(2.0, 4.0))
    # min(r A, clipped r A): max(0.7, 0.8) of a bad member, 1.4 as it is, 1.7 cut to 1.5
    surrogate = (-0.8 + 1.4 + 1.5 + 0.0) / 4
    assert float(output.loss.detach()) == pytest.approx(-2.0 * surrogate, rel=1e-5)


def test_one_update_takes_its_log_prob_for_the_rollouts() -> None:
    """loss = -w mean(A) whatever the rollout recorded; the metrics still show its ratio of 1.4."""
    loop = loop_of(
        {"red": FunctionReward("red", redness)},
        generator=moved_generator(),
        kl_weight=0.0,
    )
    (group,) = loop.generator.rollout(["a"], group_size=4, seeds=[5])
    (step,) = group.steps
    policy = loop.generator.transition("a", step)
    now_G = gaussian.log_prob(policy, step.next_GCFHW).detach()
    old = replace(step, log_prob_G=now_G - math.log(1.4))
    advantage_G = torch.tensor([-1.0, 1.0, 3.0, 0.0])

    output = loop.objective.loss("a", old, advantage_G, StepWeights(2.0, 4.0))
    assert float(output.loss.detach()) == pytest.approx(-2.0 * 0.75, rel=1e-6)
    assert output.metrics["ratio_mean"] == pytest.approx(1.4, rel=1e-4)
    assert output.metrics["ratio_dev"] == pytest.approx(0.4, rel=1e-3)


def test_advantage_eps_is_added_to_the_spread() -> None:
    loop = loop_of({"one": Scripted([])}, group_size=2, prompts=1, advantage_eps=3.0)
    found = advantages_of(loop, {"one": Score(torch.tensor([0.0, 2.0]))}, groups=1)
    # the spread is 1: 1 / (1 + 3)
    assert found.advantage_PM.tolist() == [[-0.25, 0.25]]


def test_flat_reward_ends_the_run_after_its_patience() -> None:
    loop = loop_of({"mine": Scripted([0.5] * 16 * 3)}, flat_reward_patience=3)
    skipped = [loop.step(step).metrics["train/skipped"] for step in range(2)]
    assert skipped == [1.0, 1.0]
    with pytest.raises(RewardUnavailableError, match=r"rewards\.mine \(mean 0\.5\)"):
        loop.step(2)
