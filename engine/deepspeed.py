"""TODO."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    pass
    import torch
    from torch import nn

    from engine.config import OptimizerConfig


def shard_frozen(
    module: nn.Module, *, dtype: TrainDtype, overrides: Mapping[str, Any]
) -> None:
    """Spread a module over the ranks that nobody trains; it is called as before."""
    import deepspeed

    pass
    from engine.config import OptimizerConfig

    config = ds_config(
        optimizer=OptimizerConfig(max_grad_norm=0.0),
        zero_stage=3,
        dtype=dtype,
        accumulation=1,
        overrides=overrides,
    )
    engine, *_ = deepspeed.initialize(model=module, config=config)
    module.kept = (
        engine,
    )  # an engine that nobody holds takes its hooks off the module


_SECTIONS = {
    "activation_checkpointing", "aio", "autotuning", "comms_logger", "compile", "compression_training", "csv_monitor",
    "curriculum_learning", "data_efficiency", "elasticity", "flops_profiler", "hybrid_engine", "nebula", "pipeline",
    "tensor_parallel", "tensorboard", "wandb", "zero_optimization",
}  # fmt: skip


TrainDtype = Literal["float32", "bfloat16"]


Parameters = Iterable["nn.Parameter"] | Iterable[dict[str, Any]]


def ds_config(
    *,
    optimizer: OptimizerConfig,
    zero_stage: int,
    dtype: TrainDtype,
    accumulation: int,
    micro_batch: int = 1,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """DeepSpeed's JSON. ``overrides`` may set any of its keys, nested ones by nesting.

    dtype         of the TRAINED parameters. "bfloat16" makes DeepSpeed cast the whole module and keep fp32 masters in
                  its optimizer (`build_engine` gives buffers their dtype back); "float32" casts nothing, and frozen
                  bf16 weights beside fp32 adapters stay as they are
    accumulation  backwards per optimizer step on each rank

    Raises ValueError for bfloat16 with ZeRO 0: its optimizer takes a step without gradient when it is built, so weight
    decay acts once and Adam's bias correction is off by one. And for an override of gradient_accumulation_steps or of
    the stage: the caller counts on stepping the optimizer exactly once per ``accumulation`` backwards, and calls its
    model as the stage asks.
    """
    if dtype == "bfloat16" and zero_stage == 0:
        raise ValueError(
            "bfloat16 parameters need zero_stage >= 1: ZeRO 0 takes a step before the first one"
        )
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.max_grad_norm,
        # memory_efficient_linear would replace torch's linear for every model of the process, rewards included
        "zero_optimization": {"stage": zero_stage, "memory_efficient_linear": False},
        # torch's AdamW: DeepSpeed's own are compiled at first use, which takes minutes on a CPU
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if zero_stage == 3:
        # one optimizer call for each parameter group, as under ZeRO 1 and 2; smaller ones serve offloading to disks
        config["zero_optimization"]["sub_group_size"] = 10**12
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
    config = _merged(config, overrides or {})
    if config["gradient_accumulation_steps"] != accumulation:
        got = config["gradient_accumulation_steps"]
        raise ValueError(
            f"deepspeed.gradient_accumulation_steps follows from the batch: {accumulation}, not {got}"
        )
    if config["zero_optimization"]["stage"] != zero_stage:
        got = config["zero_optimization"]["stage"]
        raise ValueError(
            f"deepspeed.zero_optimization.stage is zero_stage: {zero_stage}, not {got}"
        )
    return config


def build_engine(
    module: nn.Module,
    params: Parameters | None = None,
    *,
    optimizer: OptimizerConfig,
    zero_stage: int,
    accumulation: int,
    dtype: TrainDtype | None = None,
    micro_batch: int = 1,
    clip_per_group: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> DeepSpeedEngine:
    """A deepspeed engine around a module, for `Engine.backward` and `Engine.step`; the module may be called directly.

    params  parameters, or groups {"params": [...], "lr": ...} whose settings go before the optimizer's; None is every
            parameter of the module that requires grad
    dtype   see `ds_config`; None is what the trained parameters have
    clip_per_group  every group, which then needs a ``name``, is clipped by its own norm

    The process group must exist (`common.distributed.init_process_group`). Raises ValueError when nothing is trainable,
    and as `ds_config`.
    """
    import deepspeed
    from torch.optim import AdamW
    from torch.optim.lr_scheduler import LambdaLR

    from common.log import say
    from engine.optimizer import PerGroupClippedAdamW
    from engine.zero3 import sum_gradients

    groups = _parameter_groups(module, params)
    trained = [p for group in groups for p in group["params"]]
    if not trained:
        raise ValueError(
            f"{type(module).__name__} has no trainable parameter; do the adapter's targets name its layers?"
        )
    dtype = dtype or _dtype_of(trained)
    options = {
        "lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.eps, "weight_decay": optimizer.weight_decay
    }  # fmt: skip
    if clip_per_group:
        max_norm, optimizer = (
            optimizer.max_grad_norm,
            replace(optimizer, max_grad_norm=0.0),
        )
        adamw = PerGroupClippedAdamW(
            groups, max_norm=max_norm, sliced=zero_stage > 0, **options
        )
    else:
        adamw = AdamW(groups, **options)
    warmup = max(1, optimizer.warmup_steps)
    config = ds_config(
        optimizer=optimizer,
        zero_stage=zero_stage,
        dtype=dtype,
        accumulation=accumulation,
        micro_batch=micro_batch,
        overrides=overrides,
    )
    if strange := unknown_keys(overrides or {}):
        say(
            f"DeepSpeed ignores keys that it does not know, and these seem to be none: {', '.join(strange)}"
        )
    buffers = [
        (owner, name, one)
        for owner in module.modules()
        for name, one in owner.named_buffers(recurse=False)
    ]
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=adamw,
        config=config,
        lr_scheduler=LambdaLR(adamw, lambda done: min(1.0, (done + 1) / warmup)),
    )
    for (
        owner,
        name,
        one,
    ) in buffers:  # in bfloat16, rotary frequencies would be other positions
        owner._buffers[name] = one.to(engine.device)
    if zero_stage == 3:
        sum_gradients(engine)
        pieces = len(engine.optimizer.fp16_groups)
        if clip_per_group and pieces != len(groups):
            raise ValueError(
                f"deepspeed.zero_optimization.sub_group_size cuts {len(groups)} parts of the model into {pieces}; each "
                f"would be clipped by the norm of a piece"
            )
    return engine


def unknown_keys(overrides: Mapping[str, Any]) -> list[str]:
    """Of DeepSpeed's JSON, those it has no constant for; sections have theirs in modules of their own."""
    from deepspeed.runtime import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    return [
        f"deepspeed.{key}"
        for key in overrides
        if key not in known and key not in _SECTIONS
    ]


def _parameter_groups(
    module: nn.Module, params: Parameters | None
) -> list[dict[str, Any]]:
    """As torch's optimizers want them, without frozen parameters."""
    given = list(module.parameters() if params is None else params)
    groups = (
        [dict(group) for group in given]
        if given and isinstance(given[0], dict)
        else [{"params": given}]
    )
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return [group for group in groups if group["params"]]


def _dtype_of(params: list[nn.Parameter]) -> TrainDtype:
    kinds: set[torch.dtype] = {p.dtype for p in params}
    names = {str(kind).removeprefix("torch.") for kind in kinds}
    if names == {"float32"}:
        return "float32"
    if names == {"bfloat16"}:
        return "bfloat16"
    raise ValueError(
        f"the trained parameters must all be float32 or all bfloat16, got {sorted(names)}"
    )


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``, mappings merged key by key."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        result[key] = _merged(base[key], value) if both else value
    return result
