"""Engine, task and export that both stages of DeScore's training share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

    from engine.trainer import TrainingTask
    from launch.schemas.training import ColdStartRun, DualRlRun
    from rm.cold_start import ColdStart
    from rm.config import ColdStartConfig, DualRlConfig
    from rm.data import Pair
    from rm.dual_rl import DualRl
    from rm.model import DeScore


def build_rm_engine(
    run: ColdStartRun | DualRlRun,
    settings: ColdStartConfig | DualRlConfig,
    model: DeScore,
    *,
    accumulation: int,
    clip_per_group: bool = False,
) -> DeepSpeedEngine:
    """Add LoRA to a reward model, build its engine, and prepare the model for it."""
    from engine.deepspeed import build_engine

    # LoRA is added here, so the engine must be built afterwards.
    groups = model.param_groups(
        run.lr,
        lora=run.lora,
        weight_decay=settings.weight_decay,
        seed=run.seed,
    )
    if run.gradient_checkpointing:
        enable_checkpointing(model)
    engine = build_engine(
        model,
        groups,
        optimizer=run.optimizer,
        zero_stage=run.zero_stage,
        accumulation=accumulation,
        dtype=run.dtype,
        clip_per_group=clip_per_group,
        overrides=run.deepspeed,
    )
    if run.zero_stage == 3:
        shard_reward_model(model)
    return engine


def loop_options(
    run: ColdStartRun | DualRlRun,
    settings: ColdStartConfig | DualRlConfig,
    model: DeScore,
    pairs: list[Pair],
    engine: DeepSpeedEngine,
) -> dict[str, Any]:
    """Return the arguments that the loops of both stages share."""
    from engine.skip_nonfinite import SkipNonFinite
    from rm.data import PairSchedule

    per_step = settings.pairs_per_step
    return {
        "cfg": settings,
        "model": model,
        "engine": SkipNonFinite(engine, patience=run.max_nonfinite_updates),
        "pairs": pairs,
        "schedule": PairSchedule(len(pairs), pairs_per_step=per_step, seed=run.seed),
        "seed": run.seed,
    }


def enable_checkpointing(model: DeScore) -> None:
    """Switch on gradient checkpointing of the backbone."""
    # transformers is renaming the method.
    backbone = model.backbone
    if hasattr(backbone, "activation_checkpointing_enable"):
        enable = backbone.activation_checkpointing_enable
    else:
        enable = backbone.gradient_checkpointing_enable
    # Reentrant checkpointing drops gradients above frozen embeddings.
    enable({"use_reentrant": False})


def shard_reward_model(model: DeScore) -> None:
    """Prepare a reward model for ZeRO 3, after its engine is built.

    The query's row is gathered with the embedding, whose hook puts it in.
    """
    from deepspeed.runtime.zero import register_external_parameter

    register_external_parameter(model.backbone.get_input_embeddings(), model.query)
    model.sharded = True


def reward_model_task(
    run: ColdStartRun | DualRlRun,
    loop: ColdStart | DualRl,
    heldout: list[Pair],
    *,
    label: str,
    steps: int,
) -> TrainingTask:
    """Describe a run of a stage to the training loop."""
    from engine.trainer import StepReport, TrainingTask, no_metrics
    from launch.next_recipe import next_recipe
    from launch.planning.first_estimate import expect_step

    def evaluate() -> dict[str, float]:
        with saved_head(loop.model):
            return loop.evaluate(heldout)

    expect_step(run)
    # Stage 2 follows stage 1, and a comparison with people follows stage 2.
    checkpoint = f"checkpoint={run.run_dir}/final"
    stage_2 = (
        f"deepspeed launch/dual_rl.py --config {next_recipe('dual_rl')} {checkpoint} "
        "data.train=PAIRS.csv"
    )
    evaluation = (
        f"python launch/evaluate.py rm --config {next_recipe('evaluate_rm')} "
        f"{checkpoint} pairs=FILE"
    )
    return TrainingTask(
        next_command=stage_2 if label == "cold start" else evaluation,
        label=label,
        steps=steps,
        engine=loop.engine,
        step=lambda number: StepReport(loop.step(number)),
        export=lambda: export_reward_model(loop.model, Path(run.run_dir)),
        measure_after=evaluate if heldout else no_metrics,
        measure_every=run.eval_every,
    )


@contextmanager
def saved_head(model: DeScore) -> Iterator[None]:
    """Run a bfloat16 model with the fp32 head that is saved, so that this head is measured.

    The module's head is a rounding of the optimizer's. All other weights of final/, loaded in
    bfloat16, are the module's to the bit. All ranks call it.
    """
    import torch

    trained = model.head
    if trained.weight.dtype == torch.float32 or not trained.weight.requires_grad:
        yield
        return
    from deepspeed.utils import safe_get_full_fp32_param

    from rm.model import Head

    # A new module: under ZeRO 3 the trained one is gathered and split by hooks.
    weight_KD = safe_get_full_fp32_param(trained.weight).detach().clone()
    rewards, width = weight_KD.shape
    model.head = Head(width, rewards, bias=False, device="meta")
    model.head.weight = torch.nn.Parameter(weight_KD, requires_grad=False)
    try:
        yield
    finally:
        model.head = trained


def export_reward_model(model: DeScore, run_dir: Path) -> None:
    """Write the reward model to final/. All ranks call it."""
    from common.distributed import is_main
    from common.log import say
    from engine.zero3 import whole_state

    # The whole model, with its trained weights in fp32.
    weights = whole_state(model)
    if is_main():
        weights |= fp32_weights(run_dir)
        model.save(run_dir / "final", weights)
        say(f"done: {run_dir / 'final'} holds the reward model")


def fp32_weights(run_dir: Path) -> dict[str, Tensor]:
    """Return the trained fp32 weights of the newest checkpoint.

    In a bfloat16 run the module holds roundings of them, coarser than many steps.
    """
    from common.checkpoint import latest
    from engine.state import load_weights

    newest = latest(run_dir / "checkpoints")
    if newest is None:
        raise FileNotFoundError(f"{run_dir / 'checkpoints'} holds no whole checkpoint")
    return load_weights(newest)
