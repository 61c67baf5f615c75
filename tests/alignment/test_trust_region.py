"""Several updates on a rollout: ratios without bias and the divergence clip, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from alignment.config import GrpoConfig
from alignment.grpo_losses import (
    StepWeights,
    TrustRegion,
    grpo_group_loss,
    step_weights,
    trust_metrics,
)
from common import gaussian
from common.types import LossOutput
from tests.alignment.test_grpo import loop_of
from tests.fakes import FakeGenerator, FunctionReward, redness

RED = {"red": FunctionReward("red", redness)}
CLIPS = {"clip_low": 1e-4, "clip_high": 1e-4}
STD = 0.5
# Noise of the member, and how far the mean has moved since.
XI = torch.tensor([[1.0, -1.0, 2.0, 0.0]], dtype=torch.float64)
MOVED = torch.tensor([[0.1, 0.0, 0.2, -0.1]], dtype=torch.float64)


def loss_of(
    advantage: float,
    *,
    moved: Tensor = MOVED,
    normalized: bool = False,
    divergence_clip: float | None = None,
    **options: float,
) -> LossOutput:
    """Loss of a single member that the old policy, with mean 0, took to std xi."""
    old = gaussian.Gaussian(torch.zeros(1, 4, dtype=torch.float64), STD)
    now = gaussian.Gaussian(moved, STD)
    after = STD * XI
    trust = TrustRegion(
        gaussian.kl_same_std(now, old),
        STD,
        normalized=normalized,
        divergence_clip=divergence_clip,
    )
    return grpo_group_loss(
        gaussian.log_prob(now, after),
        gaussian.log_prob(old, after),
        torch.tensor([advantage], dtype=torch.float64),
        None,
        policy_weight=options.pop("policy_weight", 1.0),
        kl_weight_scaled=0.0,
        trust=trust,
        **options,
    )


def test_plain_and_normalized_ratio_by_hand() -> None:
    """D = 0.015 / 0.5 = 0.03, log r = 0.25 - 0.03 = 0.22, and log rho = 0.5 / 4 = 0.125."""
    plain = loss_of(1.0)
    assert plain.metrics["old_kl"] == pytest.approx(0.03)
    assert float(plain.loss) == pytest.approx(-1.246077, abs=1e-6)
    # the loss of a normalized ratio is divided by std
    rho = -STD * float(loss_of(1.0, normalized=True).loss)
    assert rho == pytest.approx(1.133148, abs=1e-6)
    assert rho == pytest.approx(math.exp(float((XI * MOVED).mean())), rel=1e-12)


@pytest.mark.parametrize(
    ("clip", "advantage", "loss", "held"),
    [
        # D = 0.03 is too far: the good member would go on, the bad one comes back
        (0.02, 1.0, 0.0, ("high", 1.0)),
        (0.02, -1.0, 1.246077, ("low", 0.0)),
        (0.05, 1.0, -1.246077, ("high", 0.0)),
        (0.05, -1.0, 1.246077, ("low", 0.0)),
        # exactly at the limit is outside
        (0.03 * (1 - 1e-12), 1.0, 0.0, ("high", 1.0)),
    ],
)
def test_divergence_clip_holds_a_member_that_would_go_further(
    clip: float, advantage: float, loss: float, held: tuple[str, float]
) -> None:
    output = loss_of(advantage, divergence_clip=clip)
    assert float(output.loss) == pytest.approx(loss, abs=1e-6)
    metrics = trust_metrics([output])
    assert metrics[f"train/clip_frac_{held[0]}"] == held[1]


def test_divergence_clip_holds_a_bad_member_that_moved_away() -> None:
    """The other way, log r = -0.28: the bad member is held and the good one comes back."""
    bad = loss_of(-1.0, moved=-MOVED, divergence_clip=0.02)
    assert float(bad.loss) == 0.0
    assert trust_metrics([bad])["train/clip_frac_low"] == 1.0
    good = loss_of(1.0, moved=-MOVED, divergence_clip=0.02)
    assert float(good.loss) == pytest.approx(-math.exp(-0.28))
    assert trust_metrics([good])["train/clip_frac_high"] == 0.0


def test_divergence_clip_takes_the_sign_without_bias() -> None:
    """Here log r is -0.01 while log r + D is 0.02: the member has moved towards its noise."""
    moved = torch.tensor([[0.04, 0.0, 0.0, 0.0]], dtype=torch.float64)
    moved[0, 3] = math.sqrt(0.06 - 0.0016)
    output = loss_of(1.0, moved=moved, divergence_clip=0.02)
    assert output.metrics["old_kl"] == pytest.approx(0.03)
    assert output.metrics["above_positive"] == 0.0
    assert float(output.loss) == 0.0
    # the same member with a negative advantage comes back, and is kept
    back = loss_of(-1.0, moved=moved, divergence_clip=0.02)
    assert float(back.loss) == pytest.approx(math.exp(-0.01))


@pytest.mark.parametrize("form", ["finite", "none"])
def test_first_update_has_the_gradient_of_the_plain_ratio(form: str) -> None:
    """At mu = mu_old both gradients are -lambda A xi / (std N); finite's is then -A xi / delta."""
    weight = step_weights(STD, sigma=0.9, sigma_next=0.7, gain=0.3, form=form).policy
    gradients = []
    for normalized in (False, True):
        moved = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
        output = loss_of(1.5, moved=moved, normalized=normalized, policy_weight=weight)
        gradients.append(torch.autograd.grad(output.loss, moved)[0])
    by_hand = -weight * 1.5 * XI / STD / 4
    assert torch.allclose(gradients[0], by_hand, atol=1e-15)
    assert torch.allclose(gradients[1], by_hand, atol=1e-15)
    if form == "finite":
        assert torch.allclose(by_hand, -1.5 * XI / 0.2 / 4)


def test_normalized_gradient_away_from_the_old_policy() -> None:
    """d rho / d mu = rho xi / N, without a term of the distance itself."""
    moved = MOVED.clone().requires_grad_()
    output = loss_of(2.0, moved=moved, normalized=True)
    (gradient,) = torch.autograd.grad(output.loss, moved)
    rho = math.exp(0.125)
    assert torch.allclose(gradient, -2.0 * rho * XI / 4 / STD, rtol=1e-12)


def test_clips_bound_the_normalized_ratio_in_its_units() -> None:
    """rho = 1.133: a clip of 0.1 binds although r = 1.246, one of 0.2 does not."""
    bound = loss_of(1.0, normalized=True, clip_low=0.1, clip_high=0.1)
    assert float(bound.loss) == pytest.approx(-1.1 / STD)
    assert bound.metrics["clip_frac"] == 1.0
    free = loss_of(1.0, normalized=True, clip_low=0.2, clip_high=0.2)
    assert float(free.loss) == pytest.approx(-math.exp(0.125) / STD)
    assert free.metrics["held_positive"] == 0.0


def test_plain_ratios_of_a_large_latent_lie_below_one() -> None:
    """200,000 elements, std 0.45, D = 2.5e-4: no plain ratio is above 1, of the others half are."""
    draw = torch.Generator().manual_seed(0)
    moved = 1e-2 * torch.randn(1, 200_000, generator=draw)
    std, members = 0.45, 64
    old = gaussian.Gaussian(torch.zeros_like(moved), std)
    now = gaussian.Gaussian(moved, std)
    divergence = gaussian.kl_same_std(now, old)
    assert float(divergence) == pytest.approx(2.5e-4, rel=0.02)
    outputs = {False: [], True: []}
    for _ in range(members):
        after = std * torch.randn(1, 200_000, generator=draw)
        ratio = gaussian.log_prob(now, after) - gaussian.log_prob(old, after)
        for normalized, found in outputs.items():
            found.append(
                grpo_group_loss(
                    ratio,
                    torch.zeros(1),
                    torch.ones(1),
                    None,
                    policy_weight=1.0,
                    kl_weight_scaled=0.0,
                    trust=TrustRegion(divergence, std, normalized=normalized),
                )
            )
    assert trust_metrics(outputs[False])["train/ratio_above_positive"] == 0.0
    share = trust_metrics(outputs[True])["train/ratio_above_positive"]
    assert share == pytest.approx(0.5, abs=0.2)


def test_trust_metrics_count_members_by_the_sign_of_their_advantage() -> None:
    """Logs of ratios with their advantages; clips of 0.1 hold the first and the fourth."""
    log_ratio_G = torch.tensor([0.2, -0.05, 0.2, -0.3, -0.2])
    output = grpo_group_loss(
        log_ratio_G,
        torch.zeros(5),
        torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0]),
        None,
        policy_weight=1.0,
        kl_weight_scaled=0.0,
        clip_low=0.1,
        clip_high=0.1,
        trust=TrustRegion(torch.tensor([0.5]), 0.5),
    )
    assert trust_metrics([output, output]) == pytest.approx(
        {
            "train/old_kl": 0.5,
            "train/ratio_above_positive": 0.5,
            "train/ratio_above_negative": 0.5,
            "train/clip_frac_high": 0.2,
            "train/clip_frac_low": 0.2,
        }
    )
    only_good = replace(output, metrics={**output.metrics, "negative": 0.0})
    assert math.isnan(trust_metrics([only_good])["train/ratio_above_negative"])


@pytest.mark.parametrize(
    ("options", "metric"),
    [
        ({"ratio": "normalized", **CLIPS}, "train/clip_frac"),
        ({"divergence_clip": 1e-12}, "train/clip_frac_high"),
    ],
)
def test_second_update_of_the_loop_stays_in_its_trust_region(
    options: dict, metric: str
) -> None:
    loop = loop_of(RED, updates=2, kl_weight=0.0, lr=3e-2, **options)
    result = loop.step(0)
    assert loop.engine.steps == 2
    assert result.metrics["train/old_kl"] > 0.0
    assert result.metrics[metric] > 0.0
    # the first update moves the policy towards the good members and away from the bad ones
    above = result.metrics["train/ratio_above_positive"]
    assert above > result.metrics["train/ratio_above_negative"]


@pytest.mark.parametrize("ratio", ["plain", "normalized"])
def test_loss_of_the_loop_after_the_policy_has_moved(ratio: str) -> None:
    """With xi of each member and the move of the shared mean, on the loop's own rollout."""
    generator = FakeGenerator(dtype=torch.float64)
    loop = loop_of(
        RED,
        generator=generator,
        updates=2,
        ratio=ratio,
        clip_low=0.9,
        clip_high=0.9,
        kl_weight=0.0,
    )
    (group,) = generator.rollout(["a"], group_size=4, seeds=[5])
    (step,) = group.steps
    with torch.no_grad():
        generator.module.bias_C += torch.tensor([0.4, -0.2, 0.6], dtype=torch.float64)
    moved = generator.transition("a", step).mean.detach() - step.mean_MCFHW
    xi = (step.next_GCFHW - step.mean_MCFHW) / step.std
    inner_G = (xi * moved).flatten(1).mean(1)
    log_ratio_G = inner_G / step.std - moved.square().mean() / (2 * step.std**2)
    advantage_G = torch.tensor([-1.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    by_hand = {
        "plain": -2.0 * (log_ratio_G.exp() * advantage_G).mean(),
        "normalized": -2.0 * (inner_G.exp() * advantage_G).mean() / step.std,
    }

    output = loop.objective.loss("a", step, advantage_G, StepWeights(2.0, 4.0))
    # the rollout's log-probs are fp32
    assert float(output.loss.detach()) == pytest.approx(float(by_hand[ratio]), rel=1e-5)
    assert float(by_hand["plain"]) != pytest.approx(
        float(by_hand["normalized"]), rel=1e-2
    )


def test_one_update_has_no_metrics_of_later_updates() -> None:
    metrics = loop_of(RED).step(0).metrics
    assert not {"train/old_kl", "train/ratio_above_positive"} & metrics.keys()


def test_plain_ratios_that_are_never_above_one_are_reported_once(
    capsys: pytest.CaptureFixture,
) -> None:
    loop = loop_of(RED, updates=2, ratio="plain", **CLIPS)
    for share in (0.5, math.nan):
        loop.objective._warn_of_one_side({"train/ratio_above_positive": share})
    assert capsys.readouterr().out == ""
    for share in (0.01, 0.0):
        loop.objective._warn_of_one_side({"train/ratio_above_positive": share})
    assert capsys.readouterr().out.count("grpo.ratio=normalized") == 1


def test_several_updates_need_the_means_of_the_rollout() -> None:
    class Forgetful(FakeGenerator):
        def rollout(self, *of: object, **options: object) -> list:
            groups = super().rollout(*of, **options)
            return [
                replace(g, steps=tuple(replace(s, mean_MCFHW=None) for s in g.steps))
                for g in groups
            ]

    loop = loop_of(RED, generator=Forgetful(), updates=2, divergence_clip=1e-5)
    with pytest.raises(ValueError, match="mean_MCFHW"):
        loop.step(0)
    # a single update does not
    assert loop_of(RED, generator=Forgetful()).step(0).metrics["train/skipped"] == 0.0


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"updates": 2}, "divergence_clip"),
        ({"updates": 2, **CLIPS}, "ratio=normalized"),
        ({"updates": 2, "ratio": "normalized"}, "clip_low"),
        ({"ratio": "normalized", **CLIPS}, "ratio=normalized needs updates above 1"),
        ({"divergence_clip": 1e-5}, "divergence_clip"),
    ],
)
def test_trust_region_without_effect_or_bound_is_refused(
    options: dict, key: str
) -> None:
    with pytest.raises(ValueError, match=key):
        GrpoConfig(**options)


def test_trust_region_that_is_chosen_is_accepted() -> None:
    GrpoConfig(updates=2, ratio="plain", **CLIPS)
    GrpoConfig(updates=2, ratio="normalized", **CLIPS)
    GrpoConfig(updates=2, divergence_clip=1e-5)
