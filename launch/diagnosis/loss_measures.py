"""Measure the loss of a step: its two terms, and whether the update helped what is rewarded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from alignment.grpo_losses import StepWeights, weights_of_steps
from common import gaussian
from common.distributed import gather_objects
from common.lora import adapters_off
from launch.diagnosis.update_measures import trained

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignment.config import GrpoConfig
    from common.types import Generator, Group
    from generator.wan import WanGenerator

# The KL term must have this part of the policy term's gradient, or its factor is rounding.
KL_TELLS = {"float32": 3e-4, "bfloat16": 0.1}


@torch.no_grad()
def gain(
    generator: Generator,
    cfg: GrpoConfig,
    groups: Sequence[Group],
    advantage_PM: Tensor,
) -> dict[str, float]:
    """Whether an update made what is rewarded more likely: the advantage of the new log-probs.

        gain = sum w A (log p_new - log p_old) / sum |w A (log p_new - log p_old)|

    over all members and stochastic steps, in [-1, 1]. A gradient step raises it above 0. All
    ranks must call this, and the result is over all of them.
    """
    weights = iter(
        weights_of_steps(
            [step for group in groups for step in group.steps],
            form=cfg.reweight,
            normalize=cfg.normalize_step_weights,
        )
    )
    # The old log-probs are those that the rollout recorded.
    signed = 0.0
    absolute = 0.0
    for group, advantage_G in zip(groups, advantage_PM, strict=True):
        for step in group.steps:
            policy = generator.transition(group.prompt, step)
            log_prob_G = gaussian.log_prob(policy, step.next_GCFHW)
            change_G = (log_prob_G - step.log_prob_G).double().cpu()
            term_G = next(weights).policy * advantage_G.double().cpu() * change_G
            signed += float(term_G.sum())
            absolute += float(term_G.abs().sum())
    # Over all ranks, since they made the update together.
    sums = gather_objects((signed, absolute))
    total = sum(size for _, size in sums)
    return {"update/gain": sum(part for part, _ in sums) / total if total else 0.0}


def loss_terms(
    generator: WanGenerator,
    module: nn.Module,
    cfg: GrpoConfig,
    group: Group,
    advantage_G: Tensor,
    weights: StepWeights,
    first: Mapping[str, Tensor],
) -> dict[str, float]:
    """Explain the gradient of a step's first backward by the two terms of the loss.

        first = a g_policy + b g_kl,     g_policy = d/dw -lambda mean_g[A_g log p_g]
                                         g_kl = d/dw beta lambda_KL KL

    by least squares, at the weights before the update. ``group`` is the first of the step. Both
    factors are those of the engine, equal and positive, if the loss is right:

    loss/policy    a |g_policy| / |first|: 1, or -1 with a turned sign
    loss/kl_factor b / a: 1; only where the KL term is large enough to tell
    loss/rest      what neither of them explains, relative to |first|
    kl/pull        |g_kl|
    """
    if not first:
        return {}
    # Only weights that the first backward reached.
    trained_now = trained(module)
    parameters = [trained_now[name] for name in first]
    gradient = list(first.values())
    term = _policy_term(generator, group, advantage_G, weights)
    policy = _slopes(term, parameters)
    found = {}
    terms = [policy]
    if cfg.kl_weight > 0:
        term = cfg.kl_weight * weights.kl * _kl_term(generator, module, group)
        kl = _slopes(term, parameters)
        found["kl/pull"] = _norm(kl)
        # A term that is rounding has no factor.
        if _norm(kl) > KL_TELLS[generator.cfg.dtype] * _norm(policy):
            terms.append(kl)
    if _norm(policy) == 0:
        return found
    if _norm(gradient) == 0:
        return {**found, "loss/policy": 0.0, "loss/rest": 1.0}

    # Least squares, by the inner products of the terms.
    count = len(terms)
    normal_KK = torch.zeros(count, count, dtype=torch.float64)
    right_K1 = torch.zeros(count, 1, dtype=torch.float64)
    for i, one in enumerate(terms):
        right_K1[i] = _dot(one, gradient)
        for j, other in enumerate(terms):
            normal_KK[i, j] = _dot(one, other)
    factor_K1 = torch.linalg.lstsq(normal_KK, right_K1).solution
    explained = factor_K1.T @ (2 * right_K1 - normal_KK @ factor_K1)
    rest = max(0.0, _dot(gradient, gradient) - float(explained))
    factors = factor_K1[:, 0].tolist()
    found["loss/policy"] = factors[0] * _norm(policy) / _norm(gradient)
    found["loss/rest"] = math.sqrt(rest) / _norm(gradient)
    if count > 1 and factors[0] != 0:
        found["loss/kl_factor"] = factors[1] / factors[0]
    return found


def _policy_term(
    generator: WanGenerator,
    group: Group,
    advantage_G: Tensor,
    weights: StepWeights,
) -> Tensor:
    """-lambda mean_g[A_g log p_g] at a group's first stochastic step, without constants."""
    step = group.steps[0]
    policy = generator.transition(group.prompt, step)
    next_GCFHW = step.next_GCFHW.to(policy.mean.device)
    squared_G = (next_GCFHW - policy.mean).square().flatten(1).mean(1)
    log_prob_G = -squared_G / (2 * policy.std**2)
    gain_G = advantage_G.to(log_prob_G.device) * log_prob_G
    return -weights.policy * gain_G.mean()


def _kl_term(generator: WanGenerator, module: nn.Module, group: Group) -> Tensor:
    """MEAN over elements of (mean - mean_ref)^2 / (2 std^2)."""
    step = group.steps[0]
    # An adapter is switched off here, whatever the generator takes for its reference.
    base = generator.reference()
    if generator.cfg.lora is not None:
        base = adapters_off(module)
    with torch.no_grad(), base:
        reference = generator.transition(group.prompt, step)
    policy = generator.transition(group.prompt, step)
    squared = (policy.mean - reference.mean).square()
    return squared.mean() / (2 * policy.std**2)


def _slopes(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    # Not backward(), which would add to the engine's gradients.
    gradients = torch.autograd.grad(
        loss,
        parameters,
        allow_unused=True,
        materialize_grads=True,
    )
    return [gradient.float().cpu() for gradient in gradients]


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Inner product over all weights, in fp64."""
    total = 0.0
    for a, b in zip(one, other, strict=True):
        total += float((a.double() * b.double()).sum())
    return total


def _norm(one: Sequence[Tensor]) -> float:
    return math.sqrt(_dot(one, one))
