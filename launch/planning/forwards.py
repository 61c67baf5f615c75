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

    The collapsed update sends the latent that all members share through the denoiser once.
    """
    how = cfg.generator.sampler
    members = cfg.grpo.group_size
    if how.initial_noise == "shared":
        return 1 + (how.steps_per_group - 1) * members
    return how.steps_per_group * members
