"""Rank 0 of N ranks that are not there, and DeepSpeed's engine on the simulated device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

# An address that nobody connects to.
_VARIABLES = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29999",
    "DS_ACCELERATOR": "cpu",
}


@contextmanager
def rank_0_of(ranks: int) -> Iterator[None]:
    """Join a process group of ``ranks`` whose other members answer as this one does.

    PyTorch's fake process group returns at once: every rank has rank 0's values. The collectives
    themselves are not tried.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    environment = {**_VARIABLES, "WORLD_SIZE": str(ranks)}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        stack.callback(_leave)
        stack.enter_context(mock.patch.object(dist, "all_gather_object", _copies))
        _use_accelerator(stack)
        yield


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _copies(values: list[Any], value: Any, group: Any = None) -> None:
    """Gather the value of rank 0 from every rank."""
    values[:] = [value] * len(values)


def _use_accelerator(stack: ExitStack) -> None:
    """Let DeepSpeed take the meta device for its accelerator."""
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from common.distributed import skip_cpu_op_build

    class MetaAccelerator(CPU_Accelerator):
        """DeepSpeed's CPU accelerator under the name of the device that plays the GPU."""

        def __init__(self) -> None:
            super().__init__()
            self._name = "meta"
            self._communication_backend_name = "fake"

        def device_name(self, device_index: int | None = None) -> str:
            return "meta"

        def current_device_name(self) -> str:
            return "meta"

        def current_device(self) -> str:
            return "meta"

        def on_accelerator(self, tensor: Any) -> bool:
            return tensor.is_meta

        def device_count(self) -> int:
            return 8

        def memory_allocated(self, device_index: int | None = None) -> int:
            return 0

        def max_memory_allocated(self, device_index: int | None = None) -> int:
            return 0

    skip_cpu_op_build()
    before = real_accelerator.ds_accelerator
    real_accelerator.set_accelerator(MetaAccelerator())
    stack.callback(setattr, real_accelerator, "ds_accelerator", before)
