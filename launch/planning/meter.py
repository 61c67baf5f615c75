"""Measure calls of full-size modules on the simulated GPU: FLOPs, roofline seconds, memory.

The modules have shapes and no numbers, so that a call costs what its kernels cost, with recomputed
blocks and without the weight gradients that a LoRA saves. The kernels and their rates are those of
``--rehearse`` (`launch.rehearsal.device`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from common import memory
from launch.rehearsal.device import SimulatedGpu
from launch.rehearsal.patches import as_on_cuda

if TYPE_CHECKING:
    from launch.planning.roofline import Rates


@dataclass(frozen=True)
class Cost:
    """What a call costs: FLOPs (a multiply-add is two), seconds, and the peak of new bytes."""

    flops: float = 0.0
    seconds: float = 0.0
    peak: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """One call after the other."""
        return Cost(
            self.flops + other.flops,
            self.seconds + other.seconds,
            max(self.peak, other.peak),
        )

    def __mul__(self, times: float) -> Cost:
        """The same call several times."""
        return Cost(self.flops * times, self.seconds * times, self.peak)


class Meter(AbstractContextManager["Meter"]):
    """A simulated GPU for the calls of a plan; modules are built and called inside.

    tf32  Products of fp32 matrices run in TF32.
    """

    def __init__(self, rates: Rates, *, tf32: bool = False) -> None:
        self.gpu = SimulatedGpu(rates)
        self.tf32 = tf32
        self._stack = ExitStack()

    def __enter__(self) -> Meter:
        enter = self._stack.enter_context
        enter(memory.device_is(self.gpu.device))
        products = torch.backends.cuda.matmul
        self._stack.callback(setattr, products, "allow_tf32", products.allow_tf32)
        products.allow_tf32 = self.tf32
        enter(as_on_cuda(self.gpu))
        enter(self.gpu)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)

    def cost(self, run: Callable[[], Any]) -> Cost:
        """Measure a call. What it leaves alive is not part of the next call's peak."""
        ledger = self.gpu.ledger
        before = ledger.live
        with ledger.record() as costs:
            run()
        return Cost(
            costs.flops,
            costs.total_seconds(self.gpu.rates.host),
            max(0.0, float(costs.peak - before)),
        )
