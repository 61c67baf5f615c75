"""What a step costs: how many samples went through the denoiser, with and without gradient."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from generator.config import SamplerConfig
    from launch.schemas.training import GrpoRun


def samples_per_rollout(how: SamplerConfig, members: int) -> float:
    """DiT samples of one group's rollout, MEAN over where its stochastic steps may lie (`rollout_group`)."""
    size = how.steps_per_group
    costs = []
    for first in range(how.stochastic_first, how.stochastic_range - size + 1):
        left = how.num_steps - first - size
        tail = left if how.tail_steps is None else min(left, how.tail_steps)
        start = (first + 1) * (1 if how.initial_noise == "shared" else members)
        costs.append(start + (size - 1 + tail) * members)
    return fmean(costs) * (1 if how.guidance_scale == 1 else 2)


def samples_per_update(cfg: GrpoRun) -> int:
    """Latents along which one group's loss is computed: what its members share goes through the denoiser once."""
    how, members = cfg.generator.sampler, cfg.grpo.group_size
    if how.initial_noise == "shared" and cfg.grpo.update == "collapsed":
        return 1 + (how.steps_per_group - 1) * members
    return how.steps_per_group * members
