"""AdamW that clips every parameter group by its own gradient norm, under any ZeRO stage.

DeepSpeed clips by one norm over all parameters. In dual-objective RL the gradients of the
reward head (Bradley-Terry) and of the backbone (policy) differ by orders of magnitude, so
one of them would decide the step of the other. ZeRO 1 to 3 call the optimizer once per
group, with this rank's slice of the group, flat, as the only parameter; the squares are
then summed over ranks. Padding has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.optim import AdamW


class PerGroupClippedAdamW(AdamW):
    """AdamW whose groups are clipped by their own norms, which `take_norms` returns by name.

    max_norm  largest norm of a group's gradient; 0 leaves gradients alone
    sliced    True if gradients are slices over ranks (ZeRO 1 to 3), False if they are whole
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        max_norm: float,
        sliced: bool,
        **options: Any,
    ) -> None:
        super().__init__(groups, **options)
        self.max_norm = max_norm
        self.sliced = sliced
        self.norms: dict[str, float] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Clip every group, then make AdamW's step.

        Raises FloatingPointError with the group's name when its norm is not finite; no
        weight has changed then.
        """
        # All groups are clipped before any weight changes.
        for group in self.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if gradients:
                self._clip(group["name"], gradients)
        return super().step(closure)

    def _clip(self, name: str, gradients: list[torch.Tensor]) -> None:
        # The norm is over all parameters of the group, and over all ranks.
        square = torch.stack([g.float().square().sum() for g in gradients]).sum()
        if self.sliced and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(square)
        norm = float(square.sqrt())
        self.norms[name] = norm
        if not norm < float("inf"):
            raise FloatingPointError(f"the gradient of group {name!r} has norm {norm}")

        # As torch's clip_grad_norm_: gradients are never scaled up.
        scale = self.max_norm / (norm + 1e-6)
        if 0.0 < scale < 1.0:
            for gradient in gradients:
                gradient.mul_(scale)

    def take_norms(self) -> dict[str, float]:
        """Return the norms of the last step, before clipping.

        Raises FloatingPointError if DeepSpeed silently skipped that step.
        """
        if not self.norms:
            raise FloatingPointError(
                "DeepSpeed skipped the update: a gradient is not finite"
            )
        # Emptied, so that a skipped step is noticed next time.
        norms = self.norms
        self.norms = {}
        return norms


def rewind_schedule(scheduler: Any, steps: int) -> None:
    """Put a LambdaLR where ``steps`` steps put it: its rates depend on the count only."""
    # The count, and the rates that follow from it.
    scheduler.last_epoch = steps
    rates = []
    for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        rates.append(base * factor(steps))
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
