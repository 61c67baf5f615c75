"""Skip optimizer steps whose gradient holds NaN or infinity, under any ZeRO stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from common import progress
from common.distributed import any_rank
from common.log import say
from engine.optimizer import rewind_schedule

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor


class SkipNonFinite:
    """Skips optimizer steps with non-finite gradients and stops after `patience` in a row.

    It is the `common.types.Engine` around a DeepSpeed engine. After a skipped step weights,
    moments, step count and learning rate are those before it, on all ranks, whichever rank
    had the gradient. DeepSpeed cannot drop accumulated gradients: such a gradient is set to
    zero, DeepSpeed steps at rate 0, and the optimizer's state is restored.

    patience  number of skipped steps in a row that are allowed; one more raises
              FloatingPointError on all ranks
    ranks_per_sample  ranks that hold parts of each sample's gradient: DeepSpeed takes the
              MEAN over ranks, and a sample needs the SUM over its ranks
    """

    def __init__(
        self, engine: DeepSpeedEngine, *, patience: int, ranks_per_sample: int = 1
    ) -> None:
        self.engine = engine
        self.patience = patience
        self.ranks_per_sample = ranks_per_sample
        self.skipped_in_a_row = 0
        self._skipped = 0
        # Hooks see a gradient before ZeRO reduces it over ranks.
        self._is_bad: Tensor = torch.zeros((), dtype=torch.bool, device=engine.device)
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._check_gradient)

    def backward(self, loss: Tensor) -> None:
        progress.enter("update")
        # mean over W ranks of D parts = mean over W / D samples
        self.engine.backward(loss * self.ranks_per_sample)
        progress.tick()

    def step(self) -> None:
        """Count a backward, as DeepSpeed does, and update the weights on the last one."""
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return

        # All ranks skip if the gradient of one is bad.
        is_bad = any_rank(self._is_bad)
        self._is_bad = torch.zeros_like(self._is_bad)
        if not is_bad:
            self.engine.step()
            self.skipped_in_a_row = 0
            return

        # Skip, and stop the run if it happens too often.
        self._step_without_effect()
        self._skipped += 1
        self.skipped_in_a_row += 1
        count = self.skipped_in_a_row
        say(f"a gradient is not finite: this update is skipped ({count} in a row)")
        if count > self.patience:
            raise FloatingPointError(
                f"{count} updates in a row had a gradient that is not finite; none of them "
                "changed the weights. Lower optimizer.lr or the guidance scale, or raise "
                "max_nonfinite_updates"
            )

    def pop_skipped_count(self) -> float:
        """Return how many updates were skipped since the last call."""
        count = self._skipped
        self._skipped = 0
        return float(count)

    def _check_gradient(self, gradient: Tensor) -> Tensor:
        """Note a bad gradient and make it zero, without waiting for the device."""
        # torch.where, because `if` would wait: 0 * NaN would stay NaN.
        is_finite = gradient.isfinite().all()
        self._is_bad = self._is_bad | ~is_finite
        zero = torch.zeros((), dtype=gradient.dtype, device=gradient.device)
        return torch.where(is_finite, gradient, zero)

    def _step_without_effect(self) -> None:
        optimizer = self.engine.client_optimizer
        scheduler = self.engine.lr_scheduler
        # Remember the optimizer's state, and step at rate 0.
        before = {p: _clone(state) for p, state in optimizer.state.items()}
        steps_done = scheduler.last_epoch
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self.engine.step()

        # Undo the step. Moments that the first step has just made go back to zero.
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if not isinstance(value, torch.Tensor):
                    continue
                if parameter in before:
                    value.copy_(before[parameter][key])
                else:
                    value.zero_()
        rewind_schedule(scheduler, steps_done)


def _clone(state: dict[str, Any]) -> dict[str, Any]:
    copies = {}
    for key, value in state.items():
        copies[key] = value.clone() if isinstance(value, torch.Tensor) else value
    return copies
