"""Backends that write the chains of thought (CoTs) of stage 2; `BuiltinBackend` is the default.

A backend only chooses tokens. Stage 2 takes every log-probability, the old policy's too, from
the model it trains (`rm.packed.packed_forward`). The kernels, rounding and batching of another
engine give slightly different numbers, and a ratio of the two would measure the difference
between engines instead of between policies. DeScore's official release recomputes them too.

Rewards are always computed by our model: `rm.scorer` reads a CoT that another engine wrote with a
forward over prompt, video and CoT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from common.memory import AdaptiveBatcher
from rm.config import Generation
from rm.generate import generate
from rm.model import DeScore
from rm.packed import PackedCot
from rm.prompt import Encoded
from rm.video import PreparedVideo


class CotBackend(Protocol):
    """Writes CoTs; every rank has a backend of its own.

    A ``version`` of the weights is any number that changes when they do. Writing with
    another version than the synchronised one is an error.
    """

    def sync(self, version: int) -> None:
        """Take over the weights that the model has now, and call them ``version``."""
        ...

    def write(
        self,
        encoded: Sequence[Encoded],
        videos: Sequence[PreparedVideo],
        how: Generation,
        *,
        version: int,
        seeds: Sequence[int] | None = None,
        copies: int = 1,
    ) -> list[list[PackedCot]]:
        """Write ``copies`` CoTs for every prompt and video, [sequence][copy].

        A temperature above 0 needs ``seeds``, in the order (sequence, copy).
        """
        ...

    def rest(self) -> None:
        """Free memory for training; nothing is written until the next `sync`."""
        ...


class BuiltinBackend:
    """Writes with the trained model itself, so its weights are never stale.

    ``batch`` is the number of sequences in a forward; each counts ``copies`` times. It is halved
    for good when memory runs out, but with a sharded model, whose ranks must call it equally
    often.
    """

    def __init__(self, model: DeScore, *, batch: int) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        self.model = model
        self.portions = AdaptiveBatcher(batch, what="videos of stage 2 in generation")

    def sync(self, version: int) -> None: ...

    def write(
        self,
        encoded: Sequence[Encoded],
        videos: Sequence[PreparedVideo],
        how: Generation,
        *,
        version: int,
        seeds: Sequence[int] | None = None,
        copies: int = 1,
    ) -> list[list[PackedCot]]:
        """Write CoTs with `rm.generate.generate`, ``batch`` sequences at a time."""

        def write_part(part: slice) -> list[list[PackedCot]]:
            # 1. Generate for the next sequences.
            batch = self.model.batch(encoded[part], videos[part], query=False)
            part_seeds = None
            if seeds is not None:
                part_seeds = seeds[part.start * copies : part.stop * copies]
            written = generate(self.model, batch, how, seeds=part_seeds, copies=copies)

            # 2. Rows of the result are in the order (sequence, copy).
            groups = []
            for row in range(0, len(batch.ids_BL) * copies, copies):
                groups.append([written.cot(row + copy) for copy in range(copies)])
            return groups

        self.portions.fixed = self.model.sharded
        groups = []
        for part_groups in self.portions.each(write_part, len(encoded)):
            groups += part_groups
        return groups

    def rest(self) -> None: ...
