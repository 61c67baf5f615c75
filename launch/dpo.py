"""Flow-DPO, Flow-RWR or fine-tuning of a Wan generator on pairs of latents.

    deepspeed --num_accelerators 2 launch/dpo.py --config configs/wan/dpo.yaml pairs=data/pairs

launch/pairs.py writes the pairs. torchrun and plain python work too. The run folder gets
config.yaml, metrics.jsonl, checkpoints/ and final/, the trained adapter. Started again, a run
resumes from its newest whole checkpoint. Neither VAE nor text encoder is loaded, unless
``refresh`` makes new pairs on the way.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from common.cli import user_errors
from launch.command import train_command
from launch.schemas.pairs import DpoRun

if TYPE_CHECKING:
    from alignment.pair_store import PairSet
    from engine.trainer import TrainingTask


def main() -> None:
    train_command(
        DpoRun, description=__doc__, read_input=read_input, build_task=build_task
    )


def read_input(run: DpoRun) -> tuple[PairSet, PairSet | None]:
    """Read training and held-out pairs; exit with code 2 if a set is incomplete or unfit."""
    from common.log import say
    from launch.training.dpo_loop import (
        check_fit,
        check_prompts,
        read_set,
        shared_pairs,
    )

    with user_errors():
        pairs = read_set(run.pairs, run.generator)
        heldout = None if run.heldout is None else read_set(run.heldout, run.generator)
        # Of the same kind as the generator, with or without images.
        for each in (pairs, heldout):
            if each is not None:
                check_fit(each, run.generator)
        check_prompts(run, pairs)
    shared = 0 if heldout is None else len(shared_pairs(pairs, heldout))
    if shared:
        say(f"{shared} of {len(heldout)} held-out pairs are trained on as well")
    return pairs, heldout


def build_task(run: DpoRun, pairs: PairSet, heldout: PairSet | None) -> TrainingTask:
    """Build everything and describe the run to the training loop."""
    from alignment.dpo import steps_of
    from common.distributed import mean_over_ranks
    from common.log import say
    from engine.ema import Ema
    from engine.trainer import StepReport, no_metrics
    from launch.compose import generator_task
    from launch.training.dpo_displacement import DisplacementWatch
    from launch.training.dpo_loop import batch_arithmetic, build, evaluate_average
    from launch.training.dpo_refresh import Refresher
    from launch.training.start_checks import context_findings, report

    # Build, and tell how large an update is.
    with user_errors():
        loop = build(run, pairs)
    steps = steps_of(run.dpo, len(pairs))
    for line in batch_arithmetic(run, loop, steps=steps):
        say(line)
    ema = None if run.ema is None else Ema(run.ema, loop.generator.module)
    watch = DisplacementWatch(run.dpo)
    refresher = None if run.refresh is None else Refresher(run, loop)

    # The parts that only DPO has.
    def step(number: int) -> StepReport:
        if refresher is not None:
            refresher.before(number)
        start = time.perf_counter()
        metrics = loop.step(number)
        metrics |= mean_over_ranks({"seconds/step": time.perf_counter() - start})
        return StepReport(metrics, stop=watch.should_stop(number, metrics))

    def evaluate() -> dict[str, float]:
        return evaluate_average(loop, ema, heldout, limit=run.heldout_pairs)

    return generator_task(
        run,
        loop,
        ema,
        label="dpo",
        steps=steps,
        step=step,
        prepare=lambda start: report(context_findings(loop.generator)),
        measure_after=no_metrics if heldout is None else evaluate,
        measure_every=run.eval_every,
        state=watch.state,
        restore=watch.restore,
    )


if __name__ == "__main__":
    main()
