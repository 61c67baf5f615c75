"""Where a test may kill a run. ``FAULT=backward:3`` ends the process by SIGKILL when it comes to ``point("backward")``
for the third time, ``FAULT=backward:3@1`` on rank 1 only. Nothing happens unless the variable is set.

Points: prefix, tail and reward of GRPO's rollouts, chains and reward of dual RL's, forward, backward, update (a
gradient is there), step (a step is done), logged (and written down).
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_WANTED = os.environ.get("FAULT", "")
_seen: Counter[str] = Counter()


def point(name: str) -> None:
    """Kill this process here, if it was asked for."""
    if not _WANTED:
        return
    _seen[name] += 1
    place, _, rank = _WANTED.partition("@")
    if place == f"{name}:{_seen[name]}" and rank in ("", os.environ.get("RANK", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
