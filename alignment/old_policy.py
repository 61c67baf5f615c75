"""The old policy of forward objectives: the average of the weights that samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.config import EmaConfig
from engine.ema import Ema

if TYPE_CHECKING:
    from torch import nn

    from alignment.config import OldPolicyConfig


class OldPolicy(Ema):
    """Average the trained weights after every step by `OldPolicyConfig.decay`, in fp32.

    It is state: `save` and `load` keep it in a checkpoint, apart from the exported average.
    """

    file = "old_policy.safetensors"

    def __init__(self, cfg: OldPolicyConfig, module: nn.Module) -> None:
        super().__init__(EmaConfig(decay=0.0), module)
        self.cfg = cfg

    def next_decay(self) -> float:
        """Return d of the update that is being averaged."""
        return self.cfg.decay(self.updates)
