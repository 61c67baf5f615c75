"""What an operation costs a GPU: the kind of its kernel, its FLOPs and the bytes that it moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Matrix products, and at which argument their two matrices stand.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_int_mm": 0}
# They allocate, and start no kernel.
_SILENT = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach",
    "empty_permuted", "resize_", "set_", "record_stream",
}  # fmt: skip
# They read as many numbers of a table as they return.
_LOOKUPS = {"embedding", "index", "index_select", "gather", "_unsafe_index"}
# They write as many numbers of a table as they are given.
_SCATTERS = {"index_put_", "_index_put_impl_", "scatter_", "index_copy_", "index_add_"}
# A backward pass of attention recomputes the scores: 5 products instead of 2.
_BACKWARD = 2.5


@dataclass(frozen=True)
class DeviceKernel:
    """A kernel for `launch.planning.roofline.kernel_seconds`.

    name     Under which its seconds are added up.
    fusable  True if a compiler can put it into the same kernel as its neighbours.
    """

    name: str
    kind: str | None
    flops: float
    bytes_moved: float
    fusable: bool = False


def kernel_of(
    func: Any,
    args: Sequence[Any],
    inputs: Sequence[Tensor],
    written: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    attention: str = "flash",
) -> DeviceKernel | None:
    """Describe an operation; None for a view and for what starts no kernel.

    attention  says which implementation computes a fused attention.
    """
    name = func.overloadpacket.__name__
    if name in _SILENT:
        return None
    sources = {tensor.untyped_storage()._cdata for tensor in inputs}
    fresh = [t for t in outputs if t.untyped_storage()._cdata not in sources]
    if not fresh and not written:
        return None

    # What is read and what is written.
    moved = sum(map(_bytes, fresh)) + sum(map(_bytes, written))
    if name in _LOOKUPS:
        moved += sum(map(_bytes, outputs)) + sum(map(_bytes, inputs[1:]))
    elif name in _SCATTERS:
        moved = 2 * sum(map(_bytes, inputs[1:]))
    else:
        moved += sum(map(_bytes, inputs))

    # What is computed.
    if name in _PRODUCTS:
        first = _PRODUCTS[name]
        a, b = args[first], args[first + 1]
        kind = f"gemm_{_precision(a.dtype, _tf32(torch.backends.cuda.matmul))}"
        return DeviceKernel(kind, kind, 2.0 * a.numel() * b.shape[-1], moved)
    if name.startswith("_scaled_dot_product"):
        return _attention(name, args, moved, attention)
    if name.startswith("convolution"):
        return _convolution(name, args, outputs, moved)
    return DeviceKernel(name, None, 0.0, moved, fusable=True)


def _bytes(tensor: Tensor) -> int:
    """Bytes that a kernel reads of a tensor; an expanded one is read once."""
    size = tensor.numel() * tensor.element_size()
    return min(size, tensor.untyped_storage().nbytes())


def _precision(dtype: torch.dtype, tf32: bool) -> str:  # noqa: FBT001
    """The part of a rate's name that stands for a dtype."""
    if dtype.itemsize <= 2:
        return "bf16"
    return "tf32" if tf32 and dtype == torch.float32 else "fp32"


def _tf32(backend: Any) -> bool:
    """Whether fp32 products or convolutions may be rounded to TF32."""
    setting = backend.fp32_precision
    if setting == "none":
        setting = torch.backends.fp32_precision
    return setting == "tf32"


def _attention(
    name: str,
    args: Sequence[Any],
    moved: float,
    implementation: str,
) -> DeviceKernel:
    """Attention of (B, H, L, D): 4 B H L_q L_k D FLOPs, a half of them with a causal mask."""
    backward = "backward" in name
    first = 1 if backward else 0
    query = args[first]
    key = args[first + 1]
    flops = 4.0 * query.numel() * key.shape[2]
    # The places of is_causal in aten's flash attention.
    causal = 11 if backward else 4
    if len(args) > causal and args[causal] is True:
        flops /= 2
    if not backward:
        kind = f"attention_{implementation}"
        return DeviceKernel(kind, kind, flops, moved)
    fast = implementation in ("cudnn", "fa3", "sage")
    known = "fast" if fast else implementation
    kind = f"attention_{known}_backward"
    return DeviceKernel(kind, kind, _BACKWARD * flops, moved)


def _convolution(
    name: str,
    args: Sequence[Any],
    outputs: Sequence[Tensor],
    moved: float,
) -> DeviceKernel:
    """A convolution: 2 FLOPs for every output and every weight of its channel."""
    if name == "convolution_backward":
        result, _, weight = args[:3]
        # Gradients of the input and of the weights.
        passes = sum(bool(wanted) for wanted in args[-1][:2])
    else:
        _, weight = args[:2]
        result = outputs[0]
        passes = 1
    kind = f"conv_{_precision(weight.dtype, _tf32(torch.backends.cudnn.conv))}"
    flops = 2.0 * passes * result.numel() * weight[0].numel()
    return DeviceKernel(kind, kind, flops, moved)
