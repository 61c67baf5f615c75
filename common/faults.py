"""Fault injection for tests, by the environment variable FAULT.

    FAULT=backward:3     SIGKILL when the process reaches ``point("backward")`` the third time
    FAULT=backward:3@1   the same on rank 1 only
    FAULT=memory:2       memory runs out whenever more than two items go through a model together

Points are prefix, tail and reward in the rollouts of GRPO, chains and reward in those of dual RL,
forward, backward, update (the gradient is complete), step (a step is done), and logged (the step
is in metrics.jsonl).
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_FAULT = os.environ.get("FAULT", "")
_visits: Counter[str] = Counter()


def memory(items: int) -> None:
    """Raise torch.OutOfMemoryError if FAULT limits memory to fewer items."""
    kind, _, limit = _FAULT.partition(":")
    if kind != "memory" or items <= int(limit):
        return
    # not needed without a fault
    import torch

    raise torch.OutOfMemoryError(f"out of memory by FAULT={_FAULT}: {items} items")


def point(name: str) -> None:
    """Kill this process here if FAULT names this point and visit."""
    # Almost every run: no visits are counted.
    if not _FAULT:
        return
    _visits[name] += 1
    # counted on every rank, killed on the named rank
    place, _, rank = _FAULT.partition("@")
    if place == f"{name}:{_visits[name]}" and rank in ("", os.environ.get("RANK", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
