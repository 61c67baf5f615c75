"""What a step costs: how many samples went through the denoiser, with and without gradient."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from common.distributed import sum_over_ranks

if TYPE_CHECKING:
    from torch import nn

    from generator.config import SamplerConfig
    from launch.runs import GrpoRun


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


class ForwardCounter:
    """Counts samples, not calls, by a hook on the module: under guidance one latent is two samples.

    A block that gradient checkpointing computes again is not counted again.
    """

    def __init__(self, module: nn.Module) -> None:
        self.grad = self.no_grad = 0
        module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        samples = len(args[0] if args else kwargs["hidden_states"])
        if torch.is_grad_enabled():
            self.grad += samples
        else:
            self.no_grad += samples

    def take(self) -> dict[str, float]:
        """SUM over ranks since the last call."""
        counts = {"forwards/no_grad": sum_over_ranks(self.no_grad), "forwards/grad": sum_over_ranks(self.grad)}
        self.grad = self.no_grad = 0
        return counts
