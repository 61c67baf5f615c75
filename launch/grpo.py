"""Longcat-GRPO: fine-tune a Wan generator against rewards.

    deepspeed --num_accelerators 2 launch/grpo.py --config configs/wan/grpo.yaml rewards.descore.weight=0.5

torchrun and plain python work too. The run folder gets config.yaml, metrics.jsonl, samples/, evaluation/, checkpoints/
and final/, the trained adapter (or transformer); started again, a run goes on from its newest whole checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import exit_with_error, user_errors
from launch.command import read_command
from launch.grpo_checks import (
    batch_arithmetic,
    check_ranks,
    run_self_checks,
    show_cause,
)
from launch.schemas.training import GrpoRun

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from alignment.grpo import GrpoLoop, StepResult
    from common.log import RunLog
    from common.types import RewardModel
    from engine.ema import Ema
    from engine.guard import Guard
    from generator.counter import ForwardCounter
    from generator.wan import WanGenerator


def main() -> None:
    command = read_command(GrpoRun, description=__doc__.splitlines()[0])
    check_ranks(command.cfg, ranks=int(os.environ.get("WORLD_SIZE", "1")))
    train(command.cfg, prompts_of(command.cfg.prompts), resume=command.resume)


def prompts_of(path: str) -> list[str]:
    """The prompts of a file; exit with code 2 when it is not what it should be."""
    from alignment.prompts import read_prompts

    try:
        return read_prompts(path)
    except ValueError as error:
        exit_with_error(str(error))


def train(cfg: GrpoRun, prompts: list[str], *, resume: str) -> None:
    """The whole run, see `go`, under a guard."""
    from launch.compose import quiet

    quiet()
    from engine.guard import guarded

    heldout = (
        []
        if cfg.evaluation is None
        else prompts_of(cfg.evaluation.prompts)[: cfg.evaluation.limit]
    )
    with guarded(cfg) as guard:
        go(cfg, prompts, heldout, guard, resume=resume)


def go(
    cfg: GrpoRun, prompts: list[str], heldout: list[str], guard: Guard, *, resume: str
) -> None:
    """Build, go on where the run was, one `GrpoLoop.step` after the other, save."""
    from common import distributed, faults
    from common.log import RunLog, progress, say
    from common.memory import peak_memory
    from engine.ema import Ema
    from engine.export import export, save
    from engine.state import begin
    from generator.counter import ForwardCounter

    run_dir = Path(cfg.run_dir)
    with user_errors():
        loop, generator, engine = build(cfg, prompts)
    say(
        "\n".join(
            batch_arithmetic(
                cfg, ranks=distributed.world_size(), module=generator.module
            )
        )
    )
    ema = None if cfg.ema is None else Ema(cfg.ema, generator.module)
    start = begin(cfg, engine, resume, also=() if ema is None else (ema,))
    if cfg.self_checks and start == 0:
        run_self_checks(cfg, loop, prompts)
    if cfg.cache_prompts:
        cache_prompts(cfg, loop, heldout, start)
    counter = ForwardCounter(generator.module)
    log = RunLog(
        run_dir,
        start=start,
        wandb=cfg.wandb,
        tensorboard=cfg.tensorboard,
        total=cfg.steps,
    )

    saved, keep = start, partial(save, cfg, generator, engine, ema)
    guard.begin()
    for step in progress(range(start, cfg.steps), cfg.steps - start, "grpo"):
        with stopping(log, step, keep if saved < step else None):
            measured = measure(cfg, loop, ema, heldout, step, counter)
            result = loop.step(step)
        if ema is not None:
            ema.update()
        faults.point("step")
        skipped = {"train/nonfinite_updates": loop.engine.pop_skipped_count()}
        log.log(
            step,
            {
                **result.metrics,
                **skipped,
                **counter.take(),
                **peak_memory(),
                **measured,
            },
        )
        faults.point("logged")
        last, stop = step + 1 == cfg.steps, guard.step_done()
        if (
            distributed.is_main()
            and cfg.video_every
            and (step % cfg.video_every == 0 or last)
        ):
            write_samples(cfg, result, step, log)
        if last or stop or (step + 1) % cfg.save_every == 0:
            keep(step=step + 1)
            saved = step + 1
        if stop:
            guard.leave(log, step + 1)

    with stopping(log, cfg.steps):
        measured = measure(cfg, loop, ema, heldout, cfg.steps, counter)
    if measured:
        log.log(cfg.steps, measured)
    export(generator, ema, run_dir)
    log.close()


@contextmanager
def stopping(
    log: RunLog, step: int, keep: Callable[..., None] | None = None
) -> Iterator[None]:
    """A reward that fails inside, on whichever rank, ends the run on all with exit code 1; ``keep`` saves first what is
    not saved yet, and started again the run goes on from there.
    """
    from common.types import RewardUnavailableError
    from engine.guard import end_run

    try:
        yield
    except RewardUnavailableError as error:
        show_cause(error)
        if keep is not None:
            keep(step=step)
        done = (
            f"after {step} steps, which are saved"
            if step
            else "before the first step was done"
        )
        end_run(log, f"stopped {done}: {error}", 1)


def write_samples(cfg: GrpoRun, result: StepResult, step: int, log: RunLog) -> None:
    """The first groups' videos of this rank, with what was said of them."""
    from launch.evaluation.samples import SampleWriter, rows_of_step

    rows = list(rows_of_step(result, step=step, groups=cfg.video_groups))
    writer = SampleWriter(
        Path(cfg.run_dir) / "samples" / f"step-{step:06d}", fps=cfg.generator.fps
    )
    writer.add(result.video_BTYXC[: len(rows)], rows)
    rewards = [
        ", ".join(f"{name} {value}" for name, value in row["rewards"].items())
        for row in rows
    ]
    captions = [
        f"{row['prompt']} | {reward}" for row, reward in zip(rows, rewards, strict=True)
    ]
    log.videos(step, sorted(writer.folder.glob("*.mp4")), captions)


def build(
    cfg: GrpoRun, prompts: list[str]
) -> tuple[GrpoLoop, WanGenerator, DeepSpeedEngine]:
    """Everything a run is made of, on this rank."""
    from common.log import say
    from launch.compose import build_generator, build_rewards

    say(
        f"loading the rewards {', '.join(cfg.rewards)} and the generator {cfg.generator.path}"
    )
    rewards = build_rewards(
        cfg.rewards
    )  # first: a reward server that is not there is found out before weights load
    generator = build_generator(cfg.generator, seed=cfg.seed)
    loop, engine = loop_of(cfg, prompts, generator, rewards)
    return loop, generator, engine


def loop_of(
    cfg: GrpoRun,
    prompts: list[str],
    generator: WanGenerator,
    rewards: dict[str, RewardModel],
) -> tuple[GrpoLoop, DeepSpeedEngine]:
    """The loop around a generator and rewards that are there."""
    from alignment.grpo import GrpoLoop, backwards_per_update
    from alignment.prompts import PromptSchedule
    from common import distributed
    from engine.deepspeed import build_engine
    from engine.skip_nonfinite import SkipNonFinite

    engine = build_engine(
        generator.module,
        optimizer=cfg.optimizer,
        zero_stage=cfg.zero_stage,
        accumulation=backwards_per_update(
            cfg.grpo,
            cfg.prompts_per_step,
            ranks=distributed.world_size(),
            steps_per_group=cfg.generator.sampler.steps_per_group,
        ),
        overrides=cfg.deepspeed,
    )
    generator.sharded = cfg.zero_stage == 3
    loop = GrpoLoop(
        cfg.grpo,
        generator=generator,
        rewards=rewards,
        weights={name: reward.weight for name, reward in cfg.rewards.items()},
        engine=SkipNonFinite(engine, patience=cfg.max_nonfinite_updates),
        prompts=PromptSchedule(
            prompts, seed=cfg.seed, prompts_per_step=cfg.prompts_per_step
        ),
        fps=cfg.generator.fps,
        grad_norm=engine.get_global_grad_norm,
    )
    return loop, engine


def measure(
    cfg: GrpoRun,
    loop: GrpoLoop,
    ema: Ema | None,
    prompts: list[str],
    step: int,
    counter: ForwardCounter,
) -> dict[str, float]:
    """`launch.evaluation.heldout.measure` before step ``step`` where it is due, of the average where there is one."""
    from contextlib import nullcontext

    from launch.evaluation.heldout import measure as measure_heldout

    how = cfg.evaluation
    if how is None or (step % how.every and step != cfg.steps):
        return {}
    with nullcontext() if ema is None else ema.swapped_in():
        measured = measure_heldout(
            loop.generator,
            loop.rewards,
            prompts,
            seed=cfg.seed,
            stock=how.stock_scheduler,
            folder=Path(cfg.run_dir) / "evaluation" / f"step-{step:06d}",
            videos=how.videos,
        )
    counter.take()  # not a step's cost
    return measured


def cache_prompts(cfg: GrpoRun, loop: GrpoLoop, heldout: list[str], start: int) -> None:
    """Encode what is still to come on this rank, and drop the text encoder."""
    from common import distributed
    from common.log import say

    place, sets = distributed.rank() // cfg.grpo.ranks_per_group, loop.blocks()
    own = {
        prompt
        for step in range(start, cfg.steps)
        for prompt in loop.prompts.at(step).share(place, sets).prompts
    }
    say(f"encoding {len(own)} prompts, then without the text encoder")
    loop.generator.encode_prompts([*sorted(own), *heldout])
    loop.generator.free_text_encoder()


if __name__ == "__main__":
    main()
