"""A deepspeed engine's trained weights and Adam moments, as safetensors, for any number of ranks and any stage of ZeRO.

DeepSpeed's own checkpoints are pickles, hold one part per rank and reload on the same number of ranks only. Here every
parameter is gathered whole, so a run may go on with other ranks or another stage, and reading runs no code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from common.checkpoint import (
    load_state,
    load_tensors,
    resolve_resume,
    save,
    save_tensors,
)
from common.cli import user_errors
from common.distributed import differing_ranks, is_main, rank, world_size
from common.log import say
from common.run_record import SETTINGS, changed_settings, dump, write_settings

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor, nn

FILE = "engine.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEPS = "optimizer_steps"


def save_engine(engine: DeepSpeedEngine, folder: str | Path) -> None:
    """Write ``folder/engine.safetensors``. All ranks call it (gathering is collective), rank 0 writes.

    Holds fp32 ``weight.<name>`` of each trained parameter, its ``exp_avg.<name>`` and ``exp_avg_sq.<name>`` once there
    was a step, and how many steps there were. Raises RuntimeError, on all ranks, when their weights have drifted apart:
    what was computed since is worth nothing, and rank 0's part of it is not saved.
    """
    if apart := differing_ranks(
        {name: p for name, p in _trained(engine).items() if not _in_pieces(p)}
    ):
        raise RuntimeError(
            f"the weights of rank {', '.join(map(str, apart))} are not those of rank 0: the ranks have drifted apart, "
            "and nothing is saved. Go on from the newest checkpoint; if it comes again, a gradient is not reduced"
        )
    states = engine.client_optimizer.state
    steps = int(
        max(
            (float(state["step"]) for state in states.values() if "step" in state),
            default=0,
        )
    )
    tensors: dict[str, Tensor] = {_STEPS: torch.tensor([steps])}
    if steps:
        _link_moments(engine)
    for name, parameter in _trained(engine).items():
        for kind in ("weight", *(_MOMENTS if steps else ())):
            whole = _whole(engine, parameter, kind)
            if is_main():
                tensors[f"{kind}.{name}"] = whole.detach().float().cpu()
    if is_main():
        save_tensors(Path(folder) / FILE, tensors)


def load_engine(engine: DeepSpeedEngine, folder: str | Path) -> None:
    """Put an engine that has not stepped yet where `save_engine` found another. All ranks call it.

    Raises ValueError when the saved parameters are not the engine's, by name or by shape.
    """
    tensors = load_tensors(Path(folder) / FILE)
    trained = _trained(engine)
    _check_same(
        trained,
        {
            k.removeprefix("weight."): v
            for k, v in tensors.items()
            if k.startswith("weight.")
        },
    )
    steps = int(tensors[_STEPS])
    states = engine.client_optimizer.state
    if steps:
        _make_moments(engine, list(trained.values()))
        _link_moments(engine)
    for name, parameter in trained.items():
        for kind in ("weight", *(_MOMENTS if steps else ())):
            _put(
                engine, parameter, kind, tensors[f"{kind}.{name}"].to(parameter.device)
            )
    for state in states.values():
        state["step"].fill_(steps)
    if engine.lr_scheduler is not None:
        rewind(engine.lr_scheduler, steps)


class Resumable(Protocol):
    """What else is read from a checkpoint's folder."""

    def load(self, folder: Path) -> None: ...


class CheckpointSettings(Protocol):
    """What of a run's settings counts here."""

    run_dir: str
    keep: int


def save_step(
    cfg: CheckpointSettings,
    step: int,
    write: Callable[[Path], None],
    *,
    state: Mapping[str, Any] | None = None,
) -> None:
    """checkpoints/step-N after ``step`` steps: what ``write`` puts there, ``state``, settings. All ranks call it."""

    def with_settings(folder: Path) -> None:
        write(folder)
        if is_main():
            write_settings(cfg, folder / SETTINGS)

    whole = {"steps_done": step, **(state or {})}
    save(
        Path(cfg.run_dir) / "checkpoints",
        step,
        with_settings,
        keep=cfg.keep,
        state=whole,
    )


def go_on(
    cfg: CheckpointSettings,
    engine: DeepSpeedEngine,
    resume: str,
    *,
    also: Sequence[Resumable] = (),
) -> int:
    """Load the run's checkpoint to go on from, if there is one; how many steps are done. All ranks call it.

    Settings that are not those it was saved with are said, one by one: they may be meant, or a mistake.

    resume  "auto", "none" or a folder, see `common.checkpoint.resolve_resume`
    """
    found = resolve_resume(resume, Path(cfg.run_dir) / "checkpoints")
    if found is None:
        return 0
    if (found / SETTINGS).is_file() and (
        changed := changed_settings(found / SETTINGS, cfg)
    ):
        say(f"other settings than {found.name} was saved with: {'; '.join(changed)}")
    load_engine(engine, found)
    for one in also:
        one.load(found)
    done = int(load_state(found)["steps_done"])
    say(f"going on after {done} steps from {found}")
    return done


def begin(
    cfg: CheckpointSettings,
    engine: DeepSpeedEngine,
    resume: str,
    *,
    also: Sequence[Resumable] = (),
) -> int:
    """`go_on`, and config.yaml only then: a run that cannot begin leaves that of the last one. Exit with code 2 where
    the checkpoint does not fit. All ranks call it.
    """
    with user_errors():
        start = go_on(cfg, engine, resume, also=also)
    if is_main():
        dump(cfg, cfg.run_dir)
    return start


def _whole(engine: DeepSpeedEngine, parameter: nn.Parameter, kind: str) -> Tensor:
    """A parameter's fp32 weight or moment, gathered from all ranks."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if kind == "weight":
        return (
            safe_get_full_fp32_param(parameter) if _split(parameter) else parameter.data
        )
    if _split(parameter):
        return safe_get_full_optimizer_state(parameter, kind)
    return engine.client_optimizer.state[parameter][kind]


def _put(
    engine: DeepSpeedEngine, parameter: nn.Parameter, kind: str, value: Tensor
) -> None:
    """Set a parameter's weight or moment to a whole tensor that every rank has."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if _in_pieces(parameter):
        _put_piece(parameter, kind, value)
    elif kind == "weight":
        parameter.data.copy_(value)
        if _split(parameter):
            safe_set_full_fp32_param(parameter, value)
    elif _split(parameter):
        safe_set_full_optimizer_state(parameter, value, kind)
    else:
        engine.client_optimizer.state[parameter][kind].copy_(value)


def _put_piece(parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    """As `_put` under ZeRO 3. The pieces are equally long, so the last may end in padding, which DeepSpeed's own
    setter of whole values does not expect.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import (
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    length = parameter.ds_tensor.numel()
    padded = torch.nn.functional.pad(
        value.flatten().float(), (0, length * world_size() - value.numel())
    )
    piece = padded[rank() * length : (rank() + 1) * length]
    if kind != "weight":
        safe_set_local_optimizer_state(parameter, piece, kind)
        return
    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)
    safe_set_local_fp32_param(parameter, piece)


def _make_moments(engine: DeepSpeedEngine, parameters: list[nn.Parameter]) -> None:
    """Adam's state is made by the first step. Under ZeRO 3 make it as AdamW would, on what DeepSpeed steps; else take
    a step without gradient, all it touches is overwritten afterwards.
    """
    if _in_pieces(parameters[0]):
        for master in engine.optimizer.fp32_partitioned_groups_flat:
            moments = {moment: torch.zeros_like(master) for moment in _MOMENTS}
            engine.client_optimizer.state[master] = {
                "step": torch.tensor(0.0),
                **moments,
            }
        return
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(sum((p * 0.0).sum() for p in parameters))
        engine.step()


def rewind(scheduler: Any, steps: int) -> None:
    """Put a LambdaLR where ``steps`` steps have put it: it is a function of its count."""
    scheduler.last_epoch = steps
    rates = [
        base * rate(steps)
        for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
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
    return hasattr(parameter, "_hp_mapping") or _in_pieces(parameter)


def _in_pieces(parameter: nn.Parameter) -> bool:
    """True under ZeRO 3, where the parameter itself is split, and empty between its uses."""
    return hasattr(parameter, "ds_id")


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if _in_pieces(parameter) else parameter.shape)


def _check_same(trained: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    if odd := sorted(trained.keys() ^ saved.keys()):
        raise ValueError(
            f"the checkpoint trains other parameters than this run: {', '.join(odd[:10])}"
        )
    wrong = [n for n, p in trained.items() if _shape(p) != tuple(saved[n].shape)]
    if wrong:
        shapes = [
            f"{n} {tuple(saved[n].shape)} for {_shape(trained[n])}" for n in wrong[:10]
        ]
        raise ValueError(
            f"the checkpoint's parameters have other shapes: {'; '.join(shapes)}"
        )
