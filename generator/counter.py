"""ForwardCounter: how many samples went through the transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from common.distributed import sum_over_ranks

if TYPE_CHECKING:
    from torch import nn


class ForwardCounter:
    """Counts samples by a hook on each module; under guidance a latent is two samples.

    A block that gradient checkpointing computes again is not counted again. A sample counts
    once, also where ``ranks_per_sample`` ranks compute it together.
    """

    def __init__(self, *modules: nn.Module, ranks_per_sample: int = 1) -> None:
        self.ranks_per_sample = ranks_per_sample
        self.grad = 0
        self.no_grad = 0
        for module in modules:
            module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(
        self,
        _: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        # Wan takes its latents by name, other modules by position
        samples = len(args[0] if args else kwargs["hidden_states"])
        if torch.is_grad_enabled():
            self.grad += samples
        else:
            self.no_grad += samples

    def take(self) -> dict[str, float]:
        """Counts since the last call, SUM over ranks."""
        counts = {
            "forwards/no_grad": sum_over_ranks(self.no_grad) / self.ranks_per_sample,
            "forwards/grad": sum_over_ranks(self.grad) / self.ranks_per_sample,
        }
        # the next step counts from 0
        self.grad = 0
        self.no_grad = 0
        return counts
