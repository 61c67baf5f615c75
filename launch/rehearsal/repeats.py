"""Calls of a module that are not run again: the same shapes cost the same.

A rollout calls the transformer hundreds of times with the same shapes. A call without gradient
whose shapes and whose module's state have been seen twice is not run a third time: its costs are
counted again, and its results are empty tensors of the same shapes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from launch.rehearsal.ledger import Costs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from launch.rehearsal.device import SimulatedGpu

# The first call of a kind may fill caches.
SEEN = 2
# The calls that repeat, by class.
_METHODS = {
    "WanTransformer3DModel": ("forward",),
    "AutoencoderKLWan": ("decode", "encode"),
    "AutoencoderTiny": ("decode",),
    "UMT5EncoderModel": ("forward",),
}


@dataclass
class SeenCall:
    """What a call costs.

    times   How often it has run.
    above   Bytes of its peak over what was alive before it.
    result  Its results, on the device.
    """

    times: int
    costs: Costs
    above: int
    result: Any


def repeat_calls(gpu: SimulatedGpu, model: nn.Module) -> None:
    """Let the calls of a large frozen module count without running, from the third on."""
    for name in _METHODS.get(type(model).__name__, ()):
        # Set on the object: a wrapper around the module calls it.
        repeated = _repeated(gpu, weakref.ref(model), getattr(type(model), name))
        object.__setattr__(model, name, repeated)


def _repeated(
    gpu: SimulatedGpu,
    model_ref: weakref.ref[nn.Module],
    method: Callable[..., Any],
) -> Callable[..., Any]:
    """Return the method of a model, which it does not keep alive."""
    seen: dict[Any, SeenCall] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        model = model_ref()
        if torch.is_grad_enabled():
            return method(model, *args, **kwargs)
        key = (_shapes((args, kwargs)), _state(model))
        known = seen.get(key)
        if known is not None and known.times >= SEEN:
            gpu.ledger.repeat(known.costs, known.above)
            with gpu.silently():
                result = tree_map_only(_Shape, _Shape.empty, known.result)
            # Empty does not mean zero.
            tree_map_only(torch.Tensor, gpu.twins.forget, result)
            return result
        before = gpu.ledger.live
        with gpu.ledger.record() as costs:
            result = method(model, *args, **kwargs)
        times = 1 if known is None else known.times + 1
        shapes = tree_map_only(torch.Tensor, _Shape.of, result)
        above = costs.peak - before
        costs.peak = 0
        seen[key] = SeenCall(times, costs, above, shapes)
        return result

    return call


@dataclass(frozen=True)
class _Shape:
    """What makes an empty tensor like another."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> _Shape:
        return _Shape(tuple(tensor.size()), tuple(tensor.stride()), tensor.dtype)

    def empty(self) -> Tensor:
        """Make an empty tensor of the device."""
        return torch.empty_strided(
            self.size, self.stride, dtype=self.dtype, device="meta"
        )


def _shapes(tree: Any) -> tuple[Any, ...]:
    leaves = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            leaves.append((_Shape.of(leaf), leaf.device.type))
        else:
            leaves.append(repr(leaf))
    return tuple(leaves)


def _state(model: nn.Module) -> tuple[Any, ...]:
    """Everything beside shapes that may change what a call does: switches, adapters, kernels."""
    state: list[Any] = [
        torch.is_autocast_enabled("cpu"),
        torch.backends.cuda.matmul.fp32_precision,
        _backend(),
    ]
    for module in model.modules():
        state.append(type(module).__name__)
        for name, value in vars(module).items():
            if isinstance(value, bool | int | str):
                state.append((name, value))
            elif isinstance(value, list) and all(isinstance(v, str) for v in value):
                state.append((name, tuple(value)))
            elif name == "processor":
                state.append(str(getattr(value, "_attention_backend", None)))
        for parameter in module._parameters.values():
            state.append(None if parameter is None else parameter.dtype)
    return tuple(state)


def _backend() -> str:
    """The attention backend that diffusers uses where a module names none."""
    from diffusers.models import attention_dispatch as dispatch

    return str(dispatch._AttentionBackendRegistry._active_backend)
