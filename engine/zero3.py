"""ZeRO stage 3: every weight is split over the ranks and gathered only while a module needs it.

DeepSpeed's hooks gather a module's parameters before its forward and again before its
backward. Gathering takes part on all ranks, so all ranks must call the modules in the same
order and equally often (`DeScore.sharded`, `WanGenerator.sharded`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from common.distributed import is_main

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor, nn


def is_split(parameter: Tensor) -> bool:
    """Return True under ZeRO 3, where a parameter is split, and empty between its uses."""
    return hasattr(parameter, "ds_id")


def sum_gradients(engine: DeepSpeedEngine) -> None:
    """Make ``engine.backward`` add to the gradients of the step's earlier backwards.

    DeepSpeed starts a micro-batch in ``engine.forward``; until then it overwrites the
    gradients of the previous one. Our loops call the module itself.
    """
    # Wrapped: DeepSpeed keeps all but the flag of the previous backward.
    plain_backward = engine.backward

    def backward(loss: Tensor, **options: Any) -> Tensor:
        result = plain_backward(loss, **options)
        engine.optimizer.clear_backward_seen_flag()
        return result

    engine.backward = backward


def whole_state(module: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
    """Return the state_dict on the CPU with whole weights on rank 0, and {} on other ranks.

    All ranks call it.
    """
    from deepspeed.runtime.zero import GatheredParameters

    # keep_vars: the tensors must be the parameters, which DeepSpeed can gather.
    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if trained_only and not tensor.requires_grad:
            continue
        # Weights are gathered one by one: all of them may not fit.
        with GatheredParameters([tensor], enabled=is_split(tensor)):
            if is_main():
                state[name] = tensor.detach().cpu().clone()
    return state


def elements(parameters: Iterable[nn.Parameter]) -> int:
    """Return the number of elements, including those that other ranks hold."""
    total = 0
    for parameter in parameters:
        total += getattr(parameter, "ds_numel", parameter.numel())
    return total
