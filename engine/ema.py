"""Exponential moving average of the trained weights, exported next to the last weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.checkpoint import load_tensors, save_tensors
from common.distributed import is_main
from engine.zero3 import is_split

if TYPE_CHECKING:
    from torch import Tensor, nn

    from engine.config import EmaConfig

EMA_FILE = "ema.safetensors"
COUNT_KEY = "updates"


class Ema:
    """Average the trained weights over the optimizer's steps, in fp32.

    average_n = d_n average_{n-1} + (1 - d_n) weights_n,  d_n = min(decay, (1 + n) / (10 + n))

    The average starts at the weights of the module and follows early steps quickly. Every
    rank holds the whole average. All ranks call every method: under ZeRO 3 the weights are
    gathered one by one. A subclass may have another decay and file.
    """

    file = EMA_FILE

    def __init__(self, cfg: EmaConfig, module: nn.Module) -> None:
        self.decay = cfg.decay
        self.updates = 0
        # The parameters stay the module's: every update reads their values.
        self.trained = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        # fp32, for 1 - d_n = 0.01 of a weight's change would round away in bfloat16.
        self.average = {
            name: _read(parameter).float() for name, parameter in self.trained.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of one more optimizer step into the average."""
        self.updates += 1
        decay = self.next_decay()
        # Weight by weight: under ZeRO 3 the whole model may not fit.
        for name, parameter in self.trained.items():
            self.average[name].lerp_(_read(parameter).float(), 1 - decay)

    def next_decay(self) -> float:
        """Return d_n for the update number n = ``updates``, counted from 1."""
        # Early on, a short memory: the first weights are far from the last.
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run the module with the average inside, and with its exact weights afterwards.

        For sampling only: the optimizer's fp32 copy of the weights stays.
        """
        # On the CPU, so that no second copy of the weights takes the device's memory.
        weights = {name: _read(p).cpu() for name, p in self.trained.items()}
        self._write_all(self.average)
        try:
            yield
        finally:
            self._write_all(weights)

    def _write_all(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            _write(parameter, values[name])

    def state(self) -> dict[str, Tensor]:
        """Return the average under the names of the weights, in their dtype."""
        return {
            name: self.average[name].to(parameter.dtype)
            for name, parameter in self.trained.items()
        }

    def save(self, folder: Path) -> None:
        """Write the average into a folder, on rank 0."""
        if is_main():
            count = {COUNT_KEY: torch.tensor([self.updates])}
            save_tensors(folder / self.file, {**self.average, **count})

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        `engine.state.load_engine` has checked that the checkpoint trains the same weights.
        Raises FileNotFoundError without the file.
        """
        # Copied in place: the averages stay on the device of their weights.
        saved = load_tensors(folder / self.file)
        self.updates = int(saved.pop(COUNT_KEY))
        for name, tensor in saved.items():
            self.average[name].copy_(tensor)


@torch.no_grad()
def _read(parameter: nn.Parameter) -> Tensor:
    """Return a copy of the whole weight."""
    with _gathered(parameter, modifier_rank=None):
        return parameter.detach().clone()


@torch.no_grad()
def _write(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the weight that the module runs with."""
    with _gathered(parameter, modifier_rank=0):
        parameter.copy_(value)


def _gathered(
    parameter: nn.Parameter, *, modifier_rank: int | None
) -> AbstractContextManager[None]:
    """Gather a weight on every rank inside; all ranks get the changes of ``modifier_rank``."""
    # without ZeRO 3 every rank holds the whole weight, and deepspeed may be absent
    if not is_split(parameter):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=modifier_rank)
