"""ZeRO 3: a weight lies in pieces, one on each rank, and is whole only while a module that needs it runs.

DeepSpeed's hooks gather a module's own parameters before its forward and again before its backward. Gathering takes
part on all ranks, so all must call the modules in one order and equally often (`DeScore.sharded`,
`WanGenerator.sharded`). Here is what else it asks of a run; nothing outside launch/ knows that DeepSpeed exists.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from common.distributed import is_main

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor, nn


def sum_gradients(engine: DeepSpeedEngine) -> None:
    """Make ``engine.backward`` add to the gradients of the step's earlier ones, whoever called the module.

    DeepSpeed starts the next micro-batch in ``engine.forward`` and overwrites the gradients of the one before until
    then; our loops call the module itself.
    """
    plain = engine.backward

    def backward(loss: Tensor, **options: Any) -> Tensor:
        result = plain(loss, **options)
        engine.optimizer.clear_backward_seen_flag()
        return result

    engine.backward = backward


def whole_state(module: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
    """``module.state_dict()`` on the CPU with whole weights, on rank 0; the others get {}. All ranks call it."""
    from deepspeed.runtime.zero import GatheredParameters

    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if trained_only and not tensor.requires_grad:
            continue
        with GatheredParameters(
            [tensor], enabled=hasattr(tensor, "ds_id")
        ):  # one at a time: all do not fit
            if is_main():
                state[name] = tensor.detach().cpu().clone()
    return state


def elements(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers they hold, those on other ranks too."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
