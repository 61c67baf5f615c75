"""An update with a gradient that is no number is not made, under any stage of ZeRO; too many of them end the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from common.distributed import any_rank
from common.log import say
from engine.state import rewind

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor


class SkipNonFinite:
    """`common.types.Engine` around deepspeed's.

    A gradient that holds NaN or infinity counts as zero, and the update it belongs to as not made: weights, moments,
    step count and learning rate are afterwards what they were before, on all ranks, whichever had it. (DeepSpeed has no
    way to let accumulated gradients go: it makes its step, at rate 0, and what it did to the optimizer is undone.)

    patience  so many in a row are borne; one more raises FloatingPointError on all ranks. Checkpoints before are whole
    """

    def __init__(self, engine: DeepSpeedEngine, *, patience: int) -> None:
        self.engine, self.patience = engine, patience
        self.in_a_row, self._skipped = 0, 0
        self._bad: Tensor = torch.zeros((), dtype=torch.bool, device=engine.device)
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._look)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        """Counts backwards, as deepspeed's does, and makes the update on the last one."""
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return
        bad, self._bad = any_rank(self._bad), torch.zeros_like(self._bad)
        if not bad:
            self.engine.step()
            self.in_a_row = 0
            return
        self._step_in_vain()
        self.in_a_row += 1
        self._skipped += 1
        say(
            f"a gradient is not finite: this update is not made ({self.in_a_row} in a row)"
        )
        if self.in_a_row > self.patience:
            raise FloatingPointError(
                f"{self.in_a_row} updates in a row had a gradient that is not finite; the weights are those before. A "
                "smaller learning rate or a lower guidance may help, or max_nonfinite_updates bears more"
            )

    def pop_skipped_count(self) -> float:
        """Updates not made since this was last asked."""
        count, self._skipped = self._skipped, 0
        return float(count)

    def _look(self, gradient: Tensor) -> Tensor:
        """Without waiting for the device."""
        finite = gradient.isfinite().all()
        self._bad = self._bad | ~finite
        return torch.where(
            finite,
            gradient,
            torch.zeros((), dtype=gradient.dtype, device=gradient.device),
        )

    def _step_in_vain(self) -> None:
        optimizer, scheduler = self.engine.client_optimizer, self.engine.lr_scheduler
        before = {
            p: {k: _copied(v) for k, v in state.items()}
            for p, state in optimizer.state.items()
        }
        done = scheduler.last_epoch
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self.engine.step()
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    value.copy_(
                        before[parameter][key]
                    ) if parameter in before else value.zero_()
        rewind(scheduler, done)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
