"""A deepspeed engine's trained weights and Adam moments, as safetensors, for any number of ranks and ZeRO 0 to 2.

DeepSpeed's own checkpoints are pickles, hold one part per rank and reload on the same number of ranks only. Here every
parameter is gathered whole, so a run may go on with other ranks or another stage, and reading runs no code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.checkpoint import load_state, load_tensors, resolve_resume, save_tensors
from common.distributed import is_main
from common.log import say

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor, nn

FILE = "engine.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEPS = "optimizer_steps"


def save_engine(engine: DeepSpeedEngine, folder: str | Path) -> None:
    """Write ``folder/engine.safetensors``. All ranks call it (gathering is collective), rank 0 writes.

    Holds fp32 ``weight.<name>`` of each trained parameter, its ``exp_avg.<name>`` and ``exp_avg_sq.<name>`` once there
    was a step, and how many steps there were.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states = engine.client_optimizer.state
    steps = int(max((float(state["step"]) for state in states.values() if "step" in state), default=0))
    tensors: dict[str, Tensor] = {_STEPS: torch.tensor([steps])}
    if steps:
        _link_moments(engine)
    for name, parameter in _trained(engine).items():
        whole = safe_get_full_fp32_param(parameter) if _split(parameter) else parameter.data
        tensors[f"weight.{name}"] = whole.detach().float().cpu()
        for moment in _MOMENTS if steps else ():
            split = _split(parameter)
            value = safe_get_full_optimizer_state(parameter, moment) if split else states[parameter][moment]
            tensors[f"{moment}.{name}"] = value.detach().float().cpu()
    if is_main():
        save_tensors(Path(folder) / FILE, tensors)


def load_engine(engine: DeepSpeedEngine, folder: str | Path) -> None:
    """Put an engine that has not stepped yet where `save_engine` found another. All ranks call it.

    Raises ValueError when the saved parameters are not the engine's, by name or by shape.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    tensors = load_tensors(Path(folder) / FILE)
    trained = _trained(engine)
    _check_same(trained, {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")})
    steps = int(tensors[_STEPS])
    states = engine.client_optimizer.state
    if steps:
        _step_without_gradient(engine, list(trained.values()))
        _link_moments(engine)
    for name, parameter in trained.items():
        weight = tensors[f"weight.{name}"].to(parameter.device)
        parameter.data.copy_(weight)
        if _split(parameter):
            safe_set_full_fp32_param(parameter, weight)
        for moment in _MOMENTS if steps else ():
            value = tensors[f"{moment}.{name}"].to(parameter.device)
            if _split(parameter):
                safe_set_full_optimizer_state(parameter, value, moment)
            else:
                states[parameter][moment].copy_(value)
    for state in states.values():
        state["step"].fill_(steps)
    if engine.lr_scheduler is not None:
        _rewind(engine.lr_scheduler, steps)


def go_on(engine: DeepSpeedEngine, resume: str, run_dir: Path) -> int:
    """Load the run's checkpoint to go on from, if there is one; how many steps are done. All ranks call it.

    resume  "auto", "none" or a folder, see `common.checkpoint.resolve_resume`
    """
    found = resolve_resume(resume, run_dir / "checkpoints")
    if found is None:
        return 0
    load_engine(engine, found)
    done = int(load_state(found)["steps_done"])
    say(f"going on after {done} steps from {found}")
    return done


def _step_without_gradient(engine: DeepSpeedEngine, parameters: list[nn.Parameter]) -> None:
    """Adam's state is made by the first step, so take one; all it touches is overwritten afterwards."""
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(sum((p * 0.0).sum() for p in parameters))
        engine.step()


def _rewind(scheduler: Any, steps: int) -> None:
    """A LambdaLR is a function of its count; its state is the count and the last rates."""
    scheduler.last_epoch = steps
    rates = [base * rate(steps) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _link_moments(engine: DeepSpeedEngine) -> None:
    """ZeRO finds a parameter's moments through a link that it makes right after the FIRST group's first step, when the
    other groups have none yet; make the links again.
    """
    relink = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if relink is not None:
        engine.optimizer._hp_optimizer_states_linked = False
        relink()


def _trained(engine: DeepSpeedEngine) -> dict[str, nn.Parameter]:
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def _split(parameter: nn.Parameter) -> bool:
    """True where a ZeRO optimizer holds the fp32 weight and its moments, split over the ranks."""
    return hasattr(parameter, "_hp_mapping")


def _check_same(trained: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    if odd := sorted(trained.keys() ^ saved.keys()):
        raise ValueError(f"the checkpoint trains other parameters than this run: {', '.join(odd[:10])}")
    wrong = [n for n, p in trained.items() if p.shape != saved[n].shape]
    if wrong:
        shapes = [f"{n} {tuple(saved[n].shape)} for {tuple(trained[n].shape)}" for n in wrong[:10]]
        raise ValueError(f"the checkpoint's parameters have other shapes: {'; '.join(shapes)}")
