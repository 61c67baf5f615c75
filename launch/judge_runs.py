"""What the two stages of DeScore's training share around their steps: tables in, the run, a judge out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.refuse import refuse

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

    from launch.careful import CarefulEngine
    from launch.guard import Guard
    from launch.runs import ColdStartRun, DualRlRun
    from rm.data import Pair, PairTable
    from rm.model import DeScore


def read_tables(cfg: ColdStartRun | DualRlRun, **options: Any) -> tuple[PairTable, list[Pair]]:
    """The training table up to its limit and the first held-out pairs; exit with code 2 when a table is not usable.

    options  go to `rm.data.read_pairs`, of the descore layout
    """
    from common.log import say
    from rm.benchmarks import read_benchmark
    from rm.data import read_pairs

    def table(path: str) -> PairTable:
        if cfg.data.layout == "descore":
            return read_pairs(path, **options)
        return read_benchmark(path, cfg.data.layout, dimension="Overall", videos=cfg.data.videos)

    tables = []
    for path in (cfg.data.train, cfg.data.heldout):
        try:
            tables.append(table(path) if path is not None else None)
        except ValueError as error:
            refuse(str(error))
        if tables[-1] is not None:
            say(tables[-1].report())
            if problem := too_bad(tables[-1], cfg.data.max_bad):
                refuse(problem)
    train_table, heldout_table = tables
    if cfg.data.limit is not None:
        train_table = replace(train_table, pairs=train_table.pairs[: cfg.data.limit])
        say(f"training on the first {len(train_table.pairs)} pairs")
    return train_table, list(heldout_table.pairs[: cfg.heldout_pairs]) if heldout_table else []


def too_bad(table: PairTable, share: float) -> str:
    """What is said of a table with more bad rows than this share of all; nothing of a better one."""
    bad, rows = len(table.problems), len(table.problems) + len(table.pairs) + table.invalid
    if bad <= share * rows:
        return ""
    return f"{table.path}: {bad} of {rows} rows are bad, more than data.max_bad={share:g} of them: {table.problems[0]}"


def usable(cfg: ColdStartRun | DualRlRun, pairs: list[Pair], heldout: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """The pairs, and the held-out ones, whose videos can be decoded; the others go to run_dir/bad_samples.jsonl. All
    ranks call it and share the work. Exit with code 2 when more than ``data.max_bad`` of either are bad, or all are.
    """
    from common import distributed
    from common.files import replace_text
    from common.log import say
    from rm.video_check import split_pairs

    if not cfg.data.check_videos:
        return pairs, heldout
    files = sorted({file for pair in [*pairs, *heldout] for file in (pair.video_A, pair.video_B)})
    bad = checked(files, cfg.run_dir)
    sets = {name: (part, *split_pairs(part, bad)) for name, part in (("pairs", pairs), ("held-out pairs", heldout))}
    lines = [{"of": name, **record} for name, (_, _, records) in sets.items() for record in records]
    out = Path(cfg.run_dir) / "bad_samples.jsonl"
    if lines and distributed.is_main():
        replace_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for name, (part, sound, records) in sets.items():
        if records:
            say(f"{len(records)} of {len(part)} {name} have a video that cannot be decoded and are left out, see {out}")
        if part and (not sound or len(records) > cfg.data.max_bad * len(part)):
            refuse(f"{len(records)} of {len(part)} {name} are more than data.max_bad={cfg.data.max_bad:g} of them")
    return sets["pairs"][1], sets["held-out pairs"][1]


def checked(files: list[Path], run_dir: str) -> dict[Path, str]:
    """The files that cannot be decoded, and why. A run that is started again, with the same files as they were, knows
    it from its folder.
    """
    from common import distributed
    from common.files import replace_text
    from common.log import say
    from rm.video_check import bad_videos, stamp

    kept = Path(run_dir) / "checked_videos.json"
    now, known = None, None
    if distributed.is_main():
        now = stamp(files)
        known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
    bad = distributed.from_main(known["bad"] if known and known["stamp"] == now else None)
    if bad is None:
        say(f"decoding {len(files)} videos once, before anything is trained on them")
        found = distributed.gather_objects(bad_videos(files[distributed.rank() :: distributed.world_size()]))
        bad = {str(file): why for one in found for file, why in one.items()}
        if distributed.is_main():
            replace_text(kept, json.dumps({"stamp": now, "bad": bad}, indent=1, ensure_ascii=False) + "\n")
    return {Path(file): why for file, why in bad.items()}


def run_steps(
    cfg: ColdStartRun | DualRlRun,
    *,
    model: DeScore,
    engine: DeepSpeedEngine,
    careful: CarefulEngine,
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
    from launch.engine_state import begin, save_engine, save_step

    run_dir = Path(cfg.run_dir)
    start = begin(cfg, engine, resume)
    log = RunLog(run_dir, start=start, wandb=cfg.wandb, tensorboard=cfg.tensorboard, total=steps)
    guard.begin()
    for step in progress(range(start, steps), steps - start, label):
        metrics = {**step_of(step), "train/not_finite": careful.take_skipped(), **peak_memory()}
        faults.point("step")
        last = step + 1 == steps
        if evaluate is not None and (last or (cfg.eval_every and (step + 1) % cfg.eval_every == 0)):
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


def judge_engine(
    cfg: ColdStartRun | DualRlRun,
    model: DeScore,
    groups: list[dict[str, Any]],
    *,
    accumulation: int,
    clip_parts: bool = False,
) -> DeepSpeedEngine:
    """The engine of a judge, which knows afterwards whether its weights are sharded."""
    from launch.compose import build_engine
    from launch.zero3 import shard_judge

    if cfg.gradient_checkpointing:
        enable_checkpointing(model)
    engine = build_engine(
        model,
        groups,
        optimizer=cfg.optimizer,
        zero_stage=cfg.zero_stage,
        accumulation=accumulation,
        dtype=cfg.dtype,
        clip_parts=clip_parts,
        overrides=cfg.deepspeed,
    )
    if cfg.zero_stage == 3:
        shard_judge(model)
    return engine


def enable_checkpointing(model: DeScore) -> None:
    """Gradient checkpointing of the backbone."""
    backbone = model.backbone  # transformers is renaming the method
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # the other kind drops gradients above frozen embeddings


def to_device(model: DeScore) -> DeScore:
    """On this rank's GPU, or the CPU."""
    import torch

    return model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")


def weights_of(model: DeScore, run_dir: Path) -> dict[str, Tensor]:
    """The module's weights, the trained ones in the engine's fp32 as the last checkpoint has them; {} but on rank 0.

    In a bfloat16 run the module's own are roundings of those, coarser than many of its steps. All ranks call it.
    """
    from common.checkpoint import latest, load_tensors
    from common.distributed import is_main
    from launch.engine_state import FILE
    from launch.zero3 import whole_state

    state = whole_state(model)
    if not is_main():
        return {}
    found = latest(run_dir / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"{run_dir / 'checkpoints'} holds no whole checkpoint")
    trained = {name: x for name, x in load_tensors(found / FILE).items() if name.startswith("weight.")}
    return {**state, **{name.removeprefix("weight."): x for name, x in trained.items()}}
