"""Longcat-GRPO: fine-tune a Wan generator against rewards.

    deepspeed --num_accelerators 2 launch/grpo.py --config configs/wan/grpo.yaml \\
        rewards.descore.weight=0.5

torchrun and plain python work too. The run folder gets config.yaml, metrics.jsonl, samples/,
evaluation/, checkpoints/ and final/, the trained adapter (or transformer). Started again, a
run resumes from its newest whole checkpoint.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from common.cli import user_errors
from launch.command import train_command
from launch.schemas.training import GrpoRun
from launch.training.grpo_checks import (
    batch_arithmetic,
    changed_rewards,
    check_ranks,
    check_rewards,
    print_cause,
    run_self_checks,
)

if TYPE_CHECKING:
    from pathlib import Path

    from common.types import Prompt
    from engine.trainer import TrainingTask


def main() -> None:
    train_command(
        GrpoRun, description=__doc__, read_input=read_input, build_task=build_task
    )


def read_input(run: GrpoRun) -> tuple[list[Prompt], list[Prompt]]:
    """Read training and held-out prompts; exit with code 2 if a file or the ranks are wrong."""
    from alignment.prompts import describe_shared_prompts, read_image_prompts
    from common.log import say
    from launch.compose import check_image_objective, say_long_prompts

    check_ranks(run, ranks=int(os.environ.get("WORLD_SIZE", "1")))
    heldout: list[Prompt] = []
    with user_errors():
        prompts = read_image_prompts(run.prompts)
        if run.evaluation is not None:
            heldout = read_image_prompts(run.evaluation.prompts)
            heldout = heldout[: run.evaluation.limit]
        check_image_objective(run.grpo.objective, [*prompts, *heldout])
        # Prompts that do not do what the user thinks.
        say_long_prompts([*prompts, *heldout], run.generator)
    shared = describe_shared_prompts(prompts, heldout)
    if shared:
        say(shared)
    return prompts, heldout


def build_task(
    run: GrpoRun, prompts: list[Prompt], heldout: list[Prompt]
) -> TrainingTask:
    """Build everything and describe the run to the training loop."""
    from common.log import say
    from engine.ema import Ema
    from engine.trainer import StepReport
    from launch.compose import check_takes_images, generator_task
    from launch.diagnosis.watch import Watch
    from launch.training.grpo_loop import build, cache_prompts
    from launch.training.grpo_outputs import (
        evaluate_heldout,
        groups_to_write,
        write_samples,
    )
    from launch.training.guards import guards_of

    # Build, and tell how large an update is.
    with user_errors():
        loop = build(run, prompts)
        check_takes_images(run.generator, loop.generator, [*prompts, *heldout])
    for line in batch_arithmetic(run, loop):
        say(line)
    ema = None if run.ema is None else Ema(run.ema, loop.generator.module)
    watch = Watch(run, loop, heldout, ema)
    new_rewards: list[str] = []
    guards = guards_of(run, loop)

    # The parts that only GRPO has.
    def restore(folder: Path) -> None:
        new_rewards.extend(changed_rewards(folder, run))

    def prepare(start: int) -> None:
        loop.silent_guard.expect(run.steps - start)
        watch.prepare(start)
        if run.self_checks and start == 0:
            run_self_checks(run, loop, prompts)
        elif run.self_checks and new_rewards:
            say(f"self-checks of the rewards, which changed: {'; '.join(new_rewards)}")
            check_rewards(run, loop, prompts)
        elif run.self_checks:
            say("self-checks were made before the first step, and are not repeated")
        if run.cache_prompts:
            cache_prompts(run, loop, heldout, start)

    def step(number: int) -> StepReport:
        watch.begin(number)
        result = loop.step(
            number,
            keep_groups=max(groups_to_write(run, number), watch.groups_to_keep(number)),
            show_groups=groups_to_write(run, number),
            keep_rollouts=watch.measures(number),
        )
        return StepReport(result.metrics, result)

    task = generator_task(
        run,
        loop,
        ema,
        old=loop.objective.old,
        label="grpo",
        steps=run.steps,
        step=step,
        prepare=prepare,
        restore=restore,
        measure_before=lambda n: evaluate_heldout(
            run, loop, ema, heldout, n, guards=guards
        ),
        after_log=lambda n, report, log: write_samples(run, report.result, n, log),
        watch=lambda n, report, metrics: watch.look(n, report.result, metrics),
        explain_unavailable=print_cause,
    )
    return guards.guard(task)


if __name__ == "__main__":
    main()
