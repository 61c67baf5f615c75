"""DeScore, stage 2: reinforce the chains of thought and keep the score calibrated, at once.

    deepspeed launch/dual_rl.py --config configs/wan/dual_rl.yaml checkpoint=runs/wan/descore/final

torchrun and plain python work too. The run folder gets config.yaml, metrics.jsonl, checkpoints/ and final/, a folder
that `DeScoreScorer.load` reads; started again, a run goes on from its newest checkpoint.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from launch.command import read_command
from launch.judge_runs import judge_engine, read_tables, run_steps, to_device, usable
from launch.refuse import refusing
from launch.runs import DualRlRun

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from launch.guard import Guard
    from rm.chain_writer import ChainWriter
    from rm.data import Pair
    from rm.dual_rl import DualRl
    from rm.model import DeScore


def main() -> None:
    command = read_command(DualRlRun, description=__doc__.splitlines()[0])
    train(command.cfg, resume=command.resume)


def train(cfg: DualRlRun, *, resume: str) -> None:
    """The whole run, see `go`, under a guard."""
    from launch.compose import quiet

    quiet()
    from launch.guard import guarded

    pairs, heldout = read(cfg)
    with guarded(cfg) as guard:
        go(cfg, pairs, heldout, guard, resume=resume)


def go(cfg: DualRlRun, pairs: list[Pair], heldout: list[Pair], guard: Guard, *, resume: str) -> None:
    """Build, go on where the run was, one `DualRl.step` after the other, save."""
    from common import distributed
    from common.log import say

    pairs, heldout = usable(cfg, pairs, heldout)
    with refusing():
        loop, engine = build(cfg, pairs)
    dual, ranks = cfg.dual_rl, distributed.world_size()
    say(
        f"one step = {dual.pairs_per_step} pairs x 2 videos x {dual.group_size} chains of thought, then "
        f"{dual.pairs_per_step // dual.pairs_per_update} updates of {dual.pairs_per_update} pairs, on "
        f"{ranks} ranks x {loop.accumulation} backwards of {dual.micro_batch} pairs; {len(pairs)} pairs"
    )
    with closing(loop.writer):
        run_steps(
            cfg,
            model=loop.model,
            engine=engine,
            careful=loop.engine,
            steps=dual.steps,
            step_of=loop.step,
            evaluate=(lambda: loop.evaluate(heldout, loop.model.generation)) if heldout else None,
            label="dual RL",
            guard=guard,
            resume=resume,
        )


def read(cfg: DualRlRun) -> tuple[list[Pair], list[Pair]]:
    """Training pairs with the right scores, ties included (their chains are rewarded too), and held-out pairs."""
    train_table, heldout = read_tables(cfg, require_cot=False, require_scores=True)
    return list(train_table.pairs), heldout


def build(cfg: DualRlRun, pairs: list[Pair]) -> tuple[DualRl, DeepSpeedEngine]:
    """Everything a run is made of, on this rank. Raises ValueError when ranks cannot share an update evenly."""
    from common.distributed import world_size
    from launch.careful import CarefulEngine
    from launch.zero3 import shard_frozen, shard_judge
    from rm.data import PairSchedule
    from rm.dual_rl import DualRl, backwards_per_update

    accumulation = backwards_per_update(cfg.dual_rl, world_size())
    model = load(cfg)
    writer = build_writer(cfg, model)
    groups = model.param_groups(cfg.lr, lora=cfg.lora, weight_decay=cfg.dual_rl.weight_decay, seed=cfg.seed)
    reference = None
    if cfg.lora is None and cfg.dual_rl.kl_weight > 0:
        reference = load(cfg).requires_grad_(requires_grad=False)
        if cfg.zero_stage == 3:
            shard_frozen(reference, dtype=cfg.dtype, overrides=cfg.deepspeed)
            shard_judge(reference)
    engine = judge_engine(cfg, model, groups, accumulation=accumulation, clip_parts=True)
    dual = cfg.dual_rl
    loop = DualRl(
        dual,
        rules=cfg.rules,
        model=model,
        engine=CarefulEngine(engine, patience=cfg.max_not_finite),
        pairs=pairs,
        schedule=PairSchedule(len(pairs), pairs_per_step=dual.pairs_per_step, seed=cfg.seed),
        seed=cfg.seed,
        reference=reference,
        writer=writer,
        grad_norms=engine.client_optimizer.take_norms,
    )
    return loop, engine


def build_writer(cfg: DualRlRun, model: DeScore) -> ChainWriter:
    """This rank's own; ValueError or FileNotFoundError when the judge or its settings do not suit it."""
    if cfg.writer.engine == "vllm":
        from rm.vllm_writer import VllmWriter

        return VllmWriter(cfg.writer, model)
    from rm.chain_writer import HfWriter

    return HfWriter(model, batch=2 * cfg.dual_rl.micro_batch)


def load(cfg: DualRlRun) -> DeScore:
    """What stage 1 wrote, or a new judge on a plain Qwen3-VL, on this rank's device."""
    import torch

    from rm.model import DESCORE_FILE, DeScore

    dtype = getattr(torch, cfg.dtype)
    if (Path(cfg.checkpoint) / DESCORE_FILE).is_file():
        model = DeScore.load(cfg.checkpoint, dtype=dtype)
    else:
        model = DeScore.from_base(cfg.checkpoint, dtype=dtype, seed=cfg.seed)
    if cfg.generation is not None:
        model.generation = cfg.generation
    return to_device(model)


if __name__ == "__main__":
    main()
