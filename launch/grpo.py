"""Longcat-GRPO: fine-tune a Wan generator against rewards.

    deepspeed --num_accelerators 2 launch/grpo.py --config configs/wan/grpo.yaml \
        rewards.descore.weight=0.5

torchrun and plain python work too. The run folder gets config.yaml, metrics.jsonl, samples/,
evaluation/, checkpoints/ and final/, the trained adapter (or transformer). Started again, a
run resumes from its newest whole checkpoint.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from common.cli import exit_with_error, user_errors
from launch.command import read_command
from launch.schemas.training import GrpoRun
from launch.training.grpo_checks import (
    batch_arithmetic,
    check_ranks,
    print_cause,
    run_self_checks,
)
from launch.training.inputs import with_inputs

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from alignment.grpo import GrpoLoop
    from common.types import RewardModel
    from engine.trainer import TrainingTask
    from generator.wan import WanGenerator


def main() -> None:
    command = read_command(GrpoRun, description=__doc__.splitlines()[0])
    run = command.cfg
    check_ranks(run, ranks=int(os.environ.get("WORLD_SIZE", "1")))
    train(run, resume=command.resume)


def train(run: GrpoRun, *, resume: str) -> None:
    """Read the prompts, build everything and train."""
    from launch.compose import quiet, say_long_prompts

    quiet()
    from alignment.prompts import describe_shared_prompts
    from common.log import say
    from engine.trainer import run_training

    # Read the input first: a mistake in it ends the process within seconds.
    prompts = prompts_of(run.prompts)
    heldout_prompts: list[str] = []
    if run.evaluation is not None:
        heldout_prompts = prompts_of(run.evaluation.prompts)[: run.evaluation.limit]
    # Prompts that do not do what the user thinks.
    with user_errors():
        say_long_prompts([*prompts, *heldout_prompts], run.generator)
    shared = describe_shared_prompts(prompts, heldout_prompts)
    if shared:
        say(shared)
    build_recorded = with_inputs(run, lambda: build_task(run, prompts, heldout_prompts))
    run_training(run, build_recorded, resume=resume)


def prompts_of(path: str) -> list[str]:
    """Read the prompts of a file; exit with code 2 if the file is wrong."""
    from alignment.prompts import read_prompts

    try:
        return read_prompts(path)
    except ValueError as error:
        exit_with_error(str(error))


def build_task(
    run: GrpoRun, prompts: list[str], heldout_prompts: list[str]
) -> TrainingTask:
    """Build everything and describe the run to the training loop."""
    from common import distributed
    from common.log import say
    from engine.ema import Ema
    from engine.trainer import StepReport
    from launch.compose import generator_task
    from launch.training.grpo_outputs import evaluate_heldout, write_samples

    # Build, and tell how large an update is.
    with user_errors():
        loop, generator, _ = build(run, prompts)
    ranks = distributed.world_size()
    for line in batch_arithmetic(run, ranks=ranks, module=generator.module):
        say(line)
    ema = None if run.ema is None else Ema(run.ema, generator.module)

    # The parts that only GRPO has.
    def prepare(start: int) -> None:
        if run.self_checks and start == 0:
            run_self_checks(run, loop, prompts)
        if run.cache_prompts:
            cache_prompts(run, loop, heldout_prompts, start)

    def step(number: int) -> StepReport:
        result = loop.step(number)
        return StepReport(result.metrics, result)

    return generator_task(
        run,
        generator,
        ema,
        label="grpo",
        steps=run.steps,
        engine=loop.engine,
        step=step,
        prepare=prepare,
        measure_before=lambda n: evaluate_heldout(run, loop, ema, heldout_prompts, n),
        after_log=lambda n, report, log: write_samples(run, report.result, n, log),
        explain_unavailable=print_cause,
    )


def build(
    run: GrpoRun, prompts: list[str]
) -> tuple[GrpoLoop, WanGenerator, DeepSpeedEngine]:
    """Build the loop, the generator and the engine on this rank."""
    from common.log import say
    from launch.compose import build_generator, build_rewards

    names = ", ".join(run.rewards)
    say(f"loading the rewards {names} and the generator {run.generator.path}")
    # Rewards first: a missing reward server is noticed before weights are loaded.
    rewards = build_rewards(run.rewards)
    generator = build_generator(run.generator, seed=run.seed)
    loop, engine = loop_of(run, prompts, generator, rewards)
    return loop, generator, engine


def loop_of(
    run: GrpoRun,
    prompts: list[str],
    generator: WanGenerator,
    rewards: dict[str, RewardModel],
) -> tuple[GrpoLoop, DeepSpeedEngine]:
    """Build the loop and the engine around a generator and rewards."""
    from alignment.grpo import GrpoLoop, backwards_per_update
    from alignment.prompts import PromptSchedule
    from common import distributed
    from launch.compose import generator_engine

    # The engine steps the optimizer after as many backwards as the loop makes.
    accumulation = backwards_per_update(
        run.grpo,
        run.prompts_per_step,
        ranks=distributed.world_size(),
        steps_per_group=run.generator.sampler.steps_per_group,
    )
    engine = generator_engine(run, generator, accumulation=accumulation)
    loop = GrpoLoop(
        run.grpo,
        generator=generator,
        rewards=rewards,
        weights={name: reward.weight for name, reward in run.rewards.items()},
        engine=engine,
        prompts=PromptSchedule(
            prompts, seed=run.seed, prompts_per_step=run.prompts_per_step
        ),
        fps=run.generator.fps,
        grad_norm=engine.engine.get_global_grad_norm,
    )
    return loop, engine.engine


def cache_prompts(
    run: GrpoRun, loop: GrpoLoop, heldout_prompts: list[str], start: int
) -> None:
    """Encode this rank's prompts of all steps from ``start`` on, and free the text encoder."""
    from common import distributed
    from common.log import say

    # This rank's share of every step, by the same schedule that the loop uses.
    block = distributed.rank() // run.grpo.ranks_per_group
    prompts: set[str] = set()
    for step in range(start, run.steps):
        prompts.update(loop.prompts.at(step).share(block, loop.blocks()).prompts)
    say(f"encoding {len(prompts)} prompts, then without the text encoder")
    # Sorted, so that the batches of the text encoder do not depend on the set's order.
    loop.generator.encode_prompts([*sorted(prompts), *heldout_prompts])
    loop.generator.free_text_encoder()


if __name__ == "__main__":
    main()
