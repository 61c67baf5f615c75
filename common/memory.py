"""How much of a batch goes through a model at once: as much as is asked for, or as fits; and what was held at most."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from common import faults
from common.distributed import max_over_ranks
from common.log import say

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R")


def peak_memory() -> dict[str, float]:
    """The most that any rank has held so far, in GiB: tensors on its GPU, or the whole process where there is none. All
    ranks call it.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"memory/peak_gb": max_over_ranks(peak)}


class AdaptiveBatcher:
    """Cuts a batch for a function that treats its items one by one, and cuts smaller when memory runs out.

    size   items at once, None for all of them. Halved for good whenever `torch.OutOfMemoryError` is raised, so that a
           run finds what fits in its first step; what is computed stays the same
    what   is cut, for the message
    fixed  never smaller: where all ranks must make equally many calls
    """

    def __init__(self, size: int | None, *, what: str) -> None:
        if size is not None and size < 1:
            raise ValueError(f"a portion of {what} holds at least 1, got {size}")
        self.size, self.what, self.fixed = size, what, False

    def over(self, function: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
        """``function`` of all items, one portion after the other, put together along the first dimension. Errors as
        `each`.
        """
        return torch.cat(self.each(lambda part: function(items[part]), len(items)))

    def each(self, function: Callable[[slice], R], count: int) -> list[R]:
        """What ``function`` makes of one portion of ``count`` items after the other.

        Raises torch.OutOfMemoryError when not even one item fits, or when ``fixed``.
        """
        done: list[R] = []
        start = 0
        while start < count:
            size = min(self.size or count, count - start)
            if self._attempt(function, slice(start, start + size), done):
                start += size
            else:
                self._halve(size)
        return done

    def _attempt(
        self, function: Callable[[slice], R], part: slice, done: list[R]
    ) -> bool:
        """False when memory ran out. The error is let go of here: its traceback holds what filled the memory."""
        size = part.stop - part.start
        try:
            faults.memory(size)
            done.append(function(part))
        except torch.OutOfMemoryError:
            if self.fixed or size == 1:
                raise
            return False
        return True

    def _halve(self, size: int) -> None:
        self.size = size // 2
        say(f"memory ran out with {size} {self.what} at once; from now on {self.size}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
