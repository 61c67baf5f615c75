"""Measure FLOPs and memory of a module on the meta device: tensors have shapes but no numbers.

The FLOPs are those of the code that will run, with recomputed blocks and without the weight
gradients that a LoRA saves. The peak of memory is that of the tensors alive at the same time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """FLOPs (a multiplication and an addition are two) and the peak of newly allocated bytes."""

    flops: float
    peak: float


def cost_of(run: Callable[[], Any]) -> Cost:
    """Measure ``run``, which works on meta tensors and is called twice.

    Gradients that ``run`` leaves count as alive. Attention counts as a fused kernel, which never
    holds all scores.
    """
    # The meta device would split attention into two products and L x L scores between them.
    fused = mock.patch.object(
        torch.nn.functional, "scaled_dot_product_attention", _fused_attention
    )
    # Two passes, because the counter of FLOPs keeps tensors alive.
    with fused:
        with FlopCounterMode(display=False) as counter, ToMeta():
            run()
        with LiveMemory() as memory, ToMeta():
            run()
    return Cost(float(counter.get_total_flops()), float(memory.peak))


class ToMeta(TorchDispatchMode):
    """Move CPU tensors to the meta device where they meet a meta tensor.

    A model may read sizes from small real tensors.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # An operation of real tensors alone stays real.
        kwargs = kwargs or {}
        if any(tensor.is_meta for tensor in _tensors((args, kwargs))):
            args, kwargs = tree_map_only(
                torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs)
            )
        return func(*args, **kwargs)


class LiveMemory(TorchDispatchMode):
    """Count the bytes of storages made inside and still alive: ``live`` now, ``peak`` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # A view and an operation in place return a storage that was there before.
        before = {_key(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            key = _key(tensor)
            if key in before or key in self._counted:
                continue
            # The bytes count until the last tensor on this storage is gone.
            storage = tensor.untyped_storage()
            self._counted.add(key)
            self.live += storage.nbytes()
            weakref.finalize(
                storage,
                self._free,
                key,
                storage.nbytes(),
            )
        self.peak = max(self.peak, self.live)
        return result

    def _free(
        self,
        key: int,
        size: int,
    ) -> None:
        self._counted.discard(key)
        self.live -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _key(tensor: Tensor) -> int:
    # Views of a storage share this address.
    return tensor.untyped_storage()._cdata


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    # Grouped queries: the kernel wants as many keys as queries.
    if enable_gqa and query.shape[1] != key.shape[1]:
        copies = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(copies, 1)
        value = value.repeat_interleave(copies, 1)
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query,
        key,
        value,
        0.0,
        is_causal,
        scale=scale,
    )[0]
