"""DeScore, stage 2: reinforce the chains of thought while the score stays calibrated.

    deepspeed launch/dual_rl.py --config configs/wan/dual_rl.yaml checkpoint=runs/wan/descore/final

torchrun and plain python work too. The run folder gets config.yaml, metrics.jsonl,
checkpoints/ and final/, a folder that `DeScoreScorer.load` reads. Started again, a run
resumes from its newest whole checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import user_errors
from launch.command import train_command
from launch.schemas.training import DualRlRun
from launch.training.rm_data import read_tables, usable_pairs
from launch.training.rm_runs import (
    build_rm_engine,
    loop_options,
    reward_model_task,
    shard_reward_model,
)

if TYPE_CHECKING:
    from engine.trainer import TrainingTask
    from rm.cot_backend import CotBackend
    from rm.data import Pair
    from rm.dual_rl import DualRl
    from rm.model import DeScore


def main() -> None:
    train_command(
        DualRlRun,
        description=__doc__,
        read_input=read_pairs_to_train,
        build_task=build_task,
    )


def read_pairs_to_train(run: DualRlRun) -> tuple[list[Pair], list[Pair]]:
    """Read training and held-out pairs; exit with code 2 if a table is wrong."""
    # Ties stay: their chains of thought are rewarded too.
    table, heldout = read_tables(run, require_cot=False, require_scores=True)
    return list(table.pairs), heldout


def build_task(run: DualRlRun, pairs: list[Pair], heldout: list[Pair]) -> TrainingTask:
    """Build everything and describe the run to the training loop."""
    from common import distributed
    from common.log import say
    from common.schedule import describe_draws
    from common.updates import backwards_on_rank

    # Leave out videos that cannot be decoded, then build.
    pairs, heldout = usable_pairs(run, pairs, heldout)
    settings = run.dual_rl
    per_update = settings.pairs_per_update
    with user_errors():
        accumulation = backwards_on_rank(
            "dual_rl.pairs_per_update", per_update, settings.micro_batch
        )
        loop = build(run, pairs, accumulation)
    # Tell how large a step is.
    updates = settings.pairs_per_step // per_update
    say(
        f"one step = {settings.pairs_per_step} pairs x 2 videos x {settings.group_size} chains "
        f"of thought, then {updates} updates of {per_update} pairs, on "
        f"{distributed.world_size()} ranks x {accumulation} backwards of "
        f"{settings.micro_batch} pairs; {len(pairs)} pairs"
    )
    uneven = describe_draws(
        len(pairs), per_step=settings.pairs_per_step, steps=settings.steps
    )
    if uneven:
        say(uneven)
    return reward_model_task(run, loop, heldout, label="dual RL", steps=settings.steps)


def build(run: DualRlRun, pairs: list[Pair], accumulation: int) -> DualRl:
    """Build the models, the engine and the loop on this rank."""
    from rm.dual_rl import DualRl

    model = load_reward_model(run)
    backend = build_backend(run, model)
    reference = build_reference(run)
    # Each group of weights is clipped by its norm (see engine/optimizer.py).
    engine = build_rm_engine(
        run,
        run.dual_rl,
        model,
        accumulation=accumulation,
        clip_per_group=True,
    )
    return DualRl(
        **loop_options(run, run.dual_rl, model, pairs, engine),
        rules=run.rules,
        reference=reference,
        backend=backend,
        grad_norms=engine.client_optimizer.take_norms,
    )


def build_backend(run: DualRlRun, model: DeScore) -> CotBackend | None:
    """Build this rank's backend that samples the chains of thought; None is the model itself.

    Raises ValueError or FileNotFoundError if vLLM or the model do not suit.
    """
    if run.dual_rl.engine == "builtin":
        return None
    from rm.vllm.client import VllmBackend

    return VllmBackend(run.vllm, model)


def build_reference(run: DualRlRun) -> DeScore | None:
    """Load the frozen reference, or None where LoRA off is the reference or none is needed."""
    from engine.deepspeed import shard_frozen

    if run.lora is not None or run.dual_rl.kl_weight == 0:
        return None
    reference = load_reward_model(run).requires_grad_(requires_grad=False)
    if run.zero_stage == 3:
        shard_frozen(reference, dtype=run.dtype, overrides=run.deepspeed)
        shard_reward_model(reference)
    return reference


def load_reward_model(run: DualRlRun) -> DeScore:
    """Load the reward model of stage 1, or put a new head on a plain Qwen3-VL."""
    import torch

    from common.memory import default_device
    from rm.model import DESCORE_FILE, DeScore

    dtype = getattr(torch, run.dtype)
    if (Path(run.checkpoint) / DESCORE_FILE).is_file():
        model = DeScore.load(run.checkpoint, dtype=dtype)
    else:
        model = DeScore.from_base(run.checkpoint, dtype=dtype, seed=run.seed)
    # The run's settings override those of the checkpoint.
    if run.generation is not None:
        model.generation = run.generation
    return model.to(default_device())


if __name__ == "__main__":
    main()
