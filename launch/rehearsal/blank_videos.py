"""Videos that nobody has computed, almost without memory of this machine.

They are black but for their first bytes, by which they differ: equal videos would be scored once,
and get equal rewards. Pages that are never written take no memory, and so `cat` writes the first
bytes of each video only.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

# Enough to change the mean of a frame.
WRITTEN = 1 << 16


class BlankVideos:
    """Makes such videos, and remembers which tensors hold some."""

    def __init__(self) -> None:
        self._made = 0
        self._storages: set[int] = set()

    def make(self, shape: Sequence[int]) -> Tensor:
        """Make videos uint8 (B, ...), each different from every other."""
        videos = self._empty(shape)
        for video in videos:
            self._made += 1
            head = video.view(-1)[:WRITTEN]
            head[:] = 11 * self._made % 256
            # A number of three bytes, for more videos than levels.
            for place in range(3):
                head[place] = (self._made >> 8 * place) % 256
        return videos

    def cat(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Concatenate videos along the first dimension; None if any tensor is something else."""
        for tensor in tensors:
            known = tensor.untyped_storage()._cdata in self._storages
            if not known or not tensor.is_contiguous():
                return None
        count = sum(len(tensor) for tensor in tensors)
        result = self._empty((count, *tensors[0].shape[1:]))
        rows = iter(result)
        for tensor in tensors:
            for video in tensor:
                next(rows).view(-1)[:WRITTEN] = video.view(-1)[:WRITTEN]
        return result

    def _empty(self, shape: Sequence[int]) -> Tensor:
        # numpy asks the system for zeros; torch would write them.
        tensor = torch.from_numpy(np.zeros(tuple(shape), dtype=np.uint8))
        storage = tensor.untyped_storage()
        self._storages.add(storage._cdata)
        weakref.finalize(storage, self._storages.discard, storage._cdata)
        return tensor
