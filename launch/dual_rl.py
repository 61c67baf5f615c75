"""DeScore, stage 2: reinforce the chains of thought and keep the score calibrated, at once.

    deepspeed launch/dual_rl.py --config configs/wan/dual_rl.yaml checkpoint=runs/wan/descore/final

torchrun and plain python work too. The run folder gets config.yaml, metrics.jsonl, checkpoints/ and final/, a folder
that `DeScoreScorer.load` reads; started again, a run goes on from its newest checkpoint.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import user_errors
from launch.command import read_command
from launch.rm_data import read_tables, usable
from launch.rm_runs import build_rm_engine, run_steps, to_device
from launch.schemas.training import DualRlRun

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from engine.guard import Guard
    from rm.cot_backend import CotBackend
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
    from engine.guard import guarded

    pairs, heldout = read(cfg)
    with guarded(cfg) as guard:
        go(cfg, pairs, heldout, guard, resume=resume)


def go(
    cfg: DualRlRun, pairs: list[Pair], heldout: list[Pair], guard: Guard, *, resume: str
) -> None:
    """Build, go on where the run was, one `DualRl.step` after the other, save."""
    from common import distributed
    from common.log import say

    pairs, heldout = usable(cfg, pairs, heldout)
    with user_errors():
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
            evaluate=(lambda: loop.evaluate(heldout, loop.model.generation))
            if heldout
            else None,
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
    from engine.deepspeed import shard_frozen
    from engine.skip_nonfinite import SkipNonFinite
    from launch.rm_runs import shard_reward_model
    from rm.data import PairSchedule
    from rm.dual_rl import DualRl, backwards_per_update

    accumulation = backwards_per_update(cfg.dual_rl, world_size())
    model = load(cfg)
    writer = build_writer(cfg, model)
    groups = model.param_groups(
        cfg.lr, lora=cfg.lora, weight_decay=cfg.dual_rl.weight_decay, seed=cfg.seed
    )
    reference = None
    if cfg.lora is None and cfg.dual_rl.kl_weight > 0:
        reference = load(cfg).requires_grad_(requires_grad=False)
        if cfg.zero_stage == 3:
            shard_frozen(reference, dtype=cfg.dtype, overrides=cfg.deepspeed)
            shard_reward_model(reference)
    engine = build_rm_engine(
        cfg, model, groups, accumulation=accumulation, clip_per_group=True
    )
    dual = cfg.dual_rl
    loop = DualRl(
        dual,
        rules=cfg.rules,
        model=model,
        engine=SkipNonFinite(engine, patience=cfg.max_nonfinite_updates),
        pairs=pairs,
        schedule=PairSchedule(
            len(pairs), pairs_per_step=dual.pairs_per_step, seed=cfg.seed
        ),
        seed=cfg.seed,
        reference=reference,
        writer=writer,
        grad_norms=engine.client_optimizer.take_norms,
    )
    return loop, engine


def build_writer(cfg: DualRlRun, model: DeScore) -> CotBackend:
    """This rank's own; ValueError or FileNotFoundError when the judge or its settings do not suit it."""
    if cfg.cot_backend.kind == "vllm":
        from rm.vllm.client import VllmBackend

        return VllmBackend(cfg.cot_backend, model)
    from rm.cot_backend import HfBackend

    return HfBackend(model, batch=2 * cfg.dual_rl.micro_batch)


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
