"""An optimizer step over several ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from common import faults
from common.distributed import rank, sum_over_ranks, world_size

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import Engine

T = TypeVar("T")


def backwards_on_rank(key: str, pairs: int, micro_batch: int) -> int:
    """Return the backwards of a step on each rank, which is the engine's gradient accumulation.

    Raises ValueError, naming ``key``, if ranks x micro-batches do not divide the pairs of a step.
    """
    ranks = world_size()
    if pairs % (ranks * micro_batch):
        raise ValueError(
            f"{key}={pairs} must be a multiple of ranks x micro_batch = "
            f"{ranks} x {micro_batch}"
        )
    return pairs // (ranks * micro_batch)


def rank_micro_batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut this rank's share of a step into micro-batches."""
    share = len(items) // world_size()
    first = rank() * share
    return [items[i : i + size] for i in range(first, first + share, size)]


def backward_and_step(engine: Engine, loss: Tensor) -> None:
    """Add a loss to the step's; the engine takes the optimizer step on the last one.

    The engine averages over the backwards of all ranks in a step.
    """
    faults.point("backward")
    engine.backward(loss)
    faults.point("update")
    engine.step()


def all_ranks(sums: Mapping[str, float]) -> dict[str, float]:
    """SUM of every value over ranks."""
    return {name: sum_over_ranks(value) for name, value in sums.items()}
