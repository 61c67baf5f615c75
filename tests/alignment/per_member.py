"""The policy gradient with a forward and a backward for each member, to compare the loop with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alignment.config import GrpoConfig
from alignment.grpo_losses import grpo_group_loss, step_weights
from common import gaussian
from common.types import Generator, Group, Step


def step_of(step: Step, member: int) -> Step:
    """The step of one member."""
    only = slice(member, member + 1)
    shared = len(step.latent_MCFHW) == 1
    mine = slice(None) if shared else only
    mean_MCFHW = step.mean_MCFHW
    return replace(
        step,
        latent_MCFHW=step.latent_MCFHW[mine],
        mean_MCFHW=None if mean_MCFHW is None else mean_MCFHW[mine],
        next_GCFHW=step.next_GCFHW[only],
        log_prob_G=step.log_prob_G[only],
    )


def per_member_gradient(
    generator: Generator,
    groups: Sequence[Group],
    advantage_PG: Tensor,
    cfg: GrpoConfig,
) -> tuple[list[Tensor], list[float]]:
    """MEAN over groups, steps and members of the members' gradients, and their losses.

    The gradient has a tensor for each trained parameter of ``generator.module``.
    """
    losses: list[Tensor] = []
    count = sum(step.size for group in groups for step in group.steps)
    trained = [p for p in generator.module.parameters() if p.requires_grad]
    total = [torch.zeros_like(parameter) for parameter in trained]
    for group, advantage_G in zip(groups, advantage_PG, strict=True):
        for step in group.steps:
            weights = step_weights(
                step.std,
                sigma=step.sigma,
                sigma_next=step.sigma_next,
                gain=step.gain,
                form=cfg.reweight,
            )
            for member in range(step.size):
                only = slice(member, member + 1)
                alone = step_of(step, member)
                with torch.no_grad(), generator.reference():
                    reference = generator.transition(group.prompt, alone)
                policy = generator.transition(group.prompt, alone)
                log_prob_1 = gaussian.log_prob(policy, step.next_GCFHW[only])
                loss = grpo_group_loss(
                    log_prob_1,
                    step.log_prob_G[only],
                    advantage_G[only],
                    gaussian.kl_same_std(policy, reference),
                    policy_weight=weights.policy,
                    kl_weight_scaled=cfg.kl_weight * weights.kl,
                    clip_low=cfg.clip_low,
                    clip_high=cfg.clip_high,
                    on_policy=cfg.updates == 1,
                ).loss
                losses.append(loss.detach())
                gradient = torch.autograd.grad(loss / count, trained)
                total = [a + b for a, b in zip(total, gradient, strict=True)]
    return total, [float(loss) for loss in losses]
