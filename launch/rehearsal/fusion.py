"""Compiled regions: a compiler puts neighbouring pointwise kernels into one.

Inside a region all kernels between two products, attentions or convolutions are one kernel, which
reads what others have computed, once, and writes what is still needed when it ends. It is what an
ideal compiler reaches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from launch.rehearsal.kernels import DeviceKernel

if TYPE_CHECKING:
    from torch import Tensor

NAME = "compiled pointwise"


class Fusion:
    """Collects fusable kernels inside `region`.

    charge          is called with the kernel that replaces them.
    with_backward   also the backward pass is compiled, once a region has run with gradients.
    """

    def __init__(self, charge: Callable[[DeviceKernel], None]) -> None:
        self.charge = charge
        self.with_backward = False
        self._depth = 0
        self._read: dict[int, int] = {}
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @contextmanager
    def region(self) -> Iterator[None]:
        """Inside, kernels are fused."""
        self._depth += 1
        if torch.is_grad_enabled():
            self.with_backward = True
        try:
            yield
        finally:
            self._depth -= 1
            self.flush()

    def takes(self, kernel: DeviceKernel) -> bool:
        """True if a kernel becomes a part of the current one."""
        if not kernel.fusable:
            return False
        in_backward = self.with_backward and torch._C._current_graph_task_id() != -1
        return self._depth > 0 or in_backward

    def add(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Add an operation to the current kernel."""
        for tensor in inputs:
            key = tensor.untyped_storage()._cdata
            if key not in self._made:
                size = tensor.numel() * tensor.element_size()
                whole = tensor.untyped_storage().nbytes()
                self._read[key] = max(self._read.get(key, 0), min(size, whole))
        for tensor in outputs:
            storage = tensor.untyped_storage()
            self._made[storage._cdata] = weakref.ref(storage)

    def flush(self) -> None:
        """End the current kernel and charge it."""
        if not self._made:
            return
        moved = sum(self._read.values())
        for reference in self._made.values():
            storage = reference()
            if storage is not None:
                moved += storage.nbytes()
        self._read = {}
        self._made = {}
        self.charge(DeviceKernel(NAME, None, 0.0, float(moved), fusable=True))
