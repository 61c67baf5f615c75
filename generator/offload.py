"""A frozen model that waits in the host's memory until it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class Waiting:
    """Weights of a frozen module, in the host's memory, with a copy on the device when needed.

    The weights never change, so that nothing is copied back. In page-locked memory a copy runs at
    the speed of the bus: 28.6 GB of a Wan 14B in bf16 take about a second.

    moves  how often the weights were copied to the device
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        self.moves = 0
        self._users = 0
        self._there = False
        # Buffers are small, but forwards need them beside the weights.
        self._tensors = [*module.parameters(), *module.buffers()]
        self._host: list[Tensor] = []
        for tensor in self._tensors:
            held = tensor.data.to("cpu")
            if device.type == "cuda":
                held = held.pin_memory()
            tensor.data = held
            self._host.append(held)

    def fetch(self) -> None:
        """Copy the weights to the device, unless they are there."""
        if self._there:
            return
        # Without waiting: the forward runs on the same stream.
        for tensor, held in zip(self._tensors, self._host, strict=True):
            tensor.data = held.to(self.device, non_blocking=True)
        self._there = True
        self.moves += 1

    def release(self) -> None:
        """Free the copy on the device, unless a block of `kept` is open."""
        if self._users or not self._there:
            return
        # Nothing else refers to the copy.
        for tensor, held in zip(self._tensors, self._host, strict=True):
            tensor.data = held
        self._there = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, weights that were fetched stay on the device; may be nested."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self.release()
