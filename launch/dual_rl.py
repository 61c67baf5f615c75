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
from launch.command import read_command
from launch.schemas.training import DualRlRun
from launch.training.inputs import with_inputs
from launch.training.rm_data import read_tables, usable_pairs
from launch.training.rm_runs import (
    build_rm_engine,
    reward_model_task,
    shard_reward_model,
)

if TYPE_CHECKING:
    from engine.trainer import TrainingTask
    from rm.data import Pair
    from rm.dual_rl import DualRl
    from rm.model import DeScore


def main() -> None:
    command = read_command(DualRlRun, description=__doc__.splitlines()[0])
    train(command.cfg, resume=command.resume)


def train(run: DualRlRun, *, resume: str) -> None:
    """Read the pairs, build everything and train."""
    from launch.compose import quiet

    quiet()
    from engine.trainer import run_training

    # Ties stay: their chains of thought are rewarded too.
    table, heldout = read_tables(run, require_cot=False, require_scores=True)
    pairs = list(table.pairs)
    build_recorded = with_inputs(run, lambda: build_task(run, pairs, heldout))
    run_training(run, build_recorded, resume=resume)


def build_task(run: DualRlRun, pairs: list[Pair], heldout: list[Pair]) -> TrainingTask:
    """Build everything and describe the run to the training loop."""
    from common import distributed
    from common.log import say
    from common.schedule import describe_draws

    # Leave out videos that cannot be decoded, then build.
    pairs, heldout = usable_pairs(run, pairs, heldout)
    with user_errors():
        loop = build(run, pairs)
    # Tell how large a step is.
    settings = run.dual_rl
    updates = settings.pairs_per_step // settings.pairs_per_update
    say(
        f"one step = {settings.pairs_per_step} pairs x 2 videos x {settings.group_size} chains "
        f"of thought, then {updates} updates of {settings.pairs_per_update} pairs, on "
        f"{distributed.world_size()} ranks x {loop.accumulation} backwards of "
        f"{settings.micro_batch} pairs; {len(pairs)} pairs"
    )
    uneven = describe_draws(
        len(pairs), per_step=settings.pairs_per_step, steps=settings.steps
    )
    if uneven:
        say(uneven)

    def evaluate() -> dict[str, float]:
        return loop.evaluate(heldout, loop.model.generation)

    return reward_model_task(
        run,
        loop,
        label="dual RL",
        steps=settings.steps,
        evaluate=evaluate if heldout else None,
    )


def build(run: DualRlRun, pairs: list[Pair]) -> DualRl:
    """Build the loop on this rank. Raises ValueError if ranks cannot share an update's pairs."""
    from common.distributed import world_size
    from engine.skip_nonfinite import SkipNonFinite
    from rm.data import PairSchedule
    from rm.dual_rl import DualRl, backwards_per_update

    # Models. LoRA draws its first values in param_groups.
    settings = run.dual_rl
    accumulation = backwards_per_update(settings, world_size())
    model = load_reward_model(run)
    groups = model.param_groups(
        run.lr, lora=run.lora, weight_decay=settings.weight_decay, seed=run.seed
    )
    reference = build_reference(run)

    # Engine and loop. Each group is clipped by its norm (see engine/optimizer.py).
    engine = build_rm_engine(
        run, model, groups, accumulation=accumulation, clip_per_group=True
    )
    return DualRl(
        settings,
        rules=run.rules,
        model=model,
        engine=SkipNonFinite(engine, patience=run.max_nonfinite_updates),
        pairs=pairs,
        schedule=PairSchedule(
            len(pairs), pairs_per_step=settings.pairs_per_step, seed=run.seed
        ),
        seed=run.seed,
        reference=reference,
        grad_norms=engine.client_optimizer.take_norms,
    )


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

    from launch.compose import rank_device
    from rm.model import DESCORE_FILE, DeScore

    dtype = getattr(torch, run.dtype)
    if (Path(run.checkpoint) / DESCORE_FILE).is_file():
        model = DeScore.load(run.checkpoint, dtype=dtype)
    else:
        model = DeScore.from_base(run.checkpoint, dtype=dtype, seed=run.seed)
    # The run's settings override those of the checkpoint.
    if run.generation is not None:
        model.generation = run.generation
    return model.to(rank_device())


if __name__ == "__main__":
    main()
