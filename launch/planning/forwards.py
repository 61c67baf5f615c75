"""Number of samples that pass through the denoiser in one GRPO step, with and without gradient."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from generator.config import SamplerConfig
    from launch.schemas.training import GrpoRun


def samples_per_rollout(how: SamplerConfig, members: int) -> float:
    """Count the denoiser's samples for the rollout of one group of ``members`` videos.

    MEAN over the places where the stochastic steps may begin. Guidance doubles the count.
    """
    size = how.steps_per_group
    if size == 0:
        # A solver's walk of every member.
        return float(how.solver_steps * members * branches(how))
    costs = []
    for first in range(how.stochastic_first, how.stochastic_range - size + 1):
        # The prefix and the first stochastic step; shared noise denoises it once for the group.
        start = first + 1
        if how.prefix_steps is not None:
            start = min(first, how.prefix_steps) + 1
        if how.initial_noise != "shared":
            start *= members

        # The other stochastic steps and the deterministic tail are each member's.
        tail = how.num_steps - first - size
        if how.tail_steps is not None:
            tail = min(tail, how.tail_steps)
        costs.append(start + (size - 1 + tail) * members)
    return fmean(costs) * branches(how)


def branches(how: SamplerConfig) -> int:
    """Count the forwards of a sample: with guidance also that of the negative prompt."""
    return 1 if how.guidance_scale == 1 else 2


def samples_per_update(cfg: GrpoRun) -> int:
    """Count the latents of one group that enter the loss in one pass.

    The collapsed update sends the latent that all members share through the denoiser once; a
    forward objective sends every member at each of its noise levels.
    """
    how = cfg.generator.sampler
    members = cfg.grpo.group_size
    if cfg.grpo.objective != "policy":
        return members * cfg.grpo.forward.timesteps_per_sample
    if how.initial_noise == "shared":
        return 1 + (how.steps_per_group - 1) * members
    return how.steps_per_group * members


def forwards_per_update(cfg: GrpoRun) -> int:
    """Count the denoiser's forwards of one group's updates, a backward counted as two.

    For every latent 3 with gradient, 1 for the reference policy where there is one, and 1 for
    an old policy that is not the policy of the update. Guidance doubles the count.
    """
    # forward and backward of the policy
    per_latent = 3
    if cfg.grpo.has_reference:
        per_latent += 1
    if cfg.grpo.has_old_policy:
        per_latent += 1
    # the negative prompt's branch
    guidance = branches(cfg.generator.sampler)
    if not cfg.generator.guidance_in_update:
        guidance = 1
    return cfg.grpo.updates * samples_per_update(cfg) * guidance * per_latent
