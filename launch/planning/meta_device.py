"""What a module costs, found out by running it on the meta device: shapes without numbers, nothing is computed.

So FLOPs are those of the code that will run, recomputed blocks and a LoRA's missing weight gradients included, and the
peak of memory is that of the tensors which are alive at one time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """FLOPs (a multiplication and an addition are two) and the peak of bytes over what was there before."""

    flops: float
    peak: float


def cost_of(run: Callable[[], Any]) -> Cost:
    """Of ``run``, which works on meta tensors and is called twice: the counter of FLOPs keeps tensors alive.

    Gradients that ``run`` leaves count as alive. Attention counts as a fused kernel, which never holds all its scores.
    """
    with _fused_attention():
        with FlopCounterMode(display=False) as counter, ToMeta():
            run()
        with LiveMemory() as memory, ToMeta():
            run()
    return Cost(float(counter.get_total_flops()), float(memory.peak))


class ToMeta(TorchDispatchMode):
    """Tensors of the CPU that meet one of the meta device go there: a model may read sizes off small real ones."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if any(
            isinstance(x, torch.Tensor) and x.is_meta
            for x in tree_leaves((args, kwargs))
        ):
            args, kwargs = tree_map_only(
                torch.Tensor, lambda x: x.to("meta"), (args, kwargs)
            )
        return func(*args, **kwargs)


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages made inside and still alive: ``live`` now, ``peak`` at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {
            _key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := _key(tensor)) not in given | self._known
            ):
                storage = tensor.untyped_storage()
                self._known.add(key)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return made

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _fused_attention() -> Iterator[None]:
    """The meta device would take attention apart into two products and L x L scores between them."""
    with mock.patch.object(
        torch.nn.functional, "scaled_dot_product_attention", _attention
    ):
        yield


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002 - torch's own signature
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: FBT001, FBT002
) -> Tensor:
    if enable_gqa and query.shape[1] != key.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, is_causal, scale=scale
    )[0]
