"""DeScore, stage 1: train a reward model on preference pairs.

    deepspeed launch/cold_start.py --config configs/wan/cold_start.yaml data.train=pairs/train.csv

torchrun and plain python work too. The run folder gets config.yaml, metrics.jsonl,
checkpoints/ and final/, a folder that `DeScoreScorer.load` and any stock Qwen3-VL loader
read. Started again, a run resumes from its newest whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from common.cli import exit_with_error, user_errors
from launch.command import read_command
from launch.schemas.training import ColdStartRun
from launch.training.inputs import with_inputs
from launch.training.rm_data import read_tables, usable_pairs
from launch.training.rm_runs import build_rm_engine, reward_model_task

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from engine.trainer import TrainingTask
    from rm.cold_start import ColdStart
    from rm.data import Pair
    from rm.model import DeScore


def main() -> None:
    command = read_command(ColdStartRun, description=__doc__.splitlines()[0])
    train(command.cfg, resume=command.resume)


def train(run: ColdStartRun, *, resume: str) -> None:
    """Read the pairs, build everything and train."""
    from launch.compose import quiet

    quiet()
    from engine.trainer import run_training

    pairs, heldout = read_pairs_to_train(run)
    build_recorded = with_inputs(run, lambda: build_task(run, pairs, heldout))
    run_training(run, build_recorded, resume=resume)


def read_pairs_to_train(run: ColdStartRun) -> tuple[list[Pair], list[Pair]]:
    """Read training and held-out pairs; exit with code 2 if a table is wrong."""
    # Chains of thought that are always masked need not be there.
    needs_cot = run.cold_start.masking.probability < 1
    table, heldout = read_tables(
        run, require_cot=needs_cot, dimensions=list(run.dimensions)
    )
    if run.cold_start.theta is not None:
        return list(table.pairs), heldout

    # Plain Bradley-Terry learns nothing from ties, which would make steps smaller.
    pairs = [pair for pair in table.pairs if is_decided(pair, run.dimensions)]
    if not pairs:
        exit_with_error(f"{table.path}: holds only ties, which need cold_start.theta")
    return pairs, heldout


def is_decided(pair: Pair, dimensions: Iterable[str]) -> bool:
    """Return True if one video is preferred in some dimension."""
    return any(pair.label_in(name) in (1, -1) for name in dimensions)


def build_task(
    run: ColdStartRun, pairs: list[Pair], heldout: list[Pair]
) -> TrainingTask:
    """Build everything and describe the run to the training loop."""
    from common import distributed
    from common.log import say
    from common.schedule import describe_draws
    from engine.zero3 import elements

    # Leave out videos that cannot be decoded, then build.
    pairs, heldout = usable_pairs(run, pairs, heldout)
    with user_errors():
        loop = build(run, pairs)
    # Tell how large an update is.
    settings = run.cold_start
    steps = loop.schedule.steps(settings.epochs)
    trained = elements(p for p in loop.model.parameters() if p.requires_grad)
    say(
        f"one update = {settings.pairs_per_step} pairs, on {distributed.world_size()} ranks x "
        f"{loop.accumulation} backwards of {settings.micro_batch} pairs; {len(pairs)} pairs, "
        f"{settings.epochs:g} epochs = {steps} updates; training {trained:,} parameters"
    )
    uneven = describe_draws(
        len(pairs),
        per_step=settings.pairs_per_step,
        steps=steps,
        epochs=settings.epochs,
    )
    if uneven:
        say(uneven)
    evaluate = (lambda: loop.evaluate(heldout)) if heldout else None
    return reward_model_task(
        run, loop, label="cold start", steps=steps, evaluate=evaluate
    )


def build(run: ColdStartRun, pairs: list[Pair]) -> ColdStart:
    """Build the loop on this rank. Raises ValueError if ranks cannot share a step's pairs."""
    from common.distributed import world_size
    from rm.cold_start import backwards_per_step

    accumulation = backwards_per_step(run.cold_start, world_size())
    loop, _ = loop_of(run, pairs, build_reward_model(run), accumulation=accumulation)
    return loop


def loop_of(
    run: ColdStartRun, pairs: list[Pair], model: DeScore, *, accumulation: int
) -> tuple[ColdStart, DeepSpeedEngine]:
    """Build the loop and the engine around a reward model."""
    from engine.skip_nonfinite import SkipNonFinite
    from rm.cold_start import ColdStart
    from rm.data import PairSchedule

    # LoRA is added here, so the engine must be built afterwards.
    groups = model.param_groups(
        run.lr, lora=run.lora, weight_decay=run.cold_start.weight_decay, seed=run.seed
    )
    engine = build_rm_engine(run, model, groups, accumulation=accumulation)
    loop = ColdStart(
        run.cold_start,
        model=model,
        engine=SkipNonFinite(engine, patience=run.max_nonfinite_updates),
        pairs=pairs,
        schedule=PairSchedule(
            len(pairs), pairs_per_step=run.cold_start.pairs_per_step, seed=run.seed
        ),
        seed=run.seed,
        grad_norm=engine.get_global_grad_norm,
    )
    return loop, engine


def build_reward_model(run: ColdStartRun) -> DeScore:
    """Put a new DeScore on the base model, on this rank's device."""
    import torch

    from launch.compose import rank_device
    from rm.model import DeScore
    from rm.prompt import PromptTemplate

    model = DeScore.from_base(
        run.base,
        template=None if run.template is None else PromptTemplate.load(run.template),
        settings=run.video,
        generation=run.generation,
        dimensions=run.dimensions,
        dtype=getattr(torch, run.dtype),
        seed=run.seed,
    )
    return model.to(rank_device())


if __name__ == "__main__":
    main()
