"""DeScore, stage 1: train a reward model on preference pairs.

    deepspeed launch/cold_start.py --config configs/wan/cold_start.yaml data.train=pairs/train.csv

torchrun and plain python work too. The run folder gets config.yaml, metrics.jsonl, checkpoints/ and final/, a folder
that `DeScoreScorer.load` and any stock Qwen3-VL loader read; started again, a run goes on from its newest checkpoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from common.config import dump, parse_command_line
from launch.runs import ColdStartRun

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

    from rm.cold_start import ColdStart
    from rm.data import Pair
    from rm.model import DeScore


def main() -> None:
    command = parse_command_line(ColdStartRun, description=__doc__.splitlines()[0])
    train(command.cfg, resume=command.resume)


def refuse(message: str) -> NoReturn:
    """What the user can mend needs no traceback."""
    if os.environ.get("RANK", "0") == "0":
        print(f"cold_start.py: {message}", file=sys.stderr)
    sys.exit(2)


def train(cfg: ColdStartRun, *, resume: str) -> None:
    """The whole run: build, go on where it was, one `ColdStart.step` after the other, save."""
    from launch.compose import quiet

    quiet()
    from common import distributed
    from common.log import RunLog, progress, say
    from launch.engine_state import go_on

    pairs, heldout = read(cfg)
    distributed.init_process_group()
    run_dir = Path(cfg.run_dir)
    if distributed.is_main():
        dump(cfg, run_dir)
    loop, engine = build(cfg, pairs)
    steps = loop.schedule.steps(cfg.cold_start.epochs)
    trained = sum(p.numel() for p in loop.model.parameters() if p.requires_grad)
    say(
        f"one update = {cfg.cold_start.pairs_per_step} pairs, on {distributed.world_size()} ranks x "
        f"{loop.accumulation} backwards of {cfg.cold_start.micro_batch} pairs; {len(pairs)} pairs, "
        f"{cfg.cold_start.epochs:g} epochs = {steps} updates; training {trained:,} parameters"
    )
    start = go_on(engine, resume, run_dir)
    log = RunLog(run_dir, wandb=cfg.wandb, total=steps)
    log.truncate(start)

    for step in progress(range(start, steps), steps - start, "cold start"):
        metrics = loop.step(step)
        last = step + 1 == steps
        if heldout and (last or (cfg.eval_every and (step + 1) % cfg.eval_every == 0)):
            metrics |= loop.evaluate(heldout)
        log.log(step, metrics)
        if last or (step + 1) % cfg.save_every == 0:
            save(engine, run_dir, step=step + 1, keep=cfg.keep)

    if distributed.is_main():
        loop.model.save(run_dir / "final", weights_of(loop.model, run_dir))
        say(f"done: {run_dir / 'final'} holds the reward model")
    log.close()
    distributed.barrier()
    distributed.shutdown()


def read(cfg: ColdStartRun) -> tuple[list[Pair], list[Pair]]:
    """Training pairs, and the first held-out pairs; exit with code 2 when a table is not what it should be."""
    from common.log import say
    from rm.data import read_pairs

    tables = []
    for path in (cfg.data.train, cfg.data.heldout):
        try:
            tables.append(read_pairs(path) if path is not None else None)
        except ValueError as error:
            refuse(str(error))
        if tables[-1] is not None:
            say(tables[-1].report())
    train_table, heldout_table = tables
    # plain Bradley-Terry learns nothing from a tie: with them a step would be smaller than pairs_per_step says
    pairs = [pair for pair in train_table.pairs if pair.label != 0 or cfg.cold_start.theta is not None]
    if not pairs:
        refuse(f"{train_table.path}: holds nothing but ties, which need cold_start.theta")
    return pairs, list(heldout_table.pairs[: cfg.heldout_pairs]) if heldout_table else []


def build(cfg: ColdStartRun, pairs: list[Pair]) -> tuple[ColdStart, DeepSpeedEngine]:
    """Everything a run is made of, on this rank; exit with code 2 when ranks cannot share a step evenly."""
    from common.distributed import world_size
    from launch.compose import build_engine
    from rm.cold_start import ColdStart, backwards_per_step
    from rm.data import PairSchedule

    try:
        accumulation = backwards_per_step(cfg.cold_start, world_size())
    except ValueError as error:
        refuse(str(error))
    model = build_judge(cfg)
    groups = model.param_groups(cfg.lr, lora=cfg.lora, weight_decay=cfg.cold_start.weight_decay, seed=cfg.seed)
    if cfg.gradient_checkpointing:
        backbone = model.backbone  # transformers is renaming the method
        enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # the other kind drops gradients above frozen embeddings
    engine = build_engine(
        model,
        groups,
        optimizer=cfg.optimizer,
        zero_stage=cfg.zero_stage,
        accumulation=accumulation,
        dtype=cfg.dtype,
        overrides=cfg.deepspeed,
    )
    schedule = PairSchedule(len(pairs), pairs_per_step=cfg.cold_start.pairs_per_step, seed=cfg.seed)
    loop = ColdStart(
        cfg.cold_start,
        model=model,
        engine=engine,
        pairs=pairs,
        schedule=schedule,
        seed=cfg.seed,
        grad_norm=engine.get_global_grad_norm,
    )
    return loop, engine


def build_judge(cfg: ColdStartRun) -> DeScore:
    """A new DeScore on the base, on this rank's device."""
    import torch

    from rm.model import DeScore
    from rm.prompt import PromptTemplate

    model = DeScore.from_base(
        cfg.base,
        template=None if cfg.template is None else PromptTemplate.load(cfg.template),
        settings=cfg.video,
        generation=cfg.generation,
        dtype=getattr(torch, cfg.dtype),
        seed=cfg.seed,
    )
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return model.to(device)


def save(engine: DeepSpeedEngine, run_dir: Path, *, step: int, keep: int) -> None:
    """checkpoints/step-N/engine.safetensors. All ranks call it."""
    from common import checkpoint
    from launch.engine_state import save_engine

    checkpoint.save(
        run_dir / "checkpoints", step, lambda folder: save_engine(engine, folder), keep=keep, state={"steps_done": step}
    )


def weights_of(model: DeScore, run_dir: Path) -> dict[str, Tensor]:
    """The module's weights, the trained ones in the engine's fp32 as the last checkpoint has them.

    In a bfloat16 run the module's own are roundings of those, coarser than many of its steps.
    """
    from common.checkpoint import latest, load_tensors
    from launch.engine_state import FILE

    found = latest(run_dir / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"{run_dir / 'checkpoints'} holds no whole checkpoint")
    trained = {name: x for name, x in load_tensors(found / FILE).items() if name.startswith("weight.")}
    return {**model.state_dict(), **{name.removeprefix("weight."): x for name, x in trained.items()}}


if __name__ == "__main__":
    main()
