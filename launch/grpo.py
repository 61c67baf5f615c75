"""Longcat-GRPO: fine-tune a Wan generator against rewards.

    deepspeed --num_accelerators 2 launch/grpo.py --config configs/wan/grpo.yaml rewards.descore.weight=0.5

torchrun and plain python work too. The run folder gets config.yaml, metrics.jsonl, samples/, checkpoints/ and final/,
the trained adapter; started again, a run goes on from its newest whole checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import dump, parse_command_line
from launch.refuse import refuse
from launch.runs import GrpoRun

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from alignment.grpo import GrpoLoop
    from generator.wan import WanGenerator


def main() -> None:
    command = parse_command_line(GrpoRun, description=__doc__.splitlines()[0])
    check_ranks(command.cfg, ranks=int(os.environ.get("WORLD_SIZE", "1")))
    train(command.cfg, prompts_of(command.cfg), resume=command.resume)


def check_ranks(cfg: GrpoRun, *, ranks: int) -> None:
    """Exit with code 2, before anything is loaded, when the ranks cannot share a step's prompts evenly."""
    if cfg.prompts_per_step % ranks:
        share = f"{cfg.prompts_per_step} / {ranks} = {cfg.prompts_per_step / ranks:.2f} groups each"
        refuse(f"prompts_per_step is over all ranks, which must divide it: {share}")


def prompts_of(cfg: GrpoRun) -> list[str]:
    """The prompts of the run; exit with code 2 when the file is not what it should be."""
    from alignment.data import read_prompts

    try:
        return read_prompts(cfg.prompts)
    except ValueError as error:
        refuse(str(error))


def train(cfg: GrpoRun, prompts: list[str], *, resume: str) -> None:
    """The whole run: build, go on where it was, one `GrpoLoop.step` after the other, save."""
    from launch.compose import quiet

    quiet()
    from common import distributed
    from common.log import RunLog, progress, say
    from launch.engine_state import go_on
    from launch.forwards import ForwardCounter
    from launch.samples import SampleWriter, rows_of_step
    from launch.zero3 import whole_state

    distributed.init_process_group()
    run_dir = Path(cfg.run_dir)
    if distributed.is_main():
        dump(cfg, run_dir)
    loop, generator, engine = build(cfg, prompts)
    for line in batch_arithmetic(cfg, ranks=distributed.world_size(), module=generator.module):
        say(line)
    start = go_on(engine, resume, run_dir)
    if cfg.self_checks and start == 0:
        look_before(cfg, loop, prompts)
    counter = ForwardCounter(generator.module)
    log = RunLog(run_dir, wandb=cfg.wandb, total=cfg.steps)
    log.truncate(start)

    for step in progress(range(start, cfg.steps), cfg.steps - start, "grpo"):
        result = loop.step(step)
        log.log(step, {**result.metrics, **counter.take()})
        last = step + 1 == cfg.steps
        if distributed.is_main() and cfg.video_every and (step % cfg.video_every == 0 or last):
            rows = list(rows_of_step(result, step=step, groups=cfg.video_groups))
            writer = SampleWriter(run_dir / "samples" / f"step-{step:06d}", fps=cfg.generator.fps)
            writer.add(result.video_BTYXC[: len(rows)], rows)
        if last or (step + 1) % cfg.save_every == 0:
            save(generator, engine, run_dir, step=step + 1, keep=cfg.keep)

    weights = whole_state(generator.module, trained_only=True)
    if distributed.is_main():
        generator.save_adapter(run_dir / "final", weights)
        say(f"done: {run_dir / 'final'} holds the trained adapter")
    log.close()
    distributed.barrier()
    distributed.shutdown()


def build(cfg: GrpoRun, prompts: list[str]) -> tuple[GrpoLoop, WanGenerator, DeepSpeedEngine]:
    """Everything a run is made of, on this rank."""
    from alignment.data import PromptSchedule
    from alignment.grpo import GrpoLoop, backwards_per_update
    from common import distributed
    from common.log import say
    from launch.compose import build_engine, build_generator, build_rewards

    say(f"loading the generator {cfg.generator.path} and the rewards {', '.join(cfg.rewards)}")
    generator = build_generator(cfg.generator, seed=cfg.seed)
    engine = build_engine(
        generator.module,
        optimizer=cfg.optimizer,
        zero_stage=cfg.zero_stage,
        accumulation=backwards_per_update(
            cfg.grpo,
            cfg.prompts_per_step // distributed.world_size(),
            steps_per_group=cfg.generator.sampler.steps_per_group,
        ),
        overrides=cfg.deepspeed,
    )
    generator.sharded = cfg.zero_stage == 3
    loop = GrpoLoop(
        cfg.grpo,
        generator=generator,
        rewards=build_rewards(cfg.rewards),
        weights={name: reward.weight for name, reward in cfg.rewards.items()},
        engine=engine,
        prompts=PromptSchedule(prompts, seed=cfg.seed, prompts_per_step=cfg.prompts_per_step),
        fps=cfg.generator.fps,
        grad_norm=engine.get_global_grad_norm,
    )
    return loop, generator, engine


def look_before(cfg: GrpoRun, loop: GrpoLoop, prompts: list[str]) -> None:
    """`alignment.self_checks`, all ranks the same; exit with code 2 at what would spoil the run."""
    import torch

    from alignment import self_checks
    from common.distributed import derive_seed
    from common.log import say
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
        for reward in loop.rewards.values():
            findings += [
                check(reward, video_BTYXC, own, fps=loop.fps) for check in (self_checks.permutation, self_checks.sense)
            ]
    for finding in findings:
        say(f"self-check {'ok' if finding.ok else 'FAILED' if finding.fatal else 'WARNING'}: {finding.message}")
    if failed := [finding.name for finding in findings if finding.fatal and not finding.ok]:
        refuse(f"self-checks failed: {', '.join(failed)}; self_checks=false trains all the same")


def batch_arithmetic(cfg: GrpoRun, *, ranks: int, module: Any) -> list[str]:
    """How prompts, members, ranks and accumulation make one update; what most runs of this kind get wrong."""
    from alignment.grpo import backwards_per_update
    from launch.zero3 import elements

    groups = cfg.prompts_per_step // ranks
    trained = elements(p for p in module.parameters() if p.requires_grad)
    everything = elements(module.parameters())
    videos = cfg.prompts_per_step * cfg.grpo.group_size
    backwards = backwards_per_update(cfg.grpo, groups, steps_per_group=cfg.generator.sampler.steps_per_group)
    return [
        f"one update = {cfg.prompts_per_step} prompts x {cfg.grpo.group_size} members = {videos} videos, on {ranks} "
        f"rank{'s' * (ranks > 1)} x {groups} groups, {backwards} accumulated backwards each",
        f"training {trained:,} of {everything:,} parameters, ZeRO {cfg.zero_stage}, {cfg.steps} updates",
        *(["fewer than 32 videos per update: expect a noisy reward curve"] if videos < 32 else []),
    ]


def save(generator: WanGenerator, engine: DeepSpeedEngine, run_dir: Path, *, step: int, keep: int) -> None:
    """checkpoints/step-N: adapter/ for people, engine.safetensors to go on from. All ranks call it."""
    from common import checkpoint, distributed
    from launch.engine_state import save_engine
    from launch.zero3 import whole_state

    def write(folder: Path) -> None:
        save_engine(engine, folder)
        weights = whole_state(generator.module, trained_only=True)
        if distributed.is_main():
            generator.save_adapter(folder / "adapter", weights)

    checkpoint.save(run_dir / "checkpoints", step, write, keep=keep, state={"steps_done": step})


if __name__ == "__main__":
    main()
