"""Watch a DPO run for likelihood displacement: the policy moves away from both videos."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.checkpoint import load_state
from common.log import say
from common.types import json_number

if TYPE_CHECKING:
    from alignment.config import DpoConfig


class DisplacementWatch:
    """Warns if the error on chosen videos rises above the reference policy's.

    This is likelihood displacement: the policy moves away from the rejected video instead of
    towards the chosen one. The MEAN over the last ``displacement_window`` steps decides. With
    ``stop_on_displacement`` the run ends then; otherwise it is warned about, once.
    """

    def __init__(self, cfg: DpoConfig) -> None:
        self.stops = cfg.stop_on_displacement
        self.warned = False
        # changes of the chosen videos' error in the last steps
        self.changes: deque[float] = deque(maxlen=cfg.displacement_window)

    def should_stop(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Note the metrics of a step, and return True if the run ends after it."""
        self.changes.append(metrics.get("train/chosen_change", math.nan))
        window = self.changes.maxlen
        # A sum with NaN, of a method without a reference, is not positive.
        if len(self.changes) < window or not math.fsum(self.changes) > 0:
            return False
        # One warning is enough: the metrics show how it continues.
        if not self.warned:
            say(
                f"step {step}: over {window} steps the error on chosen videos "
                "has risen above the reference policy's: the policy moves away from the "
                "rejected video instead of towards the chosen one. A larger dpo.beta, a "
                "smaller optimizer.lr or dpo.sft_weight helps"
            )
        self.warned = True
        return self.stops

    def state(self) -> dict[str, Any]:
        """Return the errors of the last steps for a checkpoint; NaN is null in JSON."""
        return {"watched": [json_number(change) for change in self.changes]}

    def restore(self, folder: Path) -> None:
        """Read what `state` wrote."""
        for change in load_state(folder)["watched"]:
            self.changes.append(math.nan if change is None else change)
