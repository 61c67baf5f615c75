"""Who writes the chains of thought of stage 2: one interface, and the engine that is always there.

An engine only chooses tokens. Stage 2 takes every probability from the model it trains (`rm.packed.packed_forward`), those "when
sampled" too: another engine's kernels, rounding and batching give slightly other numbers, and a ratio of the two would
measure the engines apart instead of the policies. The official release recomputes them likewise.

Where a reward is wanted (`rm.scorer`, `DualRl.evaluate`), `rm.generate` is called itself: it reads the reward off the
KV cache that the chain was written with, and no other engine hands that over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rm.config import Generation
from rm.generate import generate
from rm.model import DeScore
from rm.packed import PackedCot
from rm.prompt import Encoded
from rm.video import PreparedVideo


class CotBackend(Protocol):
    """Each rank has its own.

    version  of weights: any number that changes when they do. Writing with others than asked for is an error
    """

    def sync(self, version: int) -> None:
        """From now on write with the weights the model has at this moment; they are called ``version``."""
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
        """[sequence][copy]. ``seeds`` go with a temperature above 0, in the order (sequence, copy)."""
        ...

    def rest(self) -> None:
        """Nothing is written until the next `sync`: give memory back to training."""
        ...

    def close(self) -> None: ...


class HfBackend:
    """The trained model itself, with `rm.generate`: nothing to sync, and its weights are never stale.

    batch  sequences in one forward, times the copies of each
    """

    def __init__(self, model: DeScore, *, batch: int) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        self.model, self.batch = model, batch

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
        found: list[list[PackedCot]] = []
        for first in range(0, len(encoded), self.batch):
            last = min(first + self.batch, len(encoded))
            batch = self.model.batch(
                encoded[first:last], videos[first:last], query=False
            )
            own = seeds[first * copies : last * copies] if seeds is not None else None
            written = generate(self.model, batch, how, seeds=own, copies=copies)
            flat = [
                PackedCot(tuple(written.ids(i)), bool(written.finished_B[i]))
                for i in range((last - first) * copies)
            ]
            found += [flat[i : i + copies] for i in range(0, len(flat), copies)]
        return found

    def rest(self) -> None: ...

    def close(self) -> None: ...
