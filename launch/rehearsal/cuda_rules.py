"""What CUDA refuses: tensors of two devices or of two dtypes in one kernel, a generator of the CPU.

The CPU and the meta device allow most of it, so that no test without a GPU can see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

aten = torch.ops.aten
# They may be given indices on the CPU.
INDEXED = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# Kernels whose tensors must all have one dtype, and how many of their arguments are meant.
_ONE_DTYPE = {
    "mm": 2,
    "bmm": 2,
    "addmm": 3,
    "baddbmm": 3,
    "convolution": 3,
    "searchsorted": 2,
    "dot": 2,
    "mv": 2,
}


class SimulatedCudaError(RuntimeError):
    """What CUDA would refuse; the message names the operation, the tensors and the line."""


def device_problem(func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> str:
    """Say which tensors of an operation are on another device than the others, or "".

    A CPU tensor of a single number may meet tensors of a GPU, and so may indices.
    """
    on_cpu = [t for t in tensors if not t.is_meta and t.dim() > 0]
    if func in INDEXED and isinstance(args[0], torch.Tensor) and args[0].is_meta:
        indices = {id(index) for index in args[1]}
        on_cpu = [t for t in on_cpu if id(t) not in indices]
    on_gpu = [t for t in tensors if t.is_meta]
    if not on_cpu or not on_gpu:
        # An index of the GPU for a tensor of the CPU is refused, too.
        return ""
    return (
        "expected all tensors on one device, found cuda:0 "
        f"{_shapes(on_gpu)} and cpu {_shapes(on_cpu)}"
    )


def dtype_problem(name: str, args: Sequence[Any]) -> str:
    """Say which dtypes a kernel cannot mix, or ""."""
    if name in ("native_layer_norm", "native_group_norm"):
        operands = [args[0], *(args[2:4] if name == "native_layer_norm" else args[1:3])]
    elif name in _ONE_DTYPE:
        operands = list(args[: _ONE_DTYPE[name]])
    elif name.startswith("_scaled_dot_product"):
        operands = list(args[:3])
    else:
        return ""
    dtypes = [t.dtype for t in operands if isinstance(t, torch.Tensor)]
    if len(set(dtypes)) < 2:
        return ""
    shown = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"expected one dtype, found {shown}"


def generator_problem(generator: Any) -> str:
    """Say that a random generator of the CPU cannot draw on a GPU, or ""."""
    if generator is None or generator.device.type != "cpu":
        return ""
    return "expected a 'cuda' generator, found 'cpu'"


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors[:3])
