"""Where a test may make a run fail. Nothing happens unless FAULT is set.

    FAULT=backward:3     SIGKILL when the process comes to ``point("backward")`` for the third time
    FAULT=backward:3@1   on rank 1 only
    FAULT=memory:2       memory runs out whenever more than two items go through a model at once

Points: prefix, tail and reward of GRPO's rollouts, chains and reward of dual RL's, forward, backward, update (a
gradient is there), step (a step is done), logged (and written down).
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_WANTED = os.environ.get("FAULT", "")
_seen: Counter[str] = Counter()


def memory(items: int) -> None:
    """Raise torch.OutOfMemoryError, if it was asked for and these are too many."""
    limit = _WANTED.removeprefix("memory:")
    if limit == _WANTED or items <= int(limit):
        return
    import torch

    raise torch.OutOfMemoryError(
        f"out of memory, as FAULT={_WANTED} asks: {items} items at once"
    )


def point(name: str) -> None:
    """Kill this process here, if it was asked for."""
    if not _WANTED:
        return
    _seen[name] += 1
    place, _, rank = _WANTED.partition("@")
    if place == f"{name}:{_seen[name]}" and rank in ("", os.environ.get("RANK", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
