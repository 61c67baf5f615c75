"""Trained weights and Adam moments of a DeepSpeed engine as safetensors.

DeepSpeed's own checkpoints are pickles, hold one part per rank and load on the same number
of ranks only. Here a parameter is saved whole or in pieces that know their place in it
(`engine.state_files`), so a run may resume with other ranks or another ZeRO stage, and reading
runs no code.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.checkpoint import save_tensors
from common.distributed import (
    differing_ranks,
    gather_objects,
    is_main,
    rank,
    world_size,
)
from common.state_dicts import raise_problems, state_dict_problems
from engine.optimizer import rewind_schedule
from engine.state_files import (
    STEPS_KEY,
    WHOLE_FILE,
    SavedState,
    plan_parts,
    write_index,
    write_parts,
)
from engine.zero3 import elements, is_split

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor, nn

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
# A larger state is not gathered: each rank writes its own pieces.
WHOLE_FILE_BYTES = 2**31


def save_engine(engine: DeepSpeedEngine, folder: str | Path) -> None:
    """Write the training state into a folder. All ranks call it.

    That is the fp32 ``weight.<name>`` of each trained parameter, the number of optimizer steps
    and, after the first step, ``exp_avg.<name>`` and ``exp_avg_sq.<name>``. Up to
    `WHOLE_FILE_BYTES`, rank 0 gathers them into engine.safetensors. A larger state is written by
    all ranks in parts, and no rank holds more than a part of it.

    Raises RuntimeError on all ranks if their weights differ.
    """
    # A checkpoint of ranks that have drifted apart would be worth nothing.
    trained = _trained_parameters(engine)
    _check_ranks_agree(trained)

    # Whole, or in parts.
    steps = _steps_done(engine)
    if steps:
        _link_moments(engine)
    size = 4 * len(_kinds(steps)) * elements(trained.values())
    if size <= WHOLE_FILE_BYTES:
        _save_whole(engine, trained, steps, Path(folder))
    else:
        _save_parts(engine, trained, steps, Path(folder))


def load_engine(engine: DeepSpeedEngine, folder: str | Path) -> None:
    """Load what `save_engine` wrote into an engine before its first step. All ranks call it.

    Raises ValueError if the saved parameters have other names or shapes than the engine's.
    """
    # Check before anything is overwritten.
    saved = SavedState(folder)
    trained = _trained_parameters(engine)
    _check_same_parameters(trained, saved.shapes)

    # Weights and moments, one by one.
    steps = saved.steps
    if steps:
        _make_moments(engine, list(trained.values()))
        _link_moments(engine)
    for name, parameter in trained.items():
        for kind in _kinds(steps):
            value = saved.read(kind, name).to(parameter.device)
            _scatter(engine, parameter, kind, value)

    # The step count decides Adam's bias correction and the learning rate.
    for state in engine.client_optimizer.state.values():
        state["step"].fill_(steps)
    if engine.lr_scheduler is not None:
        rewind_schedule(engine.lr_scheduler, steps)


def load_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return the trained fp32 weights of a checkpoint by name, on the CPU."""
    saved = SavedState(folder)
    return {name: saved.read(WEIGHT, name) for name in saved.shapes}


def _save_whole(
    engine: DeepSpeedEngine,
    trained: dict[str, nn.Parameter],
    steps: int,
    folder: Path,
) -> None:
    """Gather weights and moments one by one, and write them on rank 0."""
    tensors: dict[str, Tensor] = {STEPS_KEY: torch.tensor([steps])}
    for name, parameter in trained.items():
        for kind in _kinds(steps):
            value = _gather(engine, parameter, kind)
            if is_main():
                tensors[f"{kind}.{name}"] = value.detach().float().cpu()
    if is_main():
        save_tensors(folder / WHOLE_FILE, tensors)


def _save_parts(
    engine: DeepSpeedEngine,
    trained: dict[str, nn.Parameter],
    steps: int,
    folder: Path,
) -> None:
    """Write this rank's pieces, and on rank 0 the index of all."""
    # Which numbers are here, and the file that each piece goes to.
    kinds = _kinds(steps)
    places = {}
    for name, parameter in trained.items():
        places[name] = _place_of_piece(parameter)
    pieces = plan_parts(places, rank=rank(), kinds=len(kinds))

    # The ranks talk before they write: one that fails must not leave the others waiting.
    pieces_of_ranks = gather_objects(pieces)
    if is_main():
        shapes = {name: _whole_shape(p) for name, p in trained.items()}
        write_index(folder, steps, shapes, pieces_of_ranks)
    write_parts(
        folder,
        pieces,
        kinds,
        lambda kind, name: _piece(engine, trained[name], kind),
    )


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
    trained: dict[str, nn.Parameter], saved: dict[str, tuple[int, ...]]
) -> None:
    wanted = {name: _whole_shape(p) for name, p in trained.items()}
    problems = state_dict_problems(saved, wanted)
    raise_problems(problems, "the checkpoint is of other trained parameters")


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return a parameter's shape; under ZeRO 3, its own is that of its slice."""
    shape = parameter.ds_shape if is_split(parameter) else parameter.shape
    return tuple(shape)


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


def _place_of_piece(parameter: nn.Parameter) -> tuple[int, int]:
    """Return where this rank's piece of a flattened parameter starts, and its length."""
    # ZeRO 1 and 2: a rank's partition may begin and end within a parameter.
    if hasattr(parameter, "_hp_mapping"):
        if parameter._hp_mapping is None:
            return 0, 0
        address = parameter._hp_mapping.lp_fragment_address
        return address.start, address.numel

    # ZeRO 3: slices of equal lengths, the last with padding. ZeRO 0: the same, of a whole.
    if is_split(parameter):
        count = parameter.ds_numel
        length = parameter.ds_tensor.numel()
    else:
        count = parameter.numel()
        length = math.ceil(count / world_size())
    start = min(rank() * length, count)
    return start, min(length, count - start)


def _piece(
    engine: DeepSpeedEngine,
    parameter: nn.Parameter,
    kind: str,
) -> Tensor:
    """Return this rank's piece (length,) of a parameter's fp32 weight or moment."""
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
    )

    # ZeRO 1 and 2: the piece itself.
    start, length = _place_of_piece(parameter)
    if hasattr(parameter, "_hp_mapping"):
        key = None if kind == WEIGHT else kind
        return parameter._hp_mapping.get_hp_fragment(key)

    # ZeRO 3 without the padding, and a slice of a whole.
    if is_split(parameter):
        if kind == WEIGHT:
            padded = safe_get_local_fp32_param(parameter)
        else:
            padded = safe_get_local_optimizer_state(parameter, kind)
        return padded.flatten()[:length]
    whole = _gather(engine, parameter, kind)
    return whole.flatten()[start : start + length]


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
