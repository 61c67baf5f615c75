"""What the two stages of DeScore's training share around their steps: tables in, the run, a judge out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.guard import Guard
    from engine.skip_nonfinite import SkipNonFinite
    from rm.model import DeScore

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepspeed import DeepSpeedEngine
    from torch import Tensor

    from engine.guard import Guard
    from engine.skip_nonfinite import SkipNonFinite
    from launch.schemas.training import ColdStartRun, DualRlRun
    from rm.model import DeScore


def build_rm_engine(
    cfg: ColdStartRun | DualRlRun,
    model: DeScore,
    groups: list[dict[str, Any]],
    *,
    accumulation: int,
    clip_per_group: bool = False,
) -> DeepSpeedEngine:
    """The engine of a judge, which knows afterwards whether its weights are sharded."""
    from engine.deepspeed import build_engine

    pass

    if cfg.gradient_checkpointing:
        enable_checkpointing(model)
    engine = build_engine(
        model,
        groups,
        optimizer=cfg.optimizer,
        zero_stage=cfg.zero_stage,
        accumulation=accumulation,
        dtype=cfg.dtype,
        clip_per_group=clip_per_group,
        overrides=cfg.deepspeed,
    )
    if cfg.zero_stage == 3:
        shard_reward_model(model)
    return engine


def enable_checkpointing(model: DeScore) -> None:
    """Gradient checkpointing of the backbone."""
    backbone = model.backbone  # transformers is renaming the method
    enable = (
        getattr(backbone, "activation_checkpointing_enable", None)
        or backbone.gradient_checkpointing_enable
    )
    enable(
        {"use_reentrant": False}
    )  # the other kind drops gradients above frozen embeddings


def to_device(model: DeScore) -> DeScore:
    """On this rank's GPU, or the CPU."""
    import torch

    return model.to(
        f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        if torch.cuda.is_available()
        else "cpu"
    )


def weights_of(model: DeScore, run_dir: Path) -> dict[str, Tensor]:
    """The module's weights, the trained ones in the engine's fp32 as the last checkpoint has them; {} but on rank 0.

    In a bfloat16 run the module's own are roundings of those, coarser than many of its steps. All ranks call it.
    """
    from common.checkpoint import latest, load_tensors
    from common.distributed import is_main
    from engine.state import FILE
    from engine.zero3 import whole_state

    state = whole_state(model)
    if not is_main():
        return {}
    found = latest(run_dir / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"{run_dir / 'checkpoints'} holds no whole checkpoint")
    trained = {
        name: x
        for name, x in load_tensors(found / FILE).items()
        if name.startswith("weight.")
    }
    return {**state, **{name.removeprefix("weight."): x for name, x in trained.items()}}


def shard_reward_model(model: DeScore) -> None:
    """After its engine is built: the query's row is gathered with the embedding that its hook puts it into."""
    from deepspeed.runtime.zero import register_external_parameter

    register_external_parameter(model.backbone.get_input_embeddings(), model.query)
    model.sharded = True


def run_steps(
    cfg: ColdStartRun | DualRlRun,
    *,
    model: DeScore,
    engine: DeepSpeedEngine,
    careful: SkipNonFinite,
    steps: int,
    step_of: Callable[[int], dict[str, float]],
    evaluate: Callable[[], dict[str, float]] | None,
    label: str,
    guard: Guard,
    resume: str,
) -> None:
    """Go on where the run was, one ``step_of`` after the other, measure and save on the way, leave the judge in final/.

    evaluate  asked every ``eval_every`` steps and after the last; None: there is nothing to measure on
    """
    from common import distributed, faults
    from common.log import RunLog, progress, say
    from common.memory import peak_memory
    from engine.state import begin, save_engine, save_step

    run_dir = Path(cfg.run_dir)
    start = begin(cfg, engine, resume)
    log = RunLog(
        run_dir, start=start, wandb=cfg.wandb, tensorboard=cfg.tensorboard, total=steps
    )
    guard.begin()
    for step in progress(range(start, steps), steps - start, label):
        metrics = {
            **step_of(step),
            "train/nonfinite_updates": careful.pop_skipped_count(),
            **peak_memory(),
        }
        faults.point("step")
        last = step + 1 == steps
        if evaluate is not None and (
            last or (cfg.eval_every and (step + 1) % cfg.eval_every == 0)
        ):
            metrics |= evaluate()
        log.log(step, metrics)
        faults.point("logged")
        stop = guard.step_done()
        if last or stop or (step + 1) % cfg.save_every == 0:
            save_step(cfg, step + 1, lambda folder: save_engine(engine, folder))
        if stop:
            guard.leave(log, step + 1)

    weights = weights_of(model, run_dir)
    if distributed.is_main():
        model.save(run_dir / "final", weights)
        say(f"done: {run_dir / 'final'} holds the reward model")
    log.close()
