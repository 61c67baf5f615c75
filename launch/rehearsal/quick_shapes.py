"""Shapes of the most frequent operations, without PyTorch's own way to them.

On the meta device PyTorch computes many shapes in Python, by its reference implementations, which
takes more time than everything else in a rehearsal. Only plain cases are answered here:
contiguous floating-point tensors of one dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

aten = torch.ops.aten
# f(x, y) of the dtype of x and y.
_BINARY = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
# f(x) of the dtype and shape of x; further arguments are numbers.
_UNARY = {
    aten.silu.default,
    aten.gelu.default,
    aten.neg.default,
    aten.rsqrt.default,
    aten.sigmoid.default,
    aten.exp.default,
    aten.pow.Tensor_Scalar,
    aten.mul.Scalar,
    aten.add.Scalar,
    aten.div.Scalar,
}


def quick_result(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Tensor | None:
    """Return an empty result of an operation on the meta device; None where PyTorch must tell."""
    if func in _BINARY:
        return _binary(args[0], args[1])
    if func in _UNARY and _is_plain(args[0]):
        return _empty(args[0].shape, args[0])
    if func is aten.mm.default:
        return _product(args[0], args[1])
    if func is aten.addmm.default and not kwargs:
        return _product(args[1], args[2])
    return None


def _is_plain(tensor: Any) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.is_meta
        and tensor.is_floating_point()
        and tensor.is_contiguous()
    )


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


def _binary(first: Any, second: Any) -> Tensor | None:
    """The result of two tensors of one dtype, or of a tensor and a number."""
    if not _is_plain(first):
        return None
    if isinstance(second, int | float):
        return _empty(first.shape, first)
    if not _is_plain(second) or first.dtype != second.dtype:
        return None
    # A tensor of a single number has a weaker dtype, which does not matter here.
    if first.shape == second.shape:
        return _empty(first.shape, first)
    return _empty(torch.broadcast_shapes(first.shape, second.shape), first)


def _product(first: Tensor, second: Tensor) -> Tensor | None:
    if first.shape[1] != second.shape[0]:
        return None
    return _empty((first.shape[0], second.shape[1]), first)
