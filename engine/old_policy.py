"""The old policy of a forward objective: the average of the weights that samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.config import EmaConfig
from engine.ema import Ema

if TYPE_CHECKING:
    from torch import nn


class OldPolicy(Ema):
    """Average the trained weights with a scheduled decay, in fp32.

    old_n = d_n old_{n-1} + (1 - d_n) weights_n,  d_n = ``schedule``(n),  n counted from 1

    It is state: `save` and `load` keep it in a checkpoint, apart from the exported average.
    """

    file = "old_policy.safetensors"

    def __init__(self, schedule: Callable[[int], float], module: nn.Module) -> None:
        super().__init__(EmaConfig(decay=0.0), module)
        self.schedule = schedule

    def next_decay(self) -> float:
        """Return d of the update that is being averaged."""
        return self.schedule(self.updates)
