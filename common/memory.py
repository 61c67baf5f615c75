"""AdaptiveBatcher runs a function in chunks; peak_memory reports the memory used at most."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from common import faults
from common.distributed import max_over_ranks
from common.log import say

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R")
# The device of a rehearsal.
_simulated: torch.device | None = None


def peak_memory() -> dict[str, float]:
    """Peak memory in GiB, the maximum over ranks, all of which must call it.

    It is that of tensors on the GPU, or of the process where there is no GPU.
    """
    if torch.cuda.is_available():
        # Kernels that still run may allocate.
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        # Linux counts in KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"memory/peak_gb": max_over_ranks(peak)}


def default_device() -> torch.device:
    """Return this rank's device: the current CUDA device, or the CPU where there is none."""
    if _simulated is not None:
        return _simulated
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def device_is(device: torch.device) -> Iterator[None]:
    """Inside, `default_device` returns this device; for a device that is simulated."""
    global _simulated
    before = _simulated
    _simulated = device
    try:
        yield
    finally:
        _simulated = before


class AdaptiveBatcher:
    """Runs a function in chunks and halves the chunk after an out-of-memory error.

    size   items in a chunk, None for all. The halved size stays, so a run finds what fits in its
           first step; the results do not change
    what   name of the items, for the message
    fixed  True forbids halving, where all ranks must make the same number of calls
    """

    def __init__(self, size: int | None, *, what: str) -> None:
        self.size = size
        self.what = what
        self.fixed = False

    def over(self, function: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
        """Apply ``function`` to chunks of ``items`` and concatenate along the first dimension.

        Raises torch.OutOfMemoryError as `each` does.
        """
        return torch.cat(self.each(lambda part: function(items[part]), len(items)))

    def each(self, function: Callable[[slice], R], count: int) -> list[R]:
        """Call ``function`` with slices that cover ``count`` items, and return its results.

        Raises torch.OutOfMemoryError when not even a single item fits, or when ``fixed``.
        """
        # The chunk may shrink on the way.
        results: list[R] = []
        start = 0
        while start < count:
            size = min(self.size or count, count - start)
            if self._attempt(function, slice(start, start + size), results):
                start += size
            else:
                self._halve(size)
        return results

    def _attempt(
        self,
        function: Callable[[slice], R],
        part: slice,
        results: list[R],
    ) -> bool:
        """Append the result, or return False when memory ran out."""
        size = part.stop - part.start
        try:
            faults.memory(size)
            results.append(function(part))
        except torch.OutOfMemoryError:
            if self.fixed or size == 1:
                raise
            # the error ends with this function: its traceback holds what filled the memory
            return False
        return True

    def _halve(self, size: int) -> None:
        # Smaller chunks from here on, in the memory that is free again.
        self.size = size // 2
        say(f"memory ran out with {size} {self.what} at once; from now on {self.size}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
