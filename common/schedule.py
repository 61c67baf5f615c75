"""IndexSchedule: which items a step draws, as a function of seed and step.

Resuming a run therefore needs no state.
"""

from __future__ import annotations

import math
import random

from common.distributed import derive_seed


def describe_draws(
    count: int, *, per_step: int, steps: int, epochs: float | None = None
) -> str:
    """Tell how often ``steps`` steps draw each of ``count`` items; "" where nothing is uneven.

    A step always draws ``per_step`` items: where an epoch ends inside it, the rest comes from
    the next epoch. ``epochs`` is the number that the user wanted, None for a number of steps.
    """
    remarks = []
    # A step that is larger than the data repeats items within one gradient.
    if per_step > count:
        remarks.append(
            f"a step draws {per_step} of {count} pairs, so it holds some of them "
            f"{math.ceil(per_step / count)} times"
        )
    drawn = per_step * steps
    if epochs is not None and not math.isclose(drawn, epochs * count):
        remarks.append(
            f"{epochs:g} epochs of {count} pairs are {epochs * count:g} draws, which is no "
            f"multiple of pairs_per_step={per_step}: {steps} steps make {drawn} draws, "
            f"{drawn / count:.4g} epochs"
        )
    return "; ".join(remarks)


class IndexSchedule:
    """Maps a step to indices of ``count`` items, each epoch in a new random order.

    Position q of the run draws item q mod count of epoch q // count. An epoch's order depends on
    the seed and the epoch only, not on the number of ranks or on where a run was resumed.
    Schedules with another ``name`` have another order.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int,
        per_step: int,
        name: str,
    ) -> None:
        self.count = count
        self.seed = seed
        self.per_step = per_step
        self.name = name
        # the order of the latest epoch, computed once
        self._epoch = -1
        self._order: list[int] = []

    def at(self, step: int) -> tuple[int, ...]:
        """Indices for all ranks at a step, which counts from 0."""
        # Positions of this step.
        first = step * self.per_step
        positions = range(first, first + self.per_step)
        return tuple(self._item(position) for position in positions)

    def _item(self, position: int) -> int:
        # A step may reach into the next epoch.
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            seed = derive_seed(self.seed, self.name, epoch)
            order = list(range(self.count))
            random.Random(seed).shuffle(order)
            self._epoch = epoch
            self._order = order
        return self._order[place]
