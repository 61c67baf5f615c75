"""Trained weights and Adam moments of a DeepSpeed engine as safetensors.

DeepSpeed's own checkpoints are pickles, hold one part per rank and load on the same number
of ranks only. Here every parameter is gathered whole, so a run may resume with other ranks
or another ZeRO stage, and reading runs no code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.checkpoint import load_tensors, save_tensors
from common.distributed import differing_ranks, is_main, rank, world_size
from common.state_dicts import raise_problems, shapes_in, state_dict_problems
from engine.optimizer import rewind_schedule
from engine.zero3 import is_split

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor, nn

ENGINE_FILE = "engine.safetensors"
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
STEPS_KEY = "optimizer_steps"


def save_engine(engine: DeepSpeedEngine, folder: str | Path) -> None:
    """Write engine.safetensors into a folder. All ranks call it, rank 0 writes.

    The file holds the fp32 ``weight.<name>`` of each trained parameter, the number of
    optimizer steps and, after the first step, ``exp_avg.<name>`` and ``exp_avg_sq.<name>``.
    Raises RuntimeError on all ranks if their weights differ.
    """
    # A checkpoint of ranks that have drifted apart would be worth nothing.
    trained = _trained_parameters(engine)
    _check_ranks_agree(trained)

    # Gather weights and moments one by one, and write them.
    steps = _steps_done(engine)
    tensors: dict[str, Tensor] = {STEPS_KEY: torch.tensor([steps])}
    if steps:
        _link_moments(engine)
    for name, parameter in trained.items():
        for kind in _kinds(steps):
            value = _gather(engine, parameter, kind)
            if is_main():
                tensors[f"{kind}.{name}"] = value.detach().float().cpu()
    if is_main():
        save_tensors(Path(folder) / ENGINE_FILE, tensors)


def load_engine(engine: DeepSpeedEngine, folder: str | Path) -> None:
    """Load what `save_engine` wrote into an engine before its first step. All ranks call it.

    Raises ValueError if the saved parameters have other names or shapes than the engine's.
    """
    # Check before anything is overwritten.
    tensors = load_tensors(Path(folder) / ENGINE_FILE)
    trained = _trained_parameters(engine)
    _check_same_parameters(trained, load_weights(folder))

    # Weights and moments.
    steps = int(tensors[STEPS_KEY])
    if steps:
        _make_moments(engine, list(trained.values()))
        _link_moments(engine)
    for name, parameter in trained.items():
        for kind in _kinds(steps):
            value = tensors[f"{kind}.{name}"].to(parameter.device)
            _scatter(engine, parameter, kind, value)

    # The step count decides Adam's bias correction and the learning rate.
    for state in engine.client_optimizer.state.values():
        state["step"].fill_(steps)
    if engine.lr_scheduler is not None:
        rewind_schedule(engine.lr_scheduler, steps)


def load_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return the trained fp32 weights of a checkpoint by name, on the CPU."""
    weights = {}
    for key, tensor in load_tensors(Path(folder) / ENGINE_FILE).items():
        kind, _, name = key.partition(".")
        if kind == WEIGHT:
            weights[name] = tensor
    return weights


def _check_ranks_agree(trained: dict[str, nn.Parameter]) -> None:
    # Under ZeRO 3 ranks hold different slices.
    whole = {name: p for name, p in trained.items() if not is_split(p)}
    ranks = differing_ranks(whole)
    if ranks:
        raise RuntimeError(
            f"the weights of rank {', '.join(map(str, ranks))} are not those of rank 0, and "
            "nothing is saved. Resume from the newest checkpoint; if it happens again, a "
            "gradient is not reduced over the ranks"
        )


def _check_same_parameters(
    trained: dict[str, nn.Parameter], saved: dict[str, Tensor]
) -> None:
    # Under ZeRO 3 a parameter's shape is that of its slice.
    wanted = {}
    for name, parameter in trained.items():
        shape = parameter.ds_shape if is_split(parameter) else parameter.shape
        wanted[name] = tuple(shape)
    problems = state_dict_problems(shapes_in(saved), wanted)
    raise_problems(problems, "the checkpoint is of other trained parameters")


def _trained_parameters(engine: DeepSpeedEngine) -> dict[str, nn.Parameter]:
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def _kinds(steps: int) -> tuple[str, ...]:
    """Return which tensors a parameter has: before the first step there are no moments."""
    return (WEIGHT, *MOMENTS) if steps else (WEIGHT,)


def _steps_done(engine: DeepSpeedEngine) -> int:
    # All parameters have the same count, or none before the first step.
    states = engine.client_optimizer.state.values()
    return int(max((float(s["step"]) for s in states if "step" in s), default=0))


def _has_fp32_copy(parameter: nn.Parameter) -> bool:
    """Return True if a ZeRO optimizer holds the fp32 weight and moments, split over ranks."""
    return hasattr(parameter, "_hp_mapping") or is_split(parameter)


def _gather(
    engine: DeepSpeedEngine,
    parameter: nn.Parameter,
    kind: str,
) -> Tensor:
    """Return a parameter's whole fp32 weight or moment."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    # ZeRO 0: the module's parameter and torch's state are the whole of it.
    if not _has_fp32_copy(parameter):
        if kind == WEIGHT:
            return parameter.data
        return engine.client_optimizer.state[parameter][kind]
    # ZeRO 1 to 3: DeepSpeed gathers the fp32 masters.
    if kind == WEIGHT:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


def _scatter(
    engine: DeepSpeedEngine,
    parameter: nn.Parameter,
    kind: str,
    value: Tensor,
) -> None:
    """Set a parameter's weight or moment to a whole tensor that every rank has."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if is_split(parameter):
        _scatter_zero3(parameter, kind, value)
    elif kind == WEIGHT:
        parameter.data.copy_(value)
        if _has_fp32_copy(parameter):
            safe_set_full_fp32_param(parameter, value)
    elif _has_fp32_copy(parameter):
        safe_set_full_optimizer_state(parameter, value, kind)
    else:
        engine.client_optimizer.state[parameter][kind].copy_(value)


def _scatter_zero3(
    parameter: nn.Parameter,
    kind: str,
    value: Tensor,
) -> None:
    """Set this rank's slice of a weight or moment under ZeRO 3.

    Slices have equal lengths, so the last may end in padding, which DeepSpeed's own setter
    of whole values does not expect.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import (
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    # This rank's slice of the padded value.
    length = parameter.ds_tensor.numel()
    padding = length * world_size() - value.numel()
    padded = torch.nn.functional.pad(value.flatten().float(), (0, padding))
    slice_of_rank = padded[rank() * length : (rank() + 1) * length]
    if kind != WEIGHT:
        safe_set_local_optimizer_state(parameter, slice_of_rank, kind)
        return
    # A weight has two copies: the module's in its dtype, and the optimizer's in fp32.
    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)
    safe_set_local_fp32_param(parameter, slice_of_rank)


def _make_moments(engine: DeepSpeedEngine, parameters: list[nn.Parameter]) -> None:
    """Make Adam's state, which otherwise the first step makes."""
    # Under ZeRO 3: as AdamW would make it, for the tensors that DeepSpeed steps.
    if is_split(parameters[0]):
        for master in engine.optimizer.fp32_partitioned_groups_flat:
            state = {"step": torch.tensor(0.0)}
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(master)
            engine.client_optimizer.state[master] = state
        return

    # Else by a step without gradient; all that it changes is overwritten afterwards.
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(sum((p * 0.0).sum() for p in parameters))
        engine.step()


def _link_moments(engine: DeepSpeedEngine) -> None:
    """Let ZeRO 1 and 2 find every parameter's moments.

    DeepSpeed makes its links right after the FIRST group's first step, when the other
    groups have no moments yet.
    """
    relink = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if relink is not None:
        engine.optimizer._hp_optimizer_states_linked = False
        relink()
