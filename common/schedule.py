"""Which of many things a step draws: a function of seed and step, so resuming needs no state."""

from __future__ import annotations

import random

from common.distributed import derive_seed


class IndexSchedule:
    """Step -> indices of ``count`` things: all of them in a new random order each epoch, none twice before all were.

    The one at position q of the whole run is the (q mod count)-th of epoch q // count, whose order depends on the seed
    and the epoch only. Neither the number of ranks nor where a run was resumed changes anything.

    name  of what is drawn; schedules of other names have other orders
    """

    def __init__(self, count: int, *, seed: int, per_step: int, name: str) -> None:
        self.count, self.seed, self.per_step, self.name = count, seed, per_step, name
        self._epoch, self._order = -1, list[int]()

    def at(self, step: int) -> tuple[int, ...]:
        """All ranks' indices of one step, from 0."""
        first = step * self.per_step
        return tuple(self._at_position(first + i) for i in range(self.per_step))

    def _at_position(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(self.count))
            random.Random(derive_seed(self.seed, self.name, epoch)).shuffle(self._order)
        return self._order[place]
