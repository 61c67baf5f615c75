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
from typing import TYPE_CHECKING, Any

from launch.command import read_command
from launch.refuse import refuse, refusing
from launch.runs import GrpoRun

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from alignment.grpo import GrpoLoop, StepResult
    from common.log import RunLog
    from common.types import RewardModel
    from generator.wan import WanGenerator
    from launch.ema import Ema
    from launch.forwards import ForwardCounter
    from launch.guard import Guard


def main() -> None:
    command = read_command(GrpoRun, description=__doc__.splitlines()[0])
    check_ranks(command.cfg, ranks=int(os.environ.get("WORLD_SIZE", "1")))
    train(command.cfg, prompts_of(command.cfg.prompts), resume=command.resume)


def check_ranks(cfg: GrpoRun, *, ranks: int) -> None:
    """Exit with code 2, before anything is loaded, when the ranks cannot share a step's groups evenly."""
    shared = cfg.grpo.ranks_per_group
    if ranks % shared:
        refuse(f"grpo.ranks_per_group={shared} must divide the {ranks} ranks")
    sets = ranks // shared
    if cfg.prompts_per_step % sets:
        share = f"{cfg.prompts_per_step} / {sets} = {cfg.prompts_per_step / sets:.2f} groups each"
        who = "ranks, which" if shared == 1 else f"sets of {shared} ranks, whose number"
        refuse(f"prompts_per_step is over all {who} must divide it: {share}")


def prompts_of(path: str) -> list[str]:
    """The prompts of a file; exit with code 2 when it is not what it should be."""
    from alignment.data import read_prompts

    try:
        return read_prompts(path)
    except ValueError as error:
        refuse(str(error))


def train(cfg: GrpoRun, prompts: list[str], *, resume: str) -> None:
    """The whole run, see `go`, under a guard."""
    from launch.compose import quiet

    quiet()
    from launch.guard import guarded

    heldout = [] if cfg.evaluation is None else prompts_of(cfg.evaluation.prompts)[: cfg.evaluation.limit]
    with guarded(cfg) as guard:
        go(cfg, prompts, heldout, guard, resume=resume)


def go(cfg: GrpoRun, prompts: list[str], heldout: list[str], guard: Guard, *, resume: str) -> None:
    """Build, go on where the run was, one `GrpoLoop.step` after the other, save."""
    from common import distributed, faults
    from common.log import RunLog, progress, say
    from common.memory import peak_memory
    from launch.ema import Ema
    from launch.engine_state import begin
    from launch.forwards import ForwardCounter
    from launch.generator_state import export, save

    run_dir = Path(cfg.run_dir)
    with refusing():
        loop, generator, engine = build(cfg, prompts)
    say("\n".join(batch_arithmetic(cfg, ranks=distributed.world_size(), module=generator.module)))
    ema = None if cfg.ema is None else Ema(cfg.ema, generator.module)
    start = begin(cfg, engine, resume, also=() if ema is None else (ema,))
    if cfg.self_checks and start == 0:
        look_before(cfg, loop, prompts)
    if cfg.cache_prompts:
        cache_prompts(cfg, loop, heldout, start)
    counter = ForwardCounter(generator.module)
    log = RunLog(run_dir, start=start, wandb=cfg.wandb, tensorboard=cfg.tensorboard, total=cfg.steps)

    saved, keep = start, partial(save, cfg, generator, engine, ema)
    guard.begin()
    for step in progress(range(start, cfg.steps), cfg.steps - start, "grpo"):
        with stopping(log, step, keep if saved < step else None):
            measured = measure(cfg, loop, ema, heldout, step, counter)
            result = loop.step(step)
        if ema is not None:
            ema.update()
        faults.point("step")
        skipped = {"train/not_finite": loop.engine.take_skipped()}
        log.log(step, {**result.metrics, **skipped, **counter.take(), **peak_memory(), **measured})
        faults.point("logged")
        last, stop = step + 1 == cfg.steps, guard.step_done()
        if distributed.is_main() and cfg.video_every and (step % cfg.video_every == 0 or last):
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
def stopping(log: RunLog, step: int, keep: Callable[..., None] | None = None) -> Iterator[None]:
    """A reward that fails inside, on whichever rank, ends the run on all with exit code 1; ``keep`` saves first what is
    not saved yet, and started again the run goes on from there.
    """
    from common.types import RewardUnavailableError
    from launch.guard import end_run

    try:
        yield
    except RewardUnavailableError as error:
        show_cause(error)
        if keep is not None:
            keep(step=step)
        done = f"after {step} steps, which are saved" if step else "before the first step was done"
        end_run(log, f"stopped {done}: {error}", 1)


def show_cause(error: Exception) -> None:
    """What a reward's own code raised, with its traceback, on the rank where it did."""
    import traceback

    from common.types import RewardUnavailableError

    if not isinstance(error.__cause__, RewardUnavailableError | None):  # a server that is away has said all
        traceback.print_exception(error.__cause__)


def write_samples(cfg: GrpoRun, result: StepResult, step: int, log: RunLog) -> None:
    """The first groups' videos of this rank, with what was said of them."""
    from launch.samples import SampleWriter, rows_of_step

    rows = list(rows_of_step(result, step=step, groups=cfg.video_groups))
    writer = SampleWriter(Path(cfg.run_dir) / "samples" / f"step-{step:06d}", fps=cfg.generator.fps)
    writer.add(result.video_BTYXC[: len(rows)], rows)
    rewards = [", ".join(f"{name} {value}" for name, value in row["rewards"].items()) for row in rows]
    captions = [f"{row['prompt']} | {reward}" for row, reward in zip(rows, rewards, strict=True)]
    log.videos(step, sorted(writer.folder.glob("*.mp4")), captions)


def build(cfg: GrpoRun, prompts: list[str]) -> tuple[GrpoLoop, WanGenerator, DeepSpeedEngine]:
    """Everything a run is made of, on this rank."""
    from common.log import say
    from launch.compose import build_generator, build_rewards

    say(f"loading the rewards {', '.join(cfg.rewards)} and the generator {cfg.generator.path}")
    rewards = build_rewards(cfg.rewards)  # first: a reward server that is not there is found out before weights load
    generator = build_generator(cfg.generator, seed=cfg.seed)
    loop, engine = loop_of(cfg, prompts, generator, rewards)
    return loop, generator, engine


def loop_of(
    cfg: GrpoRun, prompts: list[str], generator: WanGenerator, rewards: dict[str, RewardModel]
) -> tuple[GrpoLoop, DeepSpeedEngine]:
    """The loop around a generator and rewards that are there."""
    from alignment.data import PromptSchedule
    from alignment.grpo import GrpoLoop, backwards_per_update
    from common import distributed
    from launch.careful import CarefulEngine
    from launch.compose import build_engine

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
        engine=CarefulEngine(engine, patience=cfg.max_not_finite),
        prompts=PromptSchedule(prompts, seed=cfg.seed, prompts_per_step=cfg.prompts_per_step),
        fps=cfg.generator.fps,
        grad_norm=engine.get_global_grad_norm,
    )
    return loop, engine


def look_before(cfg: GrpoRun, loop: GrpoLoop, prompts: list[str]) -> None:
    """`alignment.self_checks`, all ranks the same; exit with code 2 at what would spoil the run."""
    import torch

    from alignment import self_checks
    from common.distributed import derive_seed, raise_on_all
    from common.log import say
    from common.types import RewardUnavailableError
    from generator.stock_check import stock_gap

    generator, own = loop.generator, prompts[:4]
    dtype = cfg.generator.dtype
    findings = [
        self_checks.same_weights(generator.module),
        self_checks.stock_trajectory(lambda: stock_gap(generator, own[0]), dtype=dtype),
        self_checks.first_ratio(generator, own[0], dtype=dtype, fatal=cfg.generator.guidance_in_update),
    ]
    if len(own) > 1:
        seeds = [derive_seed(cfg.seed, "self-check", i) for i in range(len(own))]
        video_BTYXC = torch.cat([generator.decode(generator.sample([p], [s])) for p, s in zip(own, seeds, strict=True)])
        rewards = [one for one in loop.rewards.values() if not one.group_level]
        problem = None
        try:
            for reward in rewards:
                findings += [
                    check(reward, video_BTYXC, own, fps=loop.fps)
                    for check in (self_checks.permutation, self_checks.sense)
                ]
        except RewardUnavailableError as error:
            if not isinstance(error.__cause__, ValueError):  # which says enough: of these videos, or their number
                show_cause(error)
            problem = error
        try:
            raise_on_all(problem)
        except RewardUnavailableError as error:
            refuse(str(error))
    for finding in findings:
        say(f"self-check {'ok' if finding.ok else 'FAILED' if finding.fatal else 'WARNING'}: {finding.message}")
    if failed := [finding.name for finding in findings if finding.fatal and not finding.ok]:
        refuse(f"self-checks failed: {', '.join(failed)}; self_checks=false trains all the same")


def batch_arithmetic(cfg: GrpoRun, *, ranks: int, module: Any) -> list[str]:
    """How prompts, members, ranks and accumulation make one update; what most runs of this kind get wrong."""
    from alignment.grpo import backwards_per_update
    from launch.zero3 import elements

    shared, steps = cfg.grpo.ranks_per_group, cfg.generator.sampler.steps_per_group
    groups = cfg.prompts_per_step * shared // ranks
    together = f", {shared} ranks to a group" if shared > 1 else ""
    trained = elements(p for p in module.parameters() if p.requires_grad)
    everything = elements(module.parameters())
    videos = cfg.prompts_per_step * cfg.grpo.group_size
    backwards = backwards_per_update(cfg.grpo, cfg.prompts_per_step, ranks=ranks, steps_per_group=steps)
    return [
        f"one update = {cfg.prompts_per_step} prompts x {cfg.grpo.group_size} members = {videos} videos, on {ranks} "
        f"rank{'s' * (ranks > 1)} x {groups} groups{together}, {backwards} accumulated backwards each",
        f"training {trained:,} of {everything:,} parameters, ZeRO {cfg.zero_stage}, {cfg.steps} updates",
        *(["fewer than 32 videos per update: expect a noisy reward curve"] if videos < 32 else []),
    ]


def measure(
    cfg: GrpoRun, loop: GrpoLoop, ema: Ema | None, prompts: list[str], step: int, counter: ForwardCounter
) -> dict[str, float]:
    """`launch.evaluation.measure` before step ``step`` where it is due, of the average where there is one."""
    from contextlib import nullcontext

    from launch import evaluation

    how = cfg.evaluation
    if how is None or (step % how.every and step != cfg.steps):
        return {}
    with nullcontext() if ema is None else ema.swapped_in():
        measured = evaluation.measure(
            loop.generator,
            loop.rewards,
            prompts,
            seed=cfg.seed,
            stock=how.stock,
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
    own = {prompt for step in range(start, cfg.steps) for prompt in loop.prompts.at(step).share(place, sets).prompts}
    say(f"encoding {len(own)} prompts, then without the text encoder")
    loop.generator.encode_prompts([*sorted(own), *heldout])
    loop.generator.free_text_encoder()


if __name__ == "__main__":
    main()
