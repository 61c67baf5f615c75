"""DeScore, stage 1: train a reward model on preference pairs.

    deepspeed launch/cold_start.py --config configs/wan/cold_start.yaml data.train=pairs/train.csv

torchrun and plain python work too. The run folder gets config.yaml, metrics.jsonl, checkpoints/ and final/, a folder
that `DeScoreScorer.load` and any stock Qwen3-VL loader read; started again, a run goes on from its newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from common.cli import exit_with_error, user_errors
from launch.command import read_command
from launch.rm_data import read_tables, usable
from launch.rm_runs import build_rm_engine, run_steps, to_device
from launch.schemas.training import ColdStartRun

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from engine.guard import Guard
    from rm.cold_start import ColdStart
    from rm.data import Pair
    from rm.model import DeScore


def main() -> None:
    command = read_command(ColdStartRun, description=__doc__.splitlines()[0])
    train(command.cfg, resume=command.resume)


def train(cfg: ColdStartRun, *, resume: str) -> None:
    """The whole run, see `go`, under a guard."""
    from launch.compose import quiet

    quiet()
    from engine.guard import guarded

    pairs, heldout = read(cfg)
    with guarded(cfg) as guard:
        go(cfg, pairs, heldout, guard, resume=resume)


def go(
    cfg: ColdStartRun,
    pairs: list[Pair],
    heldout: list[Pair],
    guard: Guard,
    *,
    resume: str,
) -> None:
    """Build, go on where the run was, one `ColdStart.step` after the other, save."""
    from common import distributed
    from common.log import say
    from engine.zero3 import elements

    pairs, heldout = usable(cfg, pairs, heldout)
    with user_errors():
        loop, engine = build(cfg, pairs)
    steps = loop.schedule.steps(cfg.cold_start.epochs)
    trained = elements(p for p in loop.model.parameters() if p.requires_grad)
    say(
        f"one update = {cfg.cold_start.pairs_per_step} pairs, on {distributed.world_size()} ranks x "
        f"{loop.accumulation} backwards of {cfg.cold_start.micro_batch} pairs; {len(pairs)} pairs, "
        f"{cfg.cold_start.epochs:g} epochs = {steps} updates; training {trained:,} parameters"
    )
    run_steps(
        cfg,
        model=loop.model,
        engine=engine,
        careful=loop.engine,
        steps=steps,
        step_of=loop.step,
        evaluate=(lambda: loop.evaluate(heldout)) if heldout else None,
        label="cold start",
        guard=guard,
        resume=resume,
    )


def read(cfg: ColdStartRun) -> tuple[list[Pair], list[Pair]]:
    """Training pairs, and the first held-out pairs; exit with code 2 when a table is not what it should be."""
    masked = (
        cfg.cold_start.masking.probability == 1
    )  # then no chain of thought is ever read
    train_table, heldout = read_tables(
        cfg, require_cot=not masked, dimensions=list(cfg.dimensions)
    )
    # plain Bradley-Terry learns nothing from a tie: with them a step would be smaller than pairs_per_step says
    pairs = [
        pair
        for pair in train_table.pairs
        if cfg.cold_start.theta is not None or decides(pair, cfg.dimensions)
    ]
    if not pairs:
        exit_with_error(
            f"{train_table.path}: holds nothing but ties, which need cold_start.theta"
        )
    return pairs, heldout


def decides(pair: Pair, dimensions: Iterable[str]) -> bool:
    """True if somebody preferred one of the two in some dimension."""
    return any(pair.label_in(name) in (1, -1) for name in dimensions)


def build(cfg: ColdStartRun, pairs: list[Pair]) -> tuple[ColdStart, DeepSpeedEngine]:
    """Everything a run is made of, on this rank. Raises ValueError when ranks cannot share a step evenly."""
    from common.distributed import world_size
    from rm.cold_start import backwards_per_step

    accumulation = backwards_per_step(cfg.cold_start, world_size())
    return loop_of(cfg, pairs, build_reward_model(cfg), accumulation=accumulation)


def loop_of(
    cfg: ColdStartRun, pairs: list[Pair], model: DeScore, *, accumulation: int
) -> tuple[ColdStart, DeepSpeedEngine]:
    """The loop around a judge that is there."""
    from engine.skip_nonfinite import SkipNonFinite
    from rm.cold_start import ColdStart
    from rm.data import PairSchedule

    groups = model.param_groups(
        cfg.lr, lora=cfg.lora, weight_decay=cfg.cold_start.weight_decay, seed=cfg.seed
    )
    engine = build_rm_engine(cfg, model, groups, accumulation=accumulation)
    schedule = PairSchedule(
        len(pairs), pairs_per_step=cfg.cold_start.pairs_per_step, seed=cfg.seed
    )
    loop = ColdStart(
        cfg.cold_start,
        model=model,
        engine=SkipNonFinite(engine, patience=cfg.max_nonfinite_updates),
        pairs=pairs,
        schedule=schedule,
        seed=cfg.seed,
        grad_norm=engine.get_global_grad_norm,
    )
    return loop, engine


def build_reward_model(cfg: ColdStartRun) -> DeScore:
    """A new DeScore on the base, on this rank's device."""
    import torch

    from rm.model import DeScore
    from rm.prompt import PromptTemplate

    model = DeScore.from_base(
        cfg.base,
        template=None if cfg.template is None else PromptTemplate.load(cfg.template),
        settings=cfg.video,
        generation=cfg.generation,
        dimensions=cfg.dimensions,
        dtype=getattr(torch, cfg.dtype),
        seed=cfg.seed,
    )
    return to_device(model)


if __name__ == "__main__":
    main()
