"""Everything about DeepSpeed: its JSON, the parameter groups, and the engine around a module.

Read in order: `ds_config` computes DeepSpeed's JSON, `parameter_groups` selects the trained
parameters, and `build_engine` calls ``deepspeed.initialize`` with both. `shard_frozen` spreads
a module without trained parameters over the ranks. ZeRO 3 itself is in engine/zero3.py, saving
and loading in engine/state.py, per-group clipping in engine/optimizer.py, and skipped steps in
engine/skip_nonfinite.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import nn

    from engine.config import OptimizerConfig

TrainDtype = Literal["float32", "bfloat16"]

# Sections of DeepSpeed's JSON, whose names are in no module of constants.
_SECTIONS = {
    "activation_checkpointing", "aio", "autotuning", "comms_logger", "compile",
    "compression_training", "csv_monitor", "curriculum_learning", "data_efficiency",
    "elasticity", "flops_profiler", "hybrid_engine", "nebula", "pipeline",
    "tensor_parallel", "tensorboard", "wandb", "zero_optimization",
}  # fmt: skip


# ------------------------------------------------------------------ DeepSpeed's JSON


def ds_config(
    *,
    optimizer: OptimizerConfig,
    zero_stage: int,
    dtype: TrainDtype,
    accumulation: int,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compute DeepSpeed's JSON; ``overrides`` may set any of its keys, nested ones by nesting.

    dtype         of the TRAINED parameters. With "bfloat16" DeepSpeed casts the whole module
                  and its optimizer keeps fp32 masters. With "float32" it casts nothing, and
                  frozen bf16 weights next to fp32 adapters stay as they are
    accumulation  backwards per optimizer step on each rank

    Raises ValueError for bfloat16 with ZeRO 0: that optimizer takes a step without gradient
    when it is built, so weight decay acts once and Adam's bias correction is off by one.
    Raises it also for an override of gradient_accumulation_steps or of the stage: the caller
    steps once per ``accumulation`` backwards, and calls its model as the stage needs. For an
    override of the dtype of accumulated gradients see `check_grad_accumulation`.
    """
    from engine.config import check_grad_accumulation

    check_grad_accumulation(overrides or {}, zero_stage=zero_stage, dtype=dtype)
    if dtype == "bfloat16" and zero_stage == 0:
        raise ValueError(
            "bfloat16 parameters need zero_stage >= 1: ZeRO 0 takes a step before the first"
        )

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.max_grad_norm,
        # memory_efficient_linear would replace torch's linear in the whole process, rewards
        # included.
        "zero_optimization": {"stage": zero_stage, "memory_efficient_linear": False},
        # We bring torch's AdamW: compiling DeepSpeed's takes minutes on a CPU.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if zero_stage == 3:
        # One optimizer call per parameter group, as under ZeRO 1 and 2. Smaller sub-groups
        # serve offloading to disks.
        config["zero_optimization"]["sub_group_size"] = 10**12
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        # A sum of many small gradients would stop growing in bfloat16. Under ZeRO 1 DeepSpeed
        # gets the fp32 sum wrong.
        if zero_stage >= 2:
            config["data_types"] = {"grad_accum_dtype": "fp32"}

    config = OmegaConf.to_container(OmegaConf.merge(config, overrides or {}))
    steps = config["gradient_accumulation_steps"]
    if steps != accumulation:
        raise ValueError(
            "deepspeed.gradient_accumulation_steps follows from the batch: "
            f"{accumulation}, not {steps}"
        )
    stage = config["zero_optimization"]["stage"]
    if stage != zero_stage:
        raise ValueError(
            f"deepspeed.zero_optimization.stage is zero_stage: {zero_stage}, not {stage}"
        )
    return config


def unknown_keys(overrides: Mapping[str, Any]) -> list[str]:
    """List the keys of DeepSpeed's JSON for which DeepSpeed has no constant."""
    from deepspeed.runtime import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    known |= _SECTIONS
    return [f"deepspeed.{key}" for key in overrides if key not in known]


# ------------------------------------------------------------------ parameter groups


def parameter_groups(
    module: nn.Module, given: list[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Return groups as torch's optimizers take them, without frozen parameters.

    Without given groups all parameters of the module are one.

    Raises ValueError if nothing is trainable.
    """
    groups = []
    for group in given or [{"params": module.parameters()}]:
        trained = [p for p in group["params"] if p.requires_grad]
        if trained:
            groups.append({**group, "params": trained})
    if not groups:
        raise ValueError(
            f"{type(module).__name__} has no trainable parameter; do the adapter's targets "
            "name its layers?"
        )
    return groups


def _dtype_of(groups: list[dict[str, Any]]) -> TrainDtype:
    """Return the dtype of all trained parameters. Raises ValueError if they have several."""
    dtypes = {p.dtype for group in groups for p in group["params"]}
    names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if names not in (["float32"], ["bfloat16"]):
        raise ValueError(
            f"the trained parameters must all be float32 or all bfloat16, got {names}"
        )
    return names[0]


# ------------------------------------------------------------------ engines


def build_engine(
    module: nn.Module,
    params: list[dict[str, Any]] | None = None,
    *,
    optimizer: OptimizerConfig,
    zero_stage: int,
    accumulation: int,
    dtype: TrainDtype | None = None,
    clip_per_group: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> DeepSpeedEngine:
    """Build a DeepSpeed engine around a module; the module may still be called directly.

    params          groups {"params": [...], "lr": ...}, whose settings override the
                    optimizer's; None trains every parameter that requires grad
    dtype           see `ds_config`; None is the dtype of the trained parameters
    clip_per_group  clips every group, which then needs a ``name``, by its own norm

    The process group must exist (`common.distributed.init_process_group`). Raises ValueError
    as `parameter_groups` and `ds_config` do.
    """
    import deepspeed
    from torch.optim import AdamW
    from torch.optim.lr_scheduler import LambdaLR

    from common.log import say
    from engine.optimizer import PerGroupClippedAdamW
    from engine.zero3 import sum_gradients

    # Settings. DeepSpeed must not clip again what the optimizer clips by group.
    groups = parameter_groups(module, params)
    names = ("lr", "betas", "eps", "weight_decay")
    options = {name: getattr(optimizer, name) for name in names}
    if clip_per_group:
        adamw = PerGroupClippedAdamW(
            groups,
            max_norm=optimizer.max_grad_norm,
            sliced=zero_stage > 0,
            **options,
        )
        optimizer = replace(optimizer, max_grad_norm=0.0)
    else:
        adamw = AdamW(groups, **options)
    config = ds_config(
        optimizer=optimizer,
        zero_stage=zero_stage,
        dtype=dtype or _dtype_of(groups),
        accumulation=accumulation,
        overrides=overrides,
    )
    unknown = unknown_keys(overrides or {})
    if unknown:
        say(
            f"DeepSpeed seems not to know these keys and ignores them: {', '.join(unknown)}"
        )

    # The engine.
    buffers = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=adamw,
        config=config,
        lr_scheduler=LambdaLR(adamw, lambda done: optimizer.rate_share(done + 1)),
    )

    # Buffers keep their dtype: rotary frequencies in bfloat16 would be other positions.
    for owner, name, buffer in buffers:
        owner._buffers[name] = buffer.to(engine.device)
    if zero_stage == 3:
        sum_gradients(engine)
        # Pieces of a group must not be clipped by norms of their own.
        pieces = len(engine.optimizer.fp16_groups)
        if clip_per_group and pieces != len(groups):
            raise ValueError(
                f"deepspeed.zero_optimization.sub_group_size cuts {len(groups)} parameter "
                f"groups into {pieces} pieces, and each would be clipped by its norm"
            )
    return engine


def shard_frozen(
    module: nn.Module, *, dtype: TrainDtype, overrides: Mapping[str, Any]
) -> None:
    """Spread a module that nobody trains over the ranks (ZeRO 3); it is called as before."""
    import deepspeed

    from engine.config import OptimizerConfig

    config = ds_config(
        optimizer=OptimizerConfig(max_grad_norm=0.0),
        zero_stage=3,
        dtype=dtype,
        accumulation=1,
        overrides=overrides,
    )
    engine, *_ = deepspeed.initialize(model=module, config=config)
    # The engine must live as long as the module, or its hooks go away. The tuple hides it
    # from torch, which would register it as a submodule.
    module.sharding_engine = (engine,)
