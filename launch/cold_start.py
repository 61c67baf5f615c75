"""DeScore, stage 1: train a reward model on preference pairs.

    deepspeed launch/cold_start.py --config configs/wan/cold_start.yaml data.train=pairs/train.csv

torchrun and plain python work too. The run folder gets config.yaml, metrics.jsonl,
checkpoints/ and final/, a folder that `DeScoreScorer.load` and transformers' Qwen3-VL read;
in bfloat16 the trained LoRA lies in it unmerged. Started again, a run resumes from its newest
whole checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.cli import exit_with_error, user_errors
from common.files import require_model
from launch.command import train_command
from launch.schemas.training import ColdStartRun
from launch.training.rm_data import read_tables, usable_pairs
from launch.training.rm_runs import (
    build_rm_engine,
    loop_options,
    reward_model_task,
)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from engine.trainer import TrainingTask
    from rm.cold_start import ColdStart
    from rm.data import Pair
    from rm.model import DeScore


def main() -> None:
    train_command(
        ColdStartRun,
        description=__doc__,
        read_input=read_pairs_to_train,
        build_task=build_task,
    )


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
    pairs = []
    for pair in table.pairs:
        labels = {pair.label_in(name) for name in run.dimensions}
        if labels & {1, -1}:
            pairs.append(pair)
    if not pairs:
        exit_with_error(f"{table.path}: holds only ties, which need cold_start.theta")
    return pairs, heldout


def build_task(
    run: ColdStartRun, pairs: list[Pair], heldout: list[Pair]
) -> TrainingTask:
    """Build everything and describe the run to the training loop."""
    from common import distributed
    from common.log import say
    from common.schedule import describe_draws
    from common.updates import backwards_on_rank
    from engine.zero3 import elements

    # Check the batch before hours of decoding.
    settings = run.cold_start
    per_step = settings.pairs_per_step
    with user_errors():
        accumulation = backwards_on_rank(
            "cold_start.pairs_per_step", per_step, settings.micro_batch
        )
        _require_model(run)

    # Leave out videos that cannot be decoded, then build.
    pairs, heldout = usable_pairs(run, pairs, heldout)
    with user_errors():
        model = build_reward_model(run)
        loop, _ = loop_of(run, pairs, model, accumulation=accumulation)
    # Tell how large an update is.
    steps = loop.schedule.steps(settings.epochs)
    trained = elements(p for p in model.parameters() if p.requires_grad)
    say(
        f"one update = {per_step} pairs, on {distributed.world_size()} ranks x "
        f"{accumulation} backwards of {settings.micro_batch} pairs; {len(pairs)} pairs, "
        f"{settings.epochs:g} epochs = {steps} updates; training {trained:,} parameters"
    )
    uneven = describe_draws(
        len(pairs), per_step=per_step, steps=steps, epochs=settings.epochs
    )
    if uneven:
        say(uneven)
    return reward_model_task(run, loop, heldout, label="cold start", steps=steps)


def _require_model(run: ColdStartRun) -> None:
    """Raise FileNotFoundError, naming the key, for a model that is neither there nor on the hub."""
    key, name = "base", run.base
    if run.checkpoint is not None:
        key, name = "checkpoint", run.checkpoint
    try:
        require_model(name, "config.json")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}") from error


def loop_of(
    run: ColdStartRun, pairs: list[Pair], model: DeScore, *, accumulation: int
) -> tuple[ColdStart, DeepSpeedEngine]:
    """Build the loop and the engine around a reward model."""
    from rm.cold_start import ColdStart

    settings = run.cold_start
    engine = build_rm_engine(run, settings, model, accumulation=accumulation)
    shared = loop_options(run, settings, model, pairs, engine)
    return ColdStart(**shared, grad_norm=engine.get_global_grad_norm), engine


def build_reward_model(run: ColdStartRun) -> DeScore:
    """Put a new DeScore on the base model, or load the checkpoint, on this rank's device.

    Raises ValueError when the checkpoint has other dimensions than the run.
    """
    import torch

    from common.memory import default_device
    from rm.model import DeScore
    from rm.prompt import PromptTemplate

    dtype = getattr(torch, run.dtype)
    if run.checkpoint is not None:
        model = DeScore.load(run.checkpoint, dtype=dtype)
        if list(model.dimensions.items()) != list(run.dimensions.items()):
            raise ValueError(
                f"{run.checkpoint} has the dimensions {list(model.dimensions)}, with settings "
                "that differ from those of the run: give both the same"
            )
        model.generation = run.generation
        return model.to(default_device())
    model = DeScore.from_base(
        run.base,
        template=None if run.template is None else PromptTemplate.load(run.template),
        settings=run.video,
        generation=run.generation,
        dimensions=run.dimensions,
        dtype=dtype,
        seed=run.seed,
    )
    return model.to(default_device())


if __name__ == "__main__":
    main()
