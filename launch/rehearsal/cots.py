"""Chains of thought of a planned length, of which a few tokens are written.

Without weights no token is likelier than another, and no chain of thought would end. So the
rehearsal chooses: every chain writes `WRITTEN` tokens, then ends. Written tokens cost more the
longer the cache is, and by the roofline nearly in proportion: the costs of the tokens that are
left out follow from a line through those of an early and of the last written token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from launch.rehearsal.ledger import Costs

if TYPE_CHECKING:
    from torch import Tensor

    from launch.rehearsal.device import SimulatedGpu
    from launch.rehearsal.ledger import Ledger

# The next token ends, and is the 16th: there the decode loop looks whether all rows have ended.
WRITTEN = 15
# A batch writes until its longest chain ends, which is about so much longer than the others.
LONGEST = 1.5
# The first tokens may fill caches.
EARLY = 4
# Any id that is no special token.
_WORD = 65


class SimulatedGraph:
    """Stands for `rm.cuda_graph.CapturedFunction`: Python starts the graph, and not its kernels."""

    def __init__(self, function: Callable[[], None], ledger: Ledger) -> None:
        self.function = function
        self.ledger = ledger
        self.is_warm = False

    def reset(self) -> None:
        """Capture again at the next call, which Python has to start kernel by kernel."""
        self.is_warm = False

    def __call__(self) -> None:
        before = self.ledger.now.num_kernels
        self.function()
        if self.is_warm:
            kernels = self.ledger.now.num_kernels - before
            self.ledger.now.captured += kernels
        self.is_warm = True


class ShortCots:
    """Ends every chain of thought after a few tokens, and counts those of its planned length.

    length  Tokens of a chain of thought; ``now`` those under the limit of the current batch.
    """

    def __init__(
        self, gpu: SimulatedGpu, *, length: int, written: int = WRITTEN
    ) -> None:
        self.gpu = gpu
        self.length = length
        self.now = length
        self.written = min(written, length)
        self.notes: dict[str, int] = {}
        self._end = 0
        # The costs so far when each token is chosen.
        self._snapshots: list[Costs] = []

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, `rm.generate` writes such chains."""
        from rm import generate

        with ExitStack() as stack:
            write = generate._write
            ids = generate.GeneratedCots.ids
            patch = mock.patch.object

            def short_write(model: Any, start: Any, how: Any, seeds: Any) -> Any:
                self.now = min(self.length, how.max_new_tokens)
                steps = self._steps(len(start.token_BL), how.max_new_tokens)
                return self._measure(
                    model, steps, lambda: write(model, start, how, seeds)
                )

            def long_ids(cots: Any, row: int) -> list[int]:
                return self._lengthen(ids(cots, row))

            # On a GPU a token is a graph, unless the weights are gathered for it.
            def graph_of(function: Callable[[], None]) -> SimulatedGraph:
                return SimulatedGraph(function, self.gpu.ledger)

            stack.enter_context(
                patch(generate, "can_capture", lambda model: not model.sharded)
            )
            stack.enter_context(patch(generate, "CapturedFunction", graph_of))
            stack.enter_context(patch(generate, "_write", short_write))
            stack.enter_context(patch(generate.GeneratedCots, "ids", long_ids))
            self.gpu.choose_tokens = self._choose
            yield
            self.gpu.choose_tokens = None

    def _choose(self, result: Tensor) -> Tensor:
        """Choose the next token of every row: a word, or the end of the turn."""
        costs = Costs()
        costs.add(self.gpu.ledger.now)
        self._snapshots.append(costs)
        token = _WORD if len(self._snapshots) <= self.written else self._end
        return torch.full(result.shape, token, dtype=result.dtype)

    def _steps(self, rows: int, limit: int) -> int:
        """Tokens of the longest chain of a batch."""
        longest = self.now if rows == 1 else round(self.now * LONGEST)
        return min(longest, limit)

    def _measure(self, model: Any, steps: int, write: Callable[[], Any]) -> Any:
        """Write, then add the costs of the tokens up to ``steps``."""
        self._end = model.end_id
        self._snapshots = []
        ledger = self.gpu.ledger
        with ledger.record():
            result = write()
            missing = steps - self.written
            if missing > 0 and len(self._snapshots) > self.written:
                ledger.now.add(self._missing_costs(missing))
                # Buffers of keys and values grow in blocks.
                grown = result.cache.bytes_to_reserve(missing)
                ledger.allocated(grown)
                ledger.freed(grown)
        note = (
            f"chains of thought of {self.now} tokens: {self.written} of {steps} steps "
            "are written, which end with the longest of a batch"
        )
        self.notes[note] = self.notes.get(note, 0) + 1
        return result

    def _missing_costs(self, missing: int) -> Costs:
        """Costs of the tokens after the last written one, by a line through two tokens."""
        points = self._snapshots
        early = _difference(points[EARLY], points[EARLY - 1])
        last = _difference(points[self.written], points[self.written - 1])
        distance = self.written - EARLY
        # SUM over the tokens n = 1 .. missing of last + n * slope.
        total = Costs()
        total.add(last, missing)
        steps = missing * (missing + 1) / 2 / distance
        total.add(last, steps)
        total.add(early, -steps)
        _drop_rounding(total)
        return total

    def _lengthen(self, ids: list[int]) -> list[int]:
        if len(ids) != self.written:
            return ids
        return ids + [_WORD] * (self.now - self.written)


def _difference(after: Costs, before: Costs) -> Costs:
    """What was counted between two tokens."""
    costs = Costs()
    costs.add(after)
    costs.add(before, -1)
    costs.peak = 0
    return costs


def _drop_rounding(costs: Costs) -> None:
    """Remove entries that differences of equal numbers have left."""
    for entry in fields(costs):
        counter = getattr(costs, entry.name)
        if isinstance(counter, Counter):
            for key in [key for key, value in counter.items() if value <= 1e-12]:
                del counter[key]
