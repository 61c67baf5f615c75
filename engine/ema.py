"""An exponential moving average of the trained weights: steadier than the last step's, and exported beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.checkpoint import load_tensors, save_tensors
from common.distributed import is_main

if TYPE_CHECKING:
    from torch import Tensor, nn

    from engine.config import EmaConfig

FILE = "ema.safetensors"
_COUNT = "updates"


class Ema:
    """average_n = d_n average_{n-1} + (1 - d_n) weights_n,  d_n = min(decay, (1 + n) / (10 + n)), in fp32.

    The average starts at the weights it is built on, and follows early ones quickly. Every rank holds all of it. All
    ranks call every method: under ZeRO 3 the weights are gathered, one at a time.
    """

    def __init__(self, cfg: EmaConfig, module: nn.Module) -> None:
        self.cfg, self.updates = cfg, 0
        self.trained = {
            name: p for name, p in module.named_parameters() if p.requires_grad
        }
        self.average = {name: _read(p).float() for name, p in self.trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        self.updates += 1
        decay = min(self.cfg.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.trained.items():
            self.average[name].lerp_(_read(parameter).float(), 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the module runs with the average; afterwards with the bits it had. For sampling, not for training."""
        kept = {
            name: _read(parameter).cpu() for name, parameter in self.trained.items()
        }
        for name, parameter in self.trained.items():
            _write(parameter, self.average[name])
        try:
            yield
        finally:
            for name, parameter in self.trained.items():
                _write(parameter, kept[name])

    def state(self) -> dict[str, Tensor]:
        """The average under the weights' names, in their dtype."""
        return {
            name: self.average[name].to(parameter.dtype)
            for name, parameter in self.trained.items()
        }

    def save(self, folder: Path) -> None:
        """folder/ema.safetensors, by rank 0."""
        if is_main():
            averages = {name: tensor.cpu() for name, tensor in self.average.items()}
            save_tensors(
                folder / FILE, {**averages, _COUNT: torch.tensor([self.updates])}
            )

    def load(self, folder: Path) -> None:
        """What `save` wrote. Raises FileNotFoundError without it, ValueError when it averages other weights."""
        saved = load_tensors(folder / FILE)
        self.updates = int(saved.pop(_COUNT))
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        if shapes != {
            name: tuple(tensor.shape) for name, tensor in self.average.items()
        }:
            raise ValueError(
                f"{folder / FILE} averages other weights than this run trains"
            )
        for name, tensor in saved.items():
            self.average[name].copy_(tensor)


@torch.no_grad()
def _read(parameter: nn.Parameter) -> Tensor:
    """A copy of the whole weight."""
    with _gathered(parameter, modifier=None):
        return parameter.detach().clone()


@torch.no_grad()
def _write(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the weight that the module runs with. The optimizer's own fp32 copy, where it has one, stays."""
    with _gathered(parameter, modifier=0):
        parameter.copy_(value)


def _gathered(
    parameter: nn.Parameter, *, modifier: int | None
) -> AbstractContextManager[None]:
    """Inside, the weight is whole on every rank; ``modifier`` is the rank whose change all get."""
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(
        [parameter], modifier_rank=modifier, enabled=hasattr(parameter, "ds_id")
    )
