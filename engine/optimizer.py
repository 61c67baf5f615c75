"""AdamW that clips every parameter group by its own gradient norm, under any ZeRO stage.

DeepSpeed clips by one norm over everything. In dual-objective RL the head's gradient (Bradley-Terry) and the backbone's
(policy) differ by orders of magnitude, so one would decide the step of the other (spec 3.4). ZeRO 1 to 3 call the
optimizer once per group, with what this rank has of it, flat, as the only parameter; the squares are then added over
ranks. Padding has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.optim import AdamW


class PerGroupClippedAdamW(AdamW):
    """``take_norms`` gives each group's norm of the last step, before clipping, by the group's ``name``.

    max_norm  0 leaves gradients alone
    sliced  the gradients are slices over ranks (ZeRO 1 to 3), not whole
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
        self.max_norm, self.sliced = max_norm, sliced
        self.norms: dict[str, float] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """FloatingPointError, naming the part, when a norm is not finite; its weights are then as they were."""
        for group in self.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if not gradients:
                continue
            square = torch.stack([g.float().square().sum() for g in gradients]).sum()
            if self.sliced and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(square)
            norm = float(square.sqrt())
            self.norms[group["name"]] = norm
            if not norm < float("inf"):
                raise FloatingPointError(
                    f"the gradient of the part {group['name']!r} has norm {norm}"
                )
            scale = self.max_norm / (norm + 1e-6)
            if 0.0 < scale < 1.0:
                for gradient in gradients:
                    gradient.mul_(scale)
        return super().step(closure)

    def take_norms(self) -> dict[str, float]:
        """The norms of the step just made. FloatingPointError if DeepSpeed skipped it, as it does without a word."""
        if not self.norms:
            raise FloatingPointError(
                "DeepSpeed skipped the update: a gradient is not finite"
            )
        norms, self.norms = self.norms, {}
        return norms
