"""Watch a DPO run for likelihood displacement: the policy moves away from both videos."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.checkpoint import load_state
from common.log import say
from common.types import json_number

if TYPE_CHECKING:
    from alignment.dpo import DpoLoop


class DisplacementWatch:
    """Warns if the error on chosen videos rises above the reference policy's.

    This is likelihood displacement: the policy moves away from the rejected video instead of
    towards the chosen one. `DpoLoop.rising` decides, over the last steps.

    stops  True if the run ends then, False if it is only warned about, once
    """

    def __init__(self, loop: DpoLoop, *, stops: bool) -> None:
        self.loop = loop
        self.stops = stops
        self.warned = False

    def should_stop(self, step: int) -> bool:
        """Return True if the run ends after this step."""
        if not self.loop.rising():
            return False
        # One warning is enough: the metrics show how it continues.
        if not self.warned:
            say(
                f"step {step}: over {self.loop.watched.maxlen} steps the error on chosen videos "
                "has risen above the reference policy's: the policy moves away from the "
                "rejected video instead of towards the chosen one. A larger dpo.beta, a "
                "smaller optimizer.lr or dpo.sft_weight helps"
            )
        self.warned = True
        return self.stops

    def state(self) -> dict[str, Any]:
        """Return the errors of the last steps for a checkpoint; NaN is null in JSON."""
        return {"watched": [json_number(value) for value in self.loop.watched]}

    def restore(self, folder: Path) -> None:
        """Read what `state` wrote."""
        # In place: the loop's deque has the window's length.
        self.loop.watched.clear()
        for value in load_state(folder)["watched"]:
            self.loop.watched.append(math.nan if value is None else value)
